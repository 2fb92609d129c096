"""Train an embedding network with a metric loss and DDML; Recall@K after every epoch.

The flags are the published script's; README.md and docs/reproduction.md have its three commands.
"""

from functools import partial

import torch

import dataset
from dataset.files import UnreadableImage
from dataset.images import digest_of_names
from distributed import init_processes, rank_0_first, world_size
from flags import (
    SWITCH,
    Parser,
    add_data_flags,
    add_network_flags,
    at_least,
    boolean,
    compile_mode,
    given_flags,
    name_part,
    share,
)
from loading.cache import keep_on_device, read_from_memory
from loading.loader import Loading, batches, test_loader, train_loader
from losses import LOSSES
from net import CHOICES, compile_modules, model_name
from recipe import OPTIMIZERS, build_training, prepare_epoch, seeded_noise, settle_loss, train_step
from retrieval.evaluate import evaluate
from runs.checkpoint import restore, save
from runs.checks import check_flags, load_images
from runs.finish import finish, test_once
from runs.forecast import Forecast, evaluate_start
from runs.report import announce, conclude, say_epoch
from runs.results import Epoch, is_finished, result_of
from runs.safety import after_step, before_evaluation, early_end
from runs.start import left_out_before, open_run, record
from runs.tracking import address_of, log_epoch, memory_of
from utils import Interrupted, Stop, progress, run, say, set_precision, set_quiet

USAGE = """python train.py [flags]; most runs need only these:
  --dataset NAME --data-root DIR       the images
  --model NAME --weights NAME          the network
  --disent True --al A --be B --gam G  DDML's terms and their weights
  --epochs N --lr LR --batch-size N    the training
  --resume, --overwrite                go on with a run, or replace it"""


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0], usage=USAGE)
    add = add_data_flags(parser, dataset.canonical_name, dataset.CHOICES, batch_size=180)
    add("--train-on", default="train", choices=["train", "all"],
        help="all: train on the test classes too, to ship the network")  # fmt: skip
    add("--val-classes", type=share, metavar="SHARE",
        help="hold out this share of the training classes; their MAP@R chooses the epoch, and the "
        "test images are evaluated once, at the end")  # fmt: skip
    add("--fold", type=at_least(0), help="the fold of the sorted classes to hold out, from 0")
    add("--patience", type=at_least(1), help="stop after this many epochs without a better MAP@R")
    add("--IPC", type=at_least(1), help="images of each class in a batch; by default any")
    add("--cache", default="none", choices=["none", "ram", "gpu"],
        help="keep decoded images in this memory; gpu: crop them there too")  # fmt: skip

    add = add_network_flags(parser, model_name, CHOICES)
    add("--weights", default="imagenet", metavar="NAME",
        help="imagenet, none, or a checkpoint's path")  # fmt: skip
    add("--compile", default=False, const=True, nargs="?", type=compile_mode, metavar="MODE",
        help="torch.compile network and loss; MODE reduce-overhead: with CUDA graphs")  # fmt: skip
    add("--deterministic", **SWITCH, help="the same bits in every run on CUDA too, but slower")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="Proxy_Anchor", choices=LOSSES, metavar="NAME", help=", ".join(LOSSES))
    add("--alpha", type=at_least(1e-6, float),
        help="scale of the loss; by default its own, of Proxy_Anchor 32")  # fmt: skip
    add("--mrg", type=at_least(0, float),
        help="margin of the loss; by default its own, of Proxy_Anchor 0.1")  # fmt: skip
    add("--proxy-lr-factor", type=at_least(0, float),
        help="learning rate of the proxies over --lr; by default its own, of Proxy_Anchor 100")
    add("--shard-proxies", **SWITCH, help="under torchrun, each process holds some of the proxies")
    add("--disent", **SWITCH, help="DDML: add a second head and the three terms below")
    add("--al", default=0.0, type=at_least(0, float), help="DDML: weight of the agnostic term")
    add("--be", default=0.0, type=at_least(0, float), help="DDML: weight of the specific term")
    add("--gam", default=0.0, type=at_least(0, float), help="DDML: weight of the split term")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", default=60, type=at_least(1), help="passes over the training images")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="of all parameters")
    add("--lr", default=1e-4, type=at_least(0, float), help="learning rate of backbone and heads")
    add("--weight-decay", default=1e-4, type=at_least(0, float), help="of all parameters")
    add("--lr-decay-step", default=10, type=at_least(1), help="epochs between decays")
    add("--lr-decay-gamma", default=0.5, type=at_least(0, float), help="factor of each decay")
    add("--warm", default=1, type=at_least(0), help="epochs that train only heads and proxies")
    add("--bn-freeze", default=True, type=boolean, help="keep BatchNorm's running statistics fixed")
    add("--seed", default=1, type=at_least(0, maximum=2**63), help="of all random numbers")

    add = parser.add_argument_group("run").add_argument
    # differs: ../logs
    add("--LOG_DIR", default="./logs", metavar="DIR", help="folder of the run folders")
    add("--remark", default="", type=name_part, metavar="TEXT", help="end of the run folder's name")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const="", metavar="PATH",
        help="continue the run of this folder or checkpoint; without PATH, the run of these flags"
    )  # fmt: skip
    either.add_argument("--overwrite", action="store_true", help="replace the run in its folder")
    add("--keep", default="all", choices=["all", "best"],
        help="best: delete at the end what only continues the run")  # fmt: skip
    add("--checkpoint-every", type=at_least(1), help="also save after this many steps of an epoch")
    add("--quiet", action="store_true", help="print only warnings, errors and the results")
    add("--wandb", default="auto", choices=["auto", "online", "offline", "disabled"],
        help="auto: online when logged in, else offline")  # fmt: skip
    return parser


