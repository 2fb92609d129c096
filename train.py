"""Train an embedding network with Proxy-Anchor and DDML; Recall@K after every epoch.

The flags are the published script's; README.md has its three commands.
"""

import contextlib
import json
import math
import netrc
import os
import platform
import secrets
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn
from torch.nn.utils import clip_grad_value_

import dataset
from dataset.loader import batches, test_loader, train_loader
from dataset.transforms import test_transform, train_transform
from evaluate import describe, evaluate
from losses import DDML, ProxyAnchor
from net import MODELS, create_model
from net.weights import load_strictly
from utils import (
    Parser,
    UserError,
    at_least,
    boolean,
    choose_device,
    generator,
    given_flags,
    image_size,
    progress,
    read_checkpoint,
    run,
    warn,
    write_atomically,
    write_json,
    write_text,
)

TERMS = ("metric", "agnostic", "specific", "split")
CLIP_VALUE = 10
PROXY_LR_FACTOR = 100
NOISE = 2  # stream of random numbers, beside the loader's
# Flags that may differ when a run is continued: they do not change what is computed.
FREE_ON_RESUME = {"epochs", "workers", "gpu_id", "data_root", "LOG_DIR", "wandb", "resume"}


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cub", type=dataset.canonical_name, help="cub, car, SOP, demo")
    add("--data-root", default="./data", help="folder of the extracted data sets")
    add("--image-size", default=224, type=image_size, help="pixels; tested at 256/224 of it")
    add("--batch-size", default=180, type=at_least(1), help="B")
    add("--IPC", type=at_least(1), help="balanced batches: this many images of each class")
    add("--workers", default=4, type=at_least(0), help="processes that load images")

    add = parser.add_argument_group("network").add_argument
    add("--model", default="bn_inception", choices=MODELS)
    add("--embedding-size", default=512, type=at_least(1), help="d")
    add("--l2-norm", default=True, type=boolean, help="L2-normalise the heads")
    add("--weights", default="imagenet", help="imagenet, none, or a checkpoint's path")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="Proxy_Anchor", choices=["Proxy_Anchor"])
    add("--alpha", default=32, type=at_least(0, float), help="Proxy-Anchor's scale")
    add("--mrg", default=0.1, type=at_least(0, float), help="Proxy-Anchor's margin")
    add("--disent", default=False, const=True, nargs="?", type=boolean, help="DDML; a second head")
    add("--al", default=0.0, type=at_least(0, float), help="DDML: weight of the agnostic term")
    add("--be", default=0.0, type=at_least(0, float), help="DDML: weight of the specific term")
    add("--gam", default=0.0, type=at_least(0, float), help="DDML: weight of the split term")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", default=60, type=at_least(1))
    add("--optimizer", default="adamw", choices=OPTIMIZERS)
    add("--lr", default=1e-4, type=at_least(0, float), help="backbone and heads; proxies: 100 x")
    add("--weight-decay", default=1e-4, type=at_least(0, float))
    add("--lr-decay-step", default=10, type=at_least(1), help="epochs between decays")
    add("--lr-decay-gamma", default=0.5, type=at_least(0, float), help="factor of a decay")
    add("--warm", default=1, type=at_least(0), help="epochs in which only heads and proxies train")
    add("--bn-freeze", default=True, type=boolean, help="keep BatchNorm's running statistics")
    add("--seed", default=1, type=at_least(0))
    add("--gpu-id", default=0, type=at_least(-1), help="-1: all GPUs (not supported yet)")

    add = parser.add_argument_group("run").add_argument
    add("--LOG_DIR", default="./logs", help="run folders are made in here")  # differs: ../logs
    add("--remark", default="", help="ends the run folder's name")
    add("--resume", nargs="?", const="", metavar="PATH",
        help="continue the run of these flags, or of this checkpoint")  # fmt: skip
    add("--overwrite", action="store_true", help="start anew where the run folder holds a run")
    add("--wandb", default="auto", choices=["auto", "online", "offline", "disabled"],
        help="auto: online when logged in, else offline")  # fmt: skip
    return parser


OPTIMIZERS = {
    "sgd": lambda groups, **kw: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **kw),
    "adam": torch.optim.Adam,
    "rmsprop": lambda groups, **kw: torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, **kw),
    "adamw": torch.optim.AdamW,
}


# --- the recipe -----------------------------------------------------------------------------


def build_criterion(args, num_classes):
    loss = ProxyAnchor(num_classes, args.embedding_size, args.mrg, args.alpha)
    return DDML(loss, args.al, args.be, args.gam) if args.disent else loss


