"""Train an embedding network with Proxy-Anchor and DDML; Recall@K after every epoch.

The flags are the published script's; README.md has its three commands.
"""

import math
import os
import shlex
import time

import dataset
from cli import (
    MODELS,
    Interrupted,
    Parser,
    Stop,
    UserError,
    at_least,
    boolean,
    check_flags,
    given_flags,
    image_size,
    name_part,
    progress,
    run,
    warn,
)

OPTIMIZERS = {  # classes of torch.optim, and what the published script gives them
    "sgd": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {}),
    "rmsprop": ("RMSprop", {"alpha": 0.9, "momentum": 0.9}),
    "adamw": ("AdamW", {}),
}


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cub", type=dataset.canonical_name, help="cub, car, SOP, demo")
    add("--data-root", default="./data", help="folder of the extracted data sets")
    add("--image-size", default=224, type=image_size, help="pixels; tested at 256/224 of it")
    add("--batch-size", default=180, type=at_least(1), help="B")
    add("--IPC", type=at_least(1), help="balanced batches: this many images of each class")
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    add("--cache", default="none", choices=["none", "ram", "disk"],
        help="keep decoded images: in memory, or below --data-root for later runs")  # fmt: skip

    add = parser.add_argument_group("network").add_argument
    add("--model", default="bn_inception", choices=MODELS)
    add("--embedding-size", default=512, type=at_least(1, most=2**13), help="d")
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
    add("--seed", default=1, type=at_least(0, most=2**63))
    add("--gpu-id", default=0, type=at_least(-1), help="-1: all GPUs (not supported yet)")
    add("--deterministic", default=False, const=True, nargs="?", type=boolean,
        help="the same bits each time on CUDA too, at some cost in speed")  # fmt: skip

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


if __name__ == "__main__":
    check_flags(build_parser)

import torch
from torch import nn
from torch.nn.utils import clip_grad_value_, get_total_norm

from dataset.cache import open_cache
from dataset.images import digest_of_names
from dataset.loader import batches, test_loader, train_loader
from dataset.transforms import test_transform, train_transform
from evaluate import describe, evaluate
from losses import DDML, ProxyAnchor
from net import create_model, place
from net.weights import load_strictly
from runs import describe_process, open_run, recalls_of, restore, summary, warn_of_other_bits
from tracking import track, wandb_mode
from utils import choose_device, generator

TERMS = ("metric", "agnostic", "specific", "split")
CLIP_VALUE = 10
PROXY_LR_FACTOR = 100
NOISE = 2  # stream of random numbers, beside the loader's
FETCH_EVERY = 50  # steps between two looks at the losses, each of which waits for the device


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
    name, settings = OPTIMIZERS[args.optimizer]
    optimizer = getattr(torch.optim, name)(
        groups, lr=args.lr, weight_decay=args.weight_decay, **settings
    )
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
    """One step; returns {"loss", each term, "gradient" (its largest entry): detached scalar on the
    device}. Where the loss or the gradient is not finite, the gradient is made zero."""
    output = model(images)
    if model.disent:
        loss, terms = criterion(*output, labels, noise)
    else:
        loss = criterion(output, labels)
        terms = {"metric": loss}
    optimizer.zero_grad()
    loss.backward()
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    largest = get_total_norm(gradients, math.inf)
    unusable = ~(loss + largest).isfinite()
    for gradient in gradients:
        gradient.masked_fill_(unusable, 0)  # decided on the device: nobody waits for it
    clip_grad_value_(model.parameters(), CLIP_VALUE)
    clip_grad_value_(criterion.parameters(), CLIP_VALUE)
    optimizer.step()
    values = {"loss": loss, **terms, "gradient": largest}
    return {name: value.detach() for name, value in values.items()}


class StepLog:
    """How far an epoch has come. Losses stay on the device until `fetch` waits for it; `seconds`
    are those spent waiting for data, and in steps."""

    def __init__(self, epoch, step=0, totals=None, seconds=None):
        self.epoch, self.step, self.totals = epoch, step, totals or {}
        self.seconds = seconds or {"data": 0.0, "step": 0.0}
        self.pending, self.clock = [], time.perf_counter()

    def add(self, values):
        self.pending.append(values)
        self.step += 1

    def tick(self, what):
        """Book the time since the last tick."""
        now = time.perf_counter()
        self.seconds[what] += now - self.clock
        self.clock = now

    def fetch(self):
        """Add up what is pending. Raises FloatingPointError where a value is not finite."""
        if not self.pending:
            return
        names = list(self.pending[0])
        rows = torch.stack([torch.stack(list(row.values())).double() for row in self.pending])
        first, self.pending = self.step - len(rows), []
        for step, row in enumerate(rows.tolist(), start=first):
            for name, value in zip(names, row):
                if not math.isfinite(value):
                    raise FloatingPointError(step, name)
                self.totals[name] = self.totals.get(name, 0.0) + value


