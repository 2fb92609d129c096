"""Train an embedding network with a metric loss and DDML; Recall@K after every epoch.

The flags are the published script's; README.md has its three commands.
"""

import os
import shlex
import time

import torch

import dataset
from dataset.cache import cache_in_memory
from dataset.images import digest_of_names
from dataset.loader import batches, test_loader, train_loader
from evaluate import describe, evaluate
from flags import (
    Parser,
    add_data_flags,
    add_network_flags,
    at_least,
    boolean,
    given_flags,
    name_part,
)
from losses import LOSSES
from net import model_name
from recipe import OPTIMIZERS, Training, loss_noise, prepare_epoch, settle_loss, train_step
from runs.checkpoint import capture, restore
from runs.results import Epoch, print_result, recalls_of, result_of, summary
from runs.start import describe_process, open_run, warn_of_other_bits
from runs.tracking import track, wandb_mode
from utils import Interrupted, Stop, UserError, choose_device, progress, run, seed_of

STEP = 2  # a step's stream of random numbers, beside the sampler's and the augmentation's
FETCH_EVERY = 50  # steps between two looks at the losses, each of which waits for the device


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = add_data_flags(parser, dataset.canonical_name, batch_size=180)
    add("--IPC", type=at_least(1), help="balanced batches: this many images of each class")
    add("--cache", default="none", choices=["none", "ram"], help="keep decoded images in memory")

    add = add_network_flags(parser, model_name)
    add("--weights", default="imagenet", help="imagenet, none, or a checkpoint's path")
    add("--deterministic", default=False, const=True, nargs="?", type=boolean,
        help="the same bits each time on CUDA too, at some cost in speed")  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="Proxy_Anchor", choices=LOSSES)
    add("--alpha", type=at_least(1e-6, float), help="the loss's scale, by default its own (32)")
    add("--mrg", type=at_least(0, float), help="the loss's margin, by default its own (0.1)")
    add("--proxy-lr-factor", type=at_least(0, float),
        help="proxies' learning rate, times --lr; by default the loss's own (100)")  # fmt: skip
    add("--disent", default=False, const=True, nargs="?", type=boolean, help="DDML; a second head")
    add("--al", default=0.0, type=at_least(0, float), help="DDML: weight of the agnostic term")
    add("--be", default=0.0, type=at_least(0, float), help="DDML: weight of the specific term")
    add("--gam", default=0.0, type=at_least(0, float), help="DDML: weight of the split term")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", default=60, type=at_least(1))
    add("--optimizer", default="adamw", choices=OPTIMIZERS)
    add("--lr", default=1e-4, type=at_least(0, float), help="learning rate of backbone and heads")
    add("--weight-decay", default=1e-4, type=at_least(0, float))
    add("--lr-decay-step", default=10, type=at_least(1), help="epochs between decays")
    add("--lr-decay-gamma", default=0.5, type=at_least(0, float), help="factor of a decay")
    add("--warm", default=1, type=at_least(0), help="epochs in which only heads and proxies train")
    add("--bn-freeze", default=True, type=boolean, help="keep BatchNorm's running statistics")
    add("--seed", default=1, type=at_least(0, most=2**63))

    add = parser.add_argument_group("run").add_argument
    add("--LOG_DIR", default="./logs", help="run folders are made in here")  # differs: ../logs
    add("--remark", default="", type=name_part, help="ends the run folder's name")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const="", metavar="PATH",
                        help="continue the run of these flags, or of this checkpoint")  # fmt: skip
    either.add_argument("--overwrite", action="store_true",
                        help="start anew where the run folder holds a run")  # fmt: skip
    add("--checkpoint-every", type=at_least(1), metavar="N",
        help="save every N steps too, not at the end of epochs alone")  # fmt: skip
    add("--wandb", default="auto", choices=["auto", "online", "offline", "disabled"],
        help="auto: online when logged in, else offline")  # fmt: skip
    return parser


def train_epoch(training, loader, epoch, after_step):
    """The steps of an epoch from `epoch.step` on; `after_step()` follows each of them."""
    model, device, seed = training.model, training.device, training.args.seed
    loader.batch_sampler.set_epoch(epoch.number, epoch.step)
    steps = progress(batches(loader, device), len(loader), f"epoch {epoch.number}")
    epoch.clock = time.perf_counter()
    for pixels, labels, _ in steps:
        epoch.tick("data")
        torch.manual_seed(seed_of(seed, STEP, epoch.number, epoch.step))  # for dropout, too
        noise = None
        if model.disent:
            noise = loss_noise((len(labels), model.embedding_size), device)
        images = model.prepare(pixels)
        epoch.add(
            train_step(model, training.criterion, training.optimizer, images, labels, noise)
        )
        after_step()
        epoch.tick("step")


