"""Train an embedding network with a metric loss and DDML; Recall@K after every epoch.

The flags are the published script's; README.md has its three commands.
"""

import contextlib
import time
from functools import partial

import torch

import dataset
import utils
from dataset.files import UnreadableImage
from dataset.images import digest_of_names
from distributed import first_alone, join, most, rank, world
from evaluate import describe, evaluate
from flags import (
    Parser,
    add_data_flags,
    add_network_flags,
    at_least,
    boolean,
    compile_mode,
    given_flags,
    name_part,
)
from loading.cache import keep_on_device, read_from_memory
from loading.loader import batches, test_loader, train_loader
from losses import LOSSES
from net import CHOICES, compile_backbone, model_name
from recipe import OPTIMIZERS, Training, loss_noise, prepare_epoch, settle_loss, train_step
from runs.checkpoint import capture, restore
from runs.pictures import draw
from runs.report import announce, conclude, early_end, say_epoch
from runs.results import Epoch, result_of
from runs.start import open_on_first, recorded
from runs.tracking import address_of, log_epoch, memory_of, wandb_mode
from utils import Interrupted, Stop, UserError, progress, run, say, seed_of, set_precision

STEP = 2  # a step's stream of random numbers, beside the sampler's and the augmentation's
FETCH_SECONDS = 1  # between two looks at the losses, each of which waits for the device


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = add_data_flags(parser, dataset.canonical_name, dataset.CHOICES, batch_size=180)
    add("--train-on", default="train", choices=["train", "all"],
        help="all: every class there is, to ship the network; none is left to test on")  # fmt: skip
    add("--IPC", type=at_least(1),
        help="balanced batches: this many images of each class in one; by default any")  # fmt: skip
    add("--cache", default="none", choices=["none", "ram", "gpu"],
        help="keep decoded images in memory; gpu: the device's, cropped there")  # fmt: skip

    add = add_network_flags(parser, model_name, CHOICES)
    add("--weights", default="imagenet", help="imagenet, none, or a checkpoint's path")
    add("--compile", default=False, const=True, nargs="?", type=compile_mode, metavar="MODE",
        help="torch.compile the backbone; reduce-overhead: as CUDA graphs too")  # fmt: skip
    add("--deterministic", default=False, const=True, nargs="?", type=boolean,
        help="the same bits each time on CUDA too, at some cost in speed")  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="Proxy_Anchor", choices=LOSSES, metavar="NAME", help=", ".join(LOSSES))
    add("--alpha", type=at_least(1e-6, float),
        help="the loss's scale; by default its own, 32 for Proxy_Anchor")  # fmt: skip
    add("--mrg", type=at_least(0, float),
        help="the loss's margin; by default its own, 0.1 for Proxy_Anchor")  # fmt: skip
    add("--proxy-lr-factor", type=at_least(0, float),
        help="times --lr, proxies' learning rate; by default the loss's own, "
        "100 for Proxy_Anchor")  # fmt: skip
    add("--shard-proxies", default=False, const=True, nargs="?", type=boolean,
        help="under torchrun, each process holds its part of the proxies")  # fmt: skip
    add("--disent", default=False, const=True, nargs="?", type=boolean,
        help="DDML; adds a second head")  # fmt: skip
    add("--al", default=0.0, type=at_least(0, float), help="DDML: weight of the agnostic term")
    add("--be", default=0.0, type=at_least(0, float), help="DDML: weight of the specific term")
    add("--gam", default=0.0, type=at_least(0, float), help="DDML: weight of the split term")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", default=60, type=at_least(1), help="passes over the training images")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="updates all parameters")
    add("--lr", default=1e-4, type=at_least(0, float), help="learning rate of backbone and heads")
    add("--weight-decay", default=1e-4, type=at_least(0, float), help="of all parameters")
    add("--lr-decay-step", default=10, type=at_least(1), help="epochs between decays")
    add("--lr-decay-gamma", default=0.5, type=at_least(0, float), help="factor of a decay")
    add("--warm", default=1, type=at_least(0),
        help="epochs in which only heads and proxies train")  # fmt: skip
    add("--bn-freeze", default=True, type=boolean,
        help="keep BatchNorm's running statistics")  # fmt: skip
    add("--seed", default=1, type=at_least(0, most=2**63), help="of all random numbers")

    add = parser.add_argument_group("run").add_argument
    # differs: ../logs
    add("--LOG_DIR", default="./logs", metavar="DIR", help="run folders are made in here")
    add("--remark", default="", type=name_part, metavar="TEXT", help="ends the run folder's name")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const="", metavar="PATH",
        help="continue the run of this folder or checkpoint; without PATH, of these flags"
    )  # fmt: skip
    either.add_argument("--overwrite", action="store_true",
                        help="start anew where the run folder holds a run")  # fmt: skip
    add("--checkpoint-every", type=at_least(1),
        help="save after this many steps too; by default only at the end of epochs")  # fmt: skip
    add("--quiet", action="store_true", help="print warnings, errors and the end's results alone")
    add("--wandb", default="auto", choices=["auto", "online", "offline", "disabled"],
        help="auto: online when logged in, else offline")  # fmt: skip
    return parser