def loss_noise(seed, epoch, step, shape, device):
    """The two samples' noise [2, B, d] of a step: drawn on the CPU, the same on every device."""
    noise = torch.randn(2, *shape, generator=generator(seed, NOISE, epoch, step))
    if device.type == "cuda":
        noise = noise.pin_memory()
    return noise.to(device, non_blocking=True)


def train_epoch(training, loader, log, after_step):
    """The steps of an epoch from `log.step` on; `after_step()` follows each of them."""
    model, device, seed = training.model, training.device, training.args.seed
    loader.batch_sampler.set_epoch(log.epoch, log.step)
    steps = progress(batches(loader, device), len(loader), f"epoch {log.epoch}")
    log.clock = time.perf_counter()
    for images, labels in steps:
        log.tick("data")
        noise = None
        if model.disent:
            shape = (len(labels), model.embedding_size)
            noise = loss_noise(seed, log.epoch, log.step, shape, device)
        log.add(train_step(model, training.criterion, training.optimizer, images, labels, noise))
        after_step()
        log.tick("step")


class Training:
    """What an epoch changes and a checkpoint holds."""

    def __init__(self, args, num_classes, device, weights, data=None):
        torch.manual_seed(args.seed)
        self.args, self.device, self.data, self.history = args, device, data, []
        self.model = place(
            create_model(args.model, args.embedding_size, args.disent, args.l2_norm, weights),
            device,
        )
        self.criterion = build_criterion(args, num_classes).to(device)
        self.optimizer, self.scheduler = build_optimizer(args, self.model, self.criterion)

    def state(self, log=None):
        """A checkpoint: of a finished epoch, or with `log` of the one that it has begun."""
        self.require_finite()
        partial = log and {"step": log.step, "totals": log.totals, "seconds": log.seconds}
        return {
            "model_state_dict": self.model.state_dict(),  # differs: the script saves this alone
            "criterion_state_dict": self.criterion.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "epoch": log.epoch if log else len(self.history) - 1,
            "partial": partial,
            "args": vars(self.args),
            "history": self.history,
            "data": self.data,  # which images: with other ones it is another run
        }

    def require_finite(self):
        """An update can overflow where loss and gradient did not; that is not to be saved."""
        modules, moments = (self.model, self.criterion), self.optimizer.state.values()
        tensors = [tensor for module in modules for tensor in module.state_dict().values()]
        tensors += [tensor for state in moments for tensor in state.values()]
        finite = [tensor.isfinite().all().to(self.device) for tensor in tensors]
        if not torch.stack(finite).all():  # one wait for the device
            raise UserError(
                "the weights or the optimiser's state are no longer finite; nothing of this was "
                "saved, and the last checkpoint is good. A smaller --lr or --weight-decay may help"
            )

    def load(self, checkpoint, path):
        if checkpoint["data"] != self.data:
            raise UserError(
                f"{path}: the run was started with other images than those in --data-root "
                f"{self.args.data_root}, so it cannot be continued with them"
            )
        load_strictly(self.model, checkpoint["model_state_dict"], path)
        load_strictly(self.criterion, checkpoint["criterion_state_dict"], path)
        restore(self.optimizer, self.scheduler, checkpoint, path)
        self.history = checkpoint["history"]