def build_loading(training, images):
    """Returns (training loader, function that evaluates unseen classes): the held-out ones, or else
    the test's; None instead of the function if there are none."""
    args, model = training.args, training.model
    train, unseen = images["train"], images.get("val", images.get("test"))
    loading = Loading(args.image_size, args.workers, training.device, model.interpolation)
    if args.cache == "ram":
        paths = [path for each in images.values() for path in each.paths]
        loading = loading._replace(read=read_from_memory(paths, args.workers, train.background))
    loader = train_loader(train, args.batch_size, args.seed, loading, args.IPC)
    eval_loader = unseen and test_loader(unseen, args.batch_size, loading)
    if args.cache == "gpu":
        loader, eval_loader = keep_on_device(train, loader, eval_loader, loading)
    if not unseen:
        return loader, None
    ks, at_r = dataset.ks(args.dataset, args.ks), args.metrics or bool(args.val_classes)
    return loader, partial(evaluate, model, eval_loader, ks, unseen.queries, at_r)


def run_epoch(training, loader, evaluate_unseen, run_folder, stop):
    """Train what is left of the epoch, evaluate, save. Returns what was retrieved."""
    args, model, epoch = training.args, training.model, training.epoch
    prepare_epoch(model, epoch.number, args.warm, args.bn_freeze)
    if args.compile and epoch.number == args.warm:
        torch.compiler.reset()  # torch 2.11 does not look at what trains: it made no gradients
    loader.batch_sampler.set_epoch(epoch.number, epoch.step)
    steps = progress(batches(loader, training.device), len(loader), f"epoch {epoch.number}",
                     args.batch_size, epoch.note)  # fmt: skip
    epoch.tick()
    try:
        for pixels, labels, _ in steps:
            epoch.tick("data")
            noise = seeded_noise(training)
            images, is_last = model.prepare(pixels), epoch.step == len(loader) - 1
            epoch.add(train_step(model, training.criterion, training.optimizer, images, labels,
                                 noise, args.batch_size, is_last))  # fmt: skip
            after_step(training, run_folder, stop)
            epoch.tick("step")
            training.forecast.look(training, images)
        epoch.fetch()
        epoch.tick("step")  # on a GPU the steps that are queued end with the fetch
        retrieved = None
        if evaluate_unseen:
            before_evaluation(training, run_folder)
            # one rank would stop at another batch than the others
            retrieved = evaluate_unseen(watch=stop.between if world_size() == 1 else iter)
    except (Interrupted, UnreadableImage, torch.OutOfMemoryError) as error:
        raise early_end(error, training, run_folder) from None
    epoch.tick("eval")
    training.history.append(result_of(training, len(loader), retrieved))
    training.scheduler.step()
    save(training, run_folder, finished=True)
    return retrieved


def parse_flags(parser, argv):
    """All flags as a namespace, and {name: value} of those on the command line."""
    args, given = given_flags(parser, argv)
    if args.val_classes:
        args.fold = args.fold or 0
    return args, given


def main(argv=None):
    parser = build_parser()
    args, given = parse_flags(parser, argv)
    set_quiet(args.quiet)
    device = init_processes(args.gpu_id)
    args, run_folder, checkpoint = open_run(parser, args, given)
    if run_folder.complete:
        done = len(checkpoint["history"])
        ended = f", --patience {args.patience} ended it" if done < args.epochs else ""
        say(f"{run_folder.folder} is finished: {done} of {args.epochs} epochs are done{ended}")
        conclude(run_folder.stored_results(), run_folder)
        return
    settle_loss(args)
    check_flags(args)
    set_precision(args.precision, args.deterministic)
    images, left_out = load_images(args, left_out_before(run_folder, checkpoint))
    weights = None if checkpoint else args.weights
    with rank_0_first():
        training = build_training(args, len(images["train"].classes), device, weights)
    training.images_digest = digest_of_names(images.values())
    training.model.num_features(args.image_size)  # UserError if the network cannot take it
    if args.compile:
        ours = args.loss == "Proxy_Anchor" and not args.shard_proxies  # others are many graphs
        compile_modules(training.model, [training.criterion] if ours else [], args.compile)
    partial_epoch = {}
    if checkpoint:
        restore(training, checkpoint, args.resume)
        partial_epoch = checkpoint["partial"] or {}
    loader, evaluate_unseen = build_loading(training, images)
    files, retrieved, tested = loader.batch_sampler.files, None, None
    training.epoch = Epoch(len(training.history), files, **partial_epoch)
    with record(parser, run_folder, training, images, left_out, argv, checkpoint) as wandb_run:
        announce(training, len(loader), run_folder)
        training.forecast = Forecast(len(loader), evaluate_start(training, evaluate_unseen))
        with Stop() as stop, run_folder:  # all saves happen in here
            while not is_finished(training.history, args):
                retrieved = run_epoch(training, loader, evaluate_unseen, run_folder, stop)
                say_epoch(training.history[-1], args)
                log_epoch(wandb_run, training.history, **memory_of(device))
                training.epoch = Epoch(len(training.history), files)
        if args.val_classes:
            retrieved, tested = test_once(training, images, run_folder)
        elif evaluate_unseen and not retrieved:  # it was killed after its last epoch
            retrieved = evaluate_unseen()
        results = finish(run_folder, training, images, retrieved, tested, wandb_run)
    conclude(results, run_folder, address_of(wandb_run))


if __name__ == "__main__":
    run(main)