def train_epoch(training, loader, epoch, after_step):
    """The steps of an epoch from `epoch.step` on; `after_step()` follows each of them."""
    model, device, args = training.model, training.device, training.args
    prepare_epoch(model, epoch.number, args.warm, args.bn_freeze)
    if args.compile and epoch.number == args.warm:
        torch.compiler.reset()  # torch 2.11 does not look at what trains: it made no gradients
    loader.batch_sampler.set_epoch(epoch.number, epoch.step)
    steps = progress(batches(loader, device), len(loader), f"epoch {epoch.number}",
                     args.batch_size, epoch.note)  # fmt: skip
    epoch.clock = time.perf_counter()
    for pixels, labels, _ in steps:
        epoch.tick("data")
        key = args.seed, STEP, epoch.number, epoch.step
        torch.manual_seed(seed_of(*key))
        noise = None
        if model.disent:
            noise = loss_noise((args.batch_size, model.embedding_size), device)
        if rank():
            torch.manual_seed(seed_of(*key, rank()))  # for dropout: other images, other masks
        images = model.prepare(pixels)
        epoch.add(train_step(model, training.criterion, training.optimizer, images, labels, noise,
                             args.batch_size))  # fmt: skip
        after_step()
        epoch.tick("step")


def run_epoch(training, train_batches, test_scores, epoch, run_folder, stop):
    """Train what is left of an epoch, save, evaluate, save; the epoch's result, and the test
    images' embeddings and hits. Where a signal or a damaged image ends it, the exception says what
    is saved and how to go on."""
    args, files, saved = training.args, train_batches.batch_sampler.files, epoch.step
    alone = world() == 1

    def save(finished=False):
        nonlocal saved
        epoch.fetch(files)
        if run_folder:
            run_folder.wait()  # else there would be two copies of the state at a time
        checkpoint = capture(training, None if finished else epoch.so_far())
        saved = epoch.step
        if run_folder:
            run_folder.save(checkpoint)

    def after_step():
        stop.check(most)
        if run_folder:
            run_folder.look()
        if args.checkpoint_every and epoch.step % args.checkpoint_every == 0:
            save()
        elif most(time.perf_counter() > epoch.fetched + FETCH_SECONDS):
            epoch.fetch(files)

    try:
        train_epoch(training, train_batches, epoch, after_step)
        epoch.fetch(files)
        epoch.tick("step")  # on a GPU the steps that are queued end with the fetch
        started, scores, retrieved = time.perf_counter(), {}, None
        if test_scores:
            save()  # evaluating takes long enough to be interrupted in any way
            # several processes would end at different batches
            scores, *retrieved = test_scores(watch=stop.between if alone else iter)
    except (Interrupted, UnreadableImage) as error:
        # of several processes only one knows of a damaged image, and it cannot save their parts
        if epoch.step > saved and (alone or isinstance(error, Interrupted)):
            save()
        raise early_end(error, epoch.step == saved, run_folder) from None
    result = result_of(training, epoch, len(train_batches), scores, time.perf_counter() - started)
    training.history.append(result)
    training.scheduler.step()
    save(finished=True)
    return result, retrieved