def run_epoch(training, trains, tests, log, run_folder, stop):
    """Train what is left of an epoch, evaluate, save; the epoch's record. A signal interrupts the
    first two: what is done is saved before Interrupted goes on."""
    args = training.args

    def fetch():
        try:
            log.fetch()
        except FloatingPointError as error:
            step, term = error.args
            files = ", ".join(trains.batch_sampler.files(log.epoch, step))
            raise UserError(
                f"epoch {log.epoch}, step {step}: the {term} is not finite; it was neither "
                f"applied nor saved, and the last checkpoint is good. A smaller --lr may help. "
                f"Files of the batch: {files}"
            ) from error

    def save():
        fetch()
        run_folder.save(training.state(log))

    def after_step():
        stop.check()
        if args.checkpoint_every and log.step % args.checkpoint_every == 0:
            save()
        elif log.step % FETCH_EVERY == 0:
            fetch()

    def finish(recalls, evaluated):
        trained = sum(log.seconds.values())
        training.history.append({
            "epoch": log.epoch,
            **{name: log.totals[name] / len(trains) if name in log.totals else None
               for name in ("loss", *TERMS)},
            "lr": training.scheduler.get_last_lr()[0],
            "seconds": trained + evaluated,
            **{f"seconds_{what}": seconds for what, seconds in log.seconds.items()},
            "seconds_eval": evaluated,
            "images_per_second": log.step * args.batch_size / max(trained, 1e-9),
            **{f"R@{k}": 100 * recall for k, recall in recalls.items()},
        })  # fmt: skip
        training.scheduler.step()
        run_folder.save_epoch(training.state())

    prepare_epoch(training.model, log.epoch, args.warm, args.bn_freeze)
    try:
        with stop.deferred():
            train_epoch(training, trains, log, after_step)
            fetch()
            log.tick("step")  # on a GPU the steps that are queued end with the fetch
        started = time.perf_counter()
        recalls = evaluate(training.model, tests, training.device, dataset.ks(args.dataset))
        with stop.deferred():
            finish(recalls, time.perf_counter() - started)
    except Interrupted:
        if len(training.history) == log.epoch:  # else the epoch is finished, and saved
            save()
        raise
    return training.history[-1]


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
    if args.cache != "none":
        paths = [*train.paths, *test.paths]
        read = open_cache(args.cache, args.dataset, paths, args.data_root, args.workers)
        train.read = test.read = read
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
    if not args.disent and args.al + args.be + args.gam > 0:
        warn("--al, --be and --gam weigh nothing without --disent True: training the plain loss")
    mode = wandb_mode(args.wandb)
    device = choose_device(args.gpu_id)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True, warn_only=True)
    train, test = load_images(args)

    weights = None if checkpoint else args.weights
    training = Training(args, train.num_classes, device, weights, digest_of_names(train, test))
    log = StepLog(done)
    if checkpoint:
        training.load(checkpoint, args.resume or run_folder.folder)
        log = StepLog(done, **(checkpoint["partial"] or {}))
    batching = {"workers": args.workers, "device": device}
    trains = train_loader(train, args.batch_size, args.seed, images_per_class=args.IPC, **batching)
    tests = test_loader(test, args.batch_size, **batching)
    if log.step > len(trains):
        raise UserError(f"{args.resume or run_folder.folder}: step {log.step} is beyond the epoch")

    record = run_folder.claim(args, new=checkpoint is None)
    run_id = record.get("wandb_id")
    process = describe_process(argv, device)
    with Stop() as stop, track(args, mode, run_folder.folder, run_id) as wandb_run:
        record = {**process, "flags": vars(args), "resumed": [], **record}
        if checkpoint:
            warn_of_other_bits(record, process)
            record["resumed"].append(process)
        record["wandb_id"] = wandb_run.id if wandb_run else run_id
        try:
            with stop.deferred():
                run_folder.start(record, training.history if checkpoint else None)
            while log.epoch < args.epochs:
                record = run_epoch(training, trains, tests, log, run_folder, stop)
                print_epoch(record)
                if wandb_run:
                    fractions = {key: value / 100 for key, value in recalls_of(record).items()}
                    wandb_run.log({"loss": record["loss"], **fractions}, step=log.epoch)
                log = StepLog(log.epoch + 1)
        except Interrupted as interrupted:
            if run_folder.last.exists():
                last = shlex.quote(str(run_folder.last))
                interrupted.note = f"continue with: python train.py --resume {last}"
            raise
    print(summary(training.history), end="")
    print(f"run folder: {run_folder.folder}")


def print_epoch(record):
    recalls = "  ".join(f"{key} {value:.2f}" for key, value in recalls_of(record).items())
    print(
        f"epoch {record['epoch']}  loss {record['loss']:.4f}  {recalls}  "
        f"({record['seconds']:.1f} s: data {record['seconds_data']:.1f}, steps "
        f"{record['seconds_step']:.1f}, evaluation {record['seconds_eval']:.1f}; "
        f"{record['images_per_second']:.0f} images/s)",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