def parameter_groups(model, criterion, lr):
    """Backbone, heads, proxies: each of their parameters once."""
    heads = [p for head in model.heads() for p in head.parameters()]
    in_heads = set(heads)
    backbone = [p for p in model.parameters() if p not in in_heads]
    return [
        {"params": backbone, "lr": lr},
        {"params": heads, "lr": lr},
        {"params": list(criterion.parameters()), "lr": PROXY_LR_FACTOR * lr},
    ]


def build_optimizer(args, model, criterion):
    groups = parameter_groups(model, criterion, args.lr)
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer, step_size=args.lr_decay_step, gamma=args.lr_decay_gamma
    )
    return optimizer, scheduler


def prepare_epoch(model, epoch, warm, bn_freeze):
    """What trains in this epoch: during warm-up only the heads (and the proxies).

    bn_freeze keeps BatchNorm's running statistics. Its weights and biases train with the
    backbone all the same, as in the published script, unless there is no warm-up at all.
    """
    model.train()
    model.model.requires_grad_(epoch >= warm)
    for head in model.heads():
        head.requires_grad_(True)
    if bn_freeze:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                if warm == 0:
                    module.requires_grad_(False)


def train_step(model, criterion, optimizer, images, labels, noise=None):
    """One step; returns {"loss" and each term: detached scalar on the device}."""
    output = model(images)
    if model.disent:
        loss, terms = criterion(*output, labels, noise)
    else:
        loss = criterion(output, labels)
        terms = {"metric": loss}
    optimizer.zero_grad()
    loss.backward()
    clip_grad_value_(model.parameters(), CLIP_VALUE)
    clip_grad_value_(criterion.parameters(), CLIP_VALUE)
    optimizer.step()
    return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}


def loss_noise(seed, epoch, step, shape, device):
    """The two samples' noise [2, B, d] of a step: drawn on the CPU, the same on every device."""
    noise = torch.randn(2, *shape, generator=generator(seed, NOISE, epoch, step))
    if device.type == "cuda":
        noise = noise.pin_memory()
    return noise.to(device, non_blocking=True)


def train_epoch(model, criterion, optimizer, loader, device, epoch, seed):
    """{"loss" and each term: mean over the epoch's steps}. The device is waited for once."""
    loader.batch_sampler.set_epoch(epoch)
    totals = {}
    steps = progress(batches(loader, device), len(loader), f"epoch {epoch}")
    for step, (images, labels) in enumerate(steps):
        noise = None
        if model.disent:
            noise = loss_noise(seed, epoch, step, (len(labels), model.embedding_size), device)
        values = train_step(model, criterion, optimizer, images, labels, noise)
        totals = {name: totals.get(name, 0) + value.double() for name, value in values.items()}
    means = (torch.stack(list(totals.values())) / len(loader)).tolist()
    return dict(zip(totals, means))


# --- the run folder -------------------------------------------------------------------------


class RunFolder:
    """Where a run's files are; every file is replaced whole, never written in place."""

    def __init__(self, folder, args):
        self.folder = Path(folder)
        name = f"{args.dataset}_{args.model}"
        self.best = self.folder / f"{name}_best.pth"
        self.last = self.folder / f"{name}_last.pth"
        self.results = self.folder / f"{name}_best_results.txt"
        self.metrics = self.folder / "metrics.jsonl"
        self.args = self.folder / "args.json"
        self.files = [self.args, self.metrics, self.results, self.best, self.last]

    def in_use(self):
        return any(file.exists() for file in self.files)

    def write_metrics(self, history):
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in history))

    def write_epoch(self, checkpoint):
        """Save an epoch; the checkpoint that --resume reads comes last, so that an interrupted
        save is an epoch that never happened."""
        history = checkpoint["history"]
        if best_record(history) is history[-1]:
            write_atomically(self.best, lambda file: torch.save(checkpoint, file))
        write_text(self.results, summary(history))
        self.write_metrics(history)
        write_atomically(self.last, lambda file: torch.save(checkpoint, file))


def run_folder_path(args):
    seed = "" if args.seed == 1 else f"_seed{args.seed}"
    name = (
        f"{args.model}_{args.loss}_embedding{args.embedding_size}"
        f"_al{args.al}_be{args.be}_gam{args.gam}_{args.optimizer}_lr{args.lr}"
        f"_batch{args.batch_size}{seed}{args.remark}"
    )
    return Path(args.LOG_DIR, f"logs_{args.dataset}", name)


def best_record(history):
    """The first epoch with the greatest R@1."""
    return max(history, key=lambda record: record["R@1"])


def recalls_of(record):
    return {key: value for key, value in record.items() if key.startswith("R@")}


def summary(history):
    """The published script's result file, with the last epoch beside the best."""
    lines = []
    for title, record in (("Best", best_record(history)), ("Last", history[-1])):
        lines.append(f"{title} Epoch: {record['epoch']}")
        for key, value in recalls_of(record).items():
            lines.append(f"{title} {key.replace('R@', 'Recall@')}: {value:.4f}")
    # differs: the script gives the best epoch alone, and does not say how it was chosen
    lines.append("The best epoch is chosen on the test set, the last one is not.")
    return "\n".join(lines) + "\n"