def load_images(args):
    """(train, test) images, checked against the batch; test is None with --train-on all."""
    dataset.prepare(args.dataset, args.data_root)
    splits, name = dataset.read(args.dataset, args.data_root), dataset.title(args.dataset)
    wanted = ("train", "test") if args.train_on == "train" else ("all",)
    sets = {split: dataset.image_set(args.dataset, splits, split) for split in wanted}
    train, test = [*sets.values(), None][:2]
    if args.batch_size > len(train):  # differs: the script trains on nothing, in silence
        raise UserError(
            f"--batch-size {args.batch_size}: larger than the {len(train)} training images of "
            f"{name}, so that no batch would be complete; use {len(train)} or fewer"
        )
    if args.batch_size < world():
        raise UserError(f"--batch-size {args.batch_size}: fewer than the {world()} processes that "
                        "share a batch")  # fmt: skip
    if args.IPC:
        classes, rest = divmod(args.batch_size, args.IPC)
        if rest or classes > len(train.classes):
            raise UserError(
                f"--IPC {args.IPC}: a batch of --batch-size {args.batch_size} cannot hold "
                f"{args.IPC} images of each of a whole number of the {len(train.classes)} classes"
            )
    for split, images in sets.items():
        say(describe(f"{name} {split}", images))
    if not test:
        say("training on all classes: none is left to test on, the last epoch is what is kept")
    return train, test


def build_loading(training, train, test):
    """The loader of training, and what evaluates the test images, None without any."""
    args, model, device = training.args, training.model, training.device
    size, batch_size = args.image_size, args.batch_size
    loading = {"workers": args.workers, "device": device, "interpolation": model.interpolation}
    if args.cache == "ram":
        read_from_memory([images for images in (train, test) if images], args.workers)
    train_batches = train_loader(
        train, size, batch_size, args.seed, images_per_class=args.IPC, **loading
    )
    test_batches = test and test_loader(test, size, batch_size, **loading)
    if args.cache == "gpu":
        train_batches, test_batches = keep_on_device(
            train, train_batches, test_batches, size, **loading
        )
    test_scores = test and partial(
        evaluate, model, test_batches, device,
        dataset.ks(args.dataset, args.ks), test.queries, args.metrics,
    )  # fmt: skip
    return train_batches, test_scores


def main(argv=None):
    parser = build_parser()
    args, given = given_flags(parser, argv)
    utils.quiet = args.quiet
    device = join(args.gpu_id)
    args, run_folder, checkpoint, complete = open_on_first(parser, args, given)
    done = len(checkpoint["history"]) if checkpoint else 0
    if complete:
        if run_folder:
            print(f"{run_folder.folder} is finished: {done} of {args.epochs} epochs are done")
            conclude(checkpoint["history"], run_folder)
        return
    settle_loss(args)
    mode = wandb_mode(args.wandb)
    set_precision(args.precision, args.deterministic)
    with first_alone():
        train, test = load_images(args)
        weights = None if checkpoint else args.weights
        training = Training(args, len(train.classes), device, weights, digest_of_names(train, test))
    training.model.num_features(args.image_size)  # ends here where the network cannot take it
    if args.compile:
        compile_backbone(training.model, args.compile)
    epoch = Epoch(done)
    if checkpoint:
        restore(training, checkpoint, args.resume)
        epoch = Epoch(done, **(checkpoint["partial"] or {}))
    train_batches, test_scores = build_loading(training, train, test)
    with recorded(run_folder, training, argv, mode, train, test, checkpoint) as wandb_run:
        announce(training, len(train_batches), run_folder)
        with Stop() as stop, run_folder or contextlib.nullcontext():  # in here are all saves
            retrieved = train_from(
                epoch, training, train_batches, test_scores, run_folder, stop, wandb_run
            )
            if test and not retrieved:  # all was trained before; what is left is to draw
                _, *retrieved = test_scores()
        if run_folder:
            about = test and f"{describe('test', test)}. Below, the last epoch's network."
            draw(run_folder, training.history, about, test, retrieved, wandb_run)
    if run_folder:
        run_folder.file_lock.release()
        conclude(training.history, run_folder, address_of(wandb_run))


def train_from(epoch, training, train_batches, test_scores, run_folder, stop, wandb_run):
    """The epochs that are left; the last one's embeddings and hits of the test images."""
    epochs, retrieved = training.args.epochs, None
    while epoch.number < epochs:
        result, retrieved = run_epoch(training, train_batches, test_scores, epoch, run_folder, stop)
        say_epoch(result, epochs)
        if wandb_run:
            log_epoch(wandb_run, training.history, **memory_of(training.device))
        epoch = Epoch(epoch.number + 1)
    return retrieved


if __name__ == "__main__":
    run(main)