def run_epoch(training, train_batches, test_batches, epoch, run_folder, stop):
    """Train what is left of an epoch, evaluate, save; the epoch's result. A signal interrupts the
    first two: what is done is saved before Interrupted goes on."""
    args, files = training.args, train_batches.batch_sampler.files

    def save():
        epoch.fetch(files)
        run_folder.save(capture(training, epoch.so_far()))

    def after_step():
        stop.check()
        if args.checkpoint_every and epoch.step % args.checkpoint_every == 0:
            save()
        elif epoch.step % FETCH_EVERY == 0:
            epoch.fetch(files)

    prepare_epoch(training.model, epoch.number, args.warm, args.bn_freeze)
    try:
        train_epoch(training, train_batches, epoch, after_step)
        epoch.fetch(files)
        epoch.tick("step")  # on a GPU the steps that are queued end with the fetch
        started = time.perf_counter()
        tested = stop.between(batches(test_batches, training.device))
        tested = progress(tested, len(test_batches), "evaluating")
        recalls = evaluate(training.model, tested, dataset.ks(args.dataset))
    except Interrupted as interrupted:
        save()
        last = shlex.quote(str(run_folder.last))
        interrupted.note = f"continue with: python train.py --resume {last}"
        raise
    result = result_of(training, epoch, len(train_batches), recalls, time.perf_counter() - started)
    training.history.append(result)
    training.scheduler.step()
    run_folder.save_epoch(capture(training))
    return result


def load_images(args):
    """(train, test) images, checked against the batch."""
    train, test = (dataset.load(args.dataset, args.data_root, half) for half in ("train", "test"))
    if args.batch_size > len(train):  # differs: the script trains on nothing, in silence
        raise UserError(
            f"--batch-size {args.batch_size}: larger than the {len(train)} training images of "
            f"{args.dataset}, so that no batch would be complete"
        )
    if args.IPC:
        classes, rest = divmod(args.batch_size, args.IPC)
        if rest or classes > len(train.classes):
            raise UserError(
                f"--IPC {args.IPC}: a batch of --batch-size {args.batch_size} cannot hold "
                f"{args.IPC} images of each of a whole number of the {len(train.classes)} classes"
            )
    if args.cache == "ram":
        train.read = test.read = cache_in_memory([*train.paths, *test.paths], args.workers)
    print(describe(f"{args.dataset} train", train))
    print(describe(f"{args.dataset} test", test), flush=True)
    return train, test


def main(argv=None):
    parser = build_parser()
    args, given = given_flags(parser, argv)
    args, run_folder, checkpoint = open_run(parser, args, given)
    done = len(checkpoint["history"]) if checkpoint else 0
    if done >= args.epochs:
        print(f"{run_folder.folder} is finished: {done} of {args.epochs} epochs are done")
        print(summary(checkpoint["history"]), end="")
        return
    settle_loss(args)
    mode = wandb_mode(args.wandb)
    device = choose_device(args.gpu_id)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True, warn_only=True)
    train, test = load_images(args)

    weights = None if checkpoint else args.weights
    training = Training(args, len(train.classes), device, weights, digest_of_names(train, test))
    training.model.num_features(args.image_size)  # ends here where the network cannot take it
    epoch = Epoch(done)
    if checkpoint:
        restore(training, checkpoint, args.resume or run_folder.folder)
        epoch = Epoch(done, **(checkpoint["partial"] or {}))
    loading = {"workers": args.workers, "device": device,
               "interpolation": training.model.interpolation}  # fmt: skip
    size, batch_size = args.image_size, args.batch_size
    loaders = (
        train_loader(train, size, batch_size, args.seed, images_per_class=args.IPC, **loading),
        test_loader(test, size, batch_size, **loading),
    )
    description = run_folder.claim(args, new=checkpoint is None)
    run_id, process = description.get("wandb_id"), describe_process(argv, device)
    description = {**process, "flags": vars(args), "resumed": [], **description}
    if checkpoint:
        warn_of_other_bits(description, process)
        description["resumed"].append(process)
    with Stop() as stop, track(args, mode, run_folder.folder, run_id) as wandb_run:
        description["wandb_id"] = wandb_run.id if wandb_run else run_id
        run_folder.start(description, training.history if checkpoint else None)
        train_from(epoch, training, loaders, run_folder, stop, wandb_run)
    print(summary(training.history), end="")
    print(f"run folder: {run_folder.folder}")


def train_from(epoch, training, loaders, run_folder, stop, wandb_run):
    while epoch.number < training.args.epochs:
        result = run_epoch(training, *loaders, epoch, run_folder, stop)
        print_result(result)
        if wandb_run:
            fractions = {key: value / 100 for key, value in recalls_of(result).items()}
            wandb_run.log({"loss": result["loss"], **fractions}, step=epoch.number)
        epoch = Epoch(epoch.number + 1)


if __name__ == "__main__":
    run(main)