def open_run(args, given):
    """(flags, RunFolder, checkpoint or None): where to write, and what to continue from."""
    if "/" in args.remark:
        raise UserError(f"--remark {args.remark}: it ends a folder's name and cannot hold a /")
    if args.resume is None:
        run_folder = RunFolder(run_folder_path(args), args)
        # differs: the script silently loads an old best checkpoint from the folder
        if run_folder.in_use() and not args.overwrite:
            raise UserError(
                f"{run_folder.folder} already holds a run: continue it with --resume, replace it "
                "with --overwrite, or name another with --remark"
            )
        return args, run_folder, None
    if args.overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it: give one of them")
    if args.resume:
        checkpoint = read_checkpoint(args.resume)
        merge_flags(args, given, checkpoint, args.resume)
        run_folder = RunFolder(Path(args.resume).parent, args)
        if "LOG_DIR" in given and run_folder_path(args).resolve() != run_folder.folder.resolve():
            raise UserError(
                f"--LOG_DIR {args.LOG_DIR}: --resume {args.resume} continues in the checkpoint's "
                "own folder; leave --LOG_DIR out"
            )
        return args, run_folder, checkpoint
    run_folder = RunFolder(run_folder_path(args), args)
    if not run_folder.in_use():
        raise UserError(f"--resume: there is no run in {run_folder.folder} to continue")
    if not run_folder.last.exists():
        print(f"no epoch of {run_folder.folder} was finished: starting at epoch 0")
        return args, run_folder, None
    checkpoint = read_checkpoint(run_folder.last)
    merge_flags(args, given, checkpoint, run_folder.last)
    return args, run_folder, checkpoint


def merge_flags(args, given, checkpoint, path):
    """Continue with the flags that the run was started with."""
    needed = {"model_state_dict", "criterion_state_dict", "optimizer_state_dict",
              "scheduler_state_dict", "epoch", "args", "history"}  # fmt: skip
    if needed - checkpoint.keys():
        raise UserError(
            f"--resume {path}: this checkpoint cannot be continued, it lacks "
            f"{', '.join(sorted(needed - checkpoint.keys()))}; to start a run from its network use "
            f"--weights {path}"
        )
    for name, value in checkpoint["args"].items():
        if name not in given:
            setattr(args, name, value)
        elif name not in FREE_ON_RESUME and given[name] != value:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]}: the run of {path} was started with "
                f"{value}; leave the flag out, or start another run"
            )


def describe_process(argv, device):
    """What it takes to state this run again: the command, the versions, the machine."""
    argv = sys.argv[1:] if argv is None else argv
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(["python", "train.py", *argv]),
        "versions": {
            "python": platform.python_version(),
            **{name: sys.modules[name].__version__ for name in ("torch", "torchvision", "numpy")},
        },
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})",
    }


# --- wandb ----------------------------------------------------------------------------------


def wandb_mode(requested):
    """`auto` is online with an account and offline without one; nobody is ever asked for a key
    (differs: the script wants an account)."""
    if requested == "auto":
        return os.environ.get("WANDB_MODE") or ("online" if has_wandb_account() else "offline")
    if requested == "online" and not has_wandb_account():
        raise UserError(
            "--wandb online: no account on this machine; run `wandb login`, set WANDB_API_KEY, "
            "or use --wandb offline"
        )
    return requested


def has_wandb_account():
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_wandb(args, mode, folder, run_id, resumed):
    """A wandb run as a context manager; with mode `disabled`, None, and wandb is not imported."""
    if mode == "disabled":
        return contextlib.nullcontext()
    import wandb

    settings = {
        "project": f"{args.dataset}_DDML+PA", "name": folder.name, "dir": str(folder),
        "config": vars(args), "id": run_id, "resume": "allow" if resumed else None,
    }  # fmt: skip
    try:
        return wandb.init(mode=mode, **settings)
    except wandb.errors.Error as error:
        if args.wandb == "online":
            raise UserError(f"--wandb online: {error}; use --wandb offline") from error
        warn(f"wandb is not reachable, logging offline ({error})")
        return wandb.init(mode="offline", **settings)


# --- the program ----------------------------------------------------------------------------


def load_images(args):
    """(train, test) images, checked against the batch."""
    train = dataset.load(args.dataset, args.data_root, "train", train_transform(args.image_size))
    test = dataset.load(args.dataset, args.data_root, "test", test_transform(args.image_size))
    if args.batch_size > len(train):  # differs: the script trains on nothing, in silence
        raise UserError(
            f"--batch-size {args.batch_size}: larger than the {len(train)} training images of "
            f"{args.dataset}, so that no batch would be complete"
        )
    if args.IPC:
        classes, rest = divmod(args.batch_size, args.IPC)
        if rest or classes > train.num_classes:
            raise UserError(
                f"--IPC {args.IPC}: a batch of --batch-size {args.batch_size} cannot hold "
                f"{args.IPC} images of each of a whole number of the {train.num_classes} classes"
            )
    print(describe(f"{args.dataset} train", train))
    print(describe(f"{args.dataset} test", test), flush=True)
    return train, test


def main(argv=None):
    args, given = given_flags(build_parser(), argv)
    args, run_folder, checkpoint = open_run(args, given)
    first_epoch = checkpoint["epoch"] + 1 if checkpoint else 0
    history = checkpoint["history"] if checkpoint else []
    if first_epoch >= args.epochs:
        print(f"{run_folder.folder} is finished: {first_epoch} of {args.epochs} epochs are done")
        print(summary(history), end="")
        return
    if not args.disent and args.al + args.be + args.gam > 0:
        warn("--al, --be and --gam weigh nothing without --disent True: training the plain loss")
    mode = wandb_mode(args.wandb)
    device = choose_device(args.gpu_id)
    train, test = load_images(args)

    torch.manual_seed(args.seed)
    weights = None if checkpoint else args.weights
    model = create_model(args.model, args.embedding_size, args.disent, args.l2_norm, weights)
    model.to(device)
    criterion = build_criterion(args, train.num_classes).to(device)
    optimizer, scheduler = build_optimizer(args, model, criterion)
    if checkpoint:
        load_strictly(model, checkpoint["model_state_dict"], run_folder.last)
        load_strictly(criterion, checkpoint["criterion_state_dict"], run_folder.last)
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])

    batching = {"workers": args.workers, "device": device}
    trains = train_loader(train, args.batch_size, args.seed, images_per_class=args.IPC, **batching)
    tests = test_loader(test, args.batch_size, **batching)
    ks = dataset.ks(args.dataset)

    run_id = start_folder(run_folder, args, describe_process(argv, device), history)
    with start_wandb(args, mode, run_folder.folder, run_id, resumed=first_epoch > 0) as tracker:
        for epoch in range(first_epoch, args.epochs):
            start = time.perf_counter()
            prepare_epoch(model, epoch, args.warm, args.bn_freeze)
            losses = train_epoch(model, criterion, optimizer, trains, device, epoch, args.seed)
            if not math.isfinite(losses["loss"]):
                raise UserError(
                    f"epoch {epoch}: the loss is {losses['loss']}, this epoch is not saved; a "
                    "smaller --lr or another --seed may help"
                )
            images_per_second = len(trains) * args.batch_size / (time.perf_counter() - start)
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            recalls = evaluate(model, tests, device, ks)
            history.append({
                "epoch": epoch,
                "loss": losses["loss"],
                **{term: losses.get(term) for term in TERMS},
                "lr": lr,
                "seconds": time.perf_counter() - start,
                "images_per_second": images_per_second,
                **{f"R@{k}": 100 * recall for k, recall in recalls.items()},
            })  # fmt: skip
            run_folder.write_epoch({
                "model_state_dict": model.state_dict(),  # differs: the script saves this alone
                "criterion_state_dict": criterion.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "scheduler_state_dict": scheduler.state_dict(),
                "epoch": epoch,
                "seed": args.seed,
                "args": vars(args),
                "history": history,
            })  # fmt: skip
            print_epoch(history[-1])
            if tracker:
                fractions = {f"R@{k}": recall for k, recall in recalls.items()}
                tracker.log({"loss": losses["loss"], **fractions}, step=epoch)
    print(summary(history), end="")
    print(f"run folder: {run_folder.folder}")


def start_folder(run_folder, args, process, history):
    """Make the folder ready to be written to; returns the wandb run's id, one for a whole run."""
    try:
        run_folder.folder.mkdir(parents=True, exist_ok=True)
        if history:
            record = json.loads(run_folder.args.read_text())
            record["resumed"] = [*record.get("resumed", []), process]
        else:
            for file in run_folder.files:
                file.unlink(missing_ok=True)
            record = {**process, "flags": vars(args), "wandb_id": secrets.token_hex(4)}
    except OSError as error:
        raise UserError(f"{run_folder.folder}: {error.strerror or error}") from error
    write_json(run_folder.args, record)
    run_folder.write_metrics(history)
    return record["wandb_id"]


def print_epoch(record):
    recalls = "  ".join(f"{key} {value:.2f}" for key, value in recalls_of(record).items())
    print(
        f"epoch {record['epoch']}  loss {record['loss']:.4f}  {recalls}  "
        f"({record['seconds']:.1f} s, {record['images_per_second']:.0f} images/s)",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
