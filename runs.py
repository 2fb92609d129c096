"""A run's folder: its checkpoints, its results, and what is continued after an interruption."""

import fcntl
import json
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path

import torch

from cli import UserError, parse_stored, warn
from utils import read_checkpoint, temporary_of, write_atomically, write_checkpoint, write_json

# The optimiser of a continued run has made its steps in another process.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

# Flags that may differ when a run is continued: they do not change what is computed.
FREE_ON_RESUME = {"epochs", "workers", "cache", "gpu_id", "data_root", "LOG_DIR", "wandb",
                  "resume", "overwrite", "checkpoint_every"}  # fmt: skip
PARTS = {"model_state_dict", "criterion_state_dict", "optimizer_state_dict",
         "scheduler_state_dict", "epoch", "partial", "args", "history", "data"}  # fmt: skip


REPLACED = ".replaced"  # ends the names of a run's files that --overwrite has put aside


class RunFolder:
    """Where a run's files are; every file is replaced whole, never written in place."""

    def __init__(self, folder, args):
        self.folder = Path(folder)
        name = f"{args.dataset}_{args.model}"
        self.best = self.folder / f"{name}_best.pth"
        self.last = self.folder / f"{name}_last.pth"
        self.previous = self.folder / f"{name}_previous.pth"
        self.results = self.folder / f"{name}_best_results.txt"
        self.metrics = self.folder / "metrics.jsonl"
        self.args = self.folder / "args.json"
        self.files = [self.args, self.metrics, self.results, self.best, self.last, self.previous]
        self.lock_file = None

    def in_use(self):
        """Whether there is something to lose: a run that saved nothing may be started again."""
        return any(path.exists() for path in (self.best, self.last, self.previous, self.results))

    def lock(self):
        """Keep other processes out for as long as this one lives, however it ends."""
        try:
            if self.lock_file is None:
                self.lock_file = open(self.folder / ".lock", "w")
            # a record lock, which the loader's workers do not inherit
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder} is in use by another process; wait for it, or give this run a "
                "--remark of its own"
            ) from None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror})") from error

    def claim(self, args, new):
        """Make and lock the folder; returns what args.json says, {} for a new run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            for file in self.files:
                temporary_of(file).unlink(missing_ok=True)
            if new and self.in_use() and not args.overwrite:
                raise UserError(f"{self.folder}: another process has just finished this run")
            record = {} if new or not self.args.exists() else json.loads(self.args.read_text())
            if not isinstance(record, dict) or not isinstance(record.get("resumed", []), list):
                raise ValueError("not what we write")
            return record
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}") from error
        except (ValueError, RecursionError):
            raise UserError(f"{self.args}: damaged; delete it, --resume writes a new one") from None

    def start(self, record, history):
        """Write args.json and the results so far. A new run (history None) first puts the files of
        another aside, to be removed when it has saved something itself. A run that saved nothing
        is not put in the place of what it put aside."""
        if history is None and self.in_use():
            for file in filter(Path.exists, self.files):
                put_aside(file, REPLACED)
        write_json(self.args, record)
        self.write_results(history or [])

    def write_results(self, history):
        if history:
            write_atomically(self.results, summary(history).encode())
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(self.metrics, lines.encode())

    def save(self, checkpoint):
        """Save the state that --resume continues from; the one before is kept."""
        write_checkpoint(self.last, checkpoint, keep=self.previous)
        for file in self.files:
            Path(f"{file}{REPLACED}").unlink(missing_ok=True)

    def save_epoch(self, checkpoint):
        """Save a finished epoch. What --resume reads comes last, so that an interrupted save is
        an epoch that never happened."""
        history = checkpoint["history"]
        if best_record(history) is history[-1]:
            write_checkpoint(self.best, checkpoint)
        self.write_results(history)
        self.save(checkpoint)

    def newest_checkpoint(self):
        """(path, checkpoint) of the newest that is not damaged, or None if there is none at all."""
        existing = [path for path in (self.last, self.previous, self.best) if path.exists()]
        for path in existing:
            try:
                checkpoint = read_checkpoint(path)
            except UserError as error:
                warn(f"{error}; trying the checkpoint before it")
                continue
            if path != self.last and self.last.exists():
                # else the next save would keep the damaged one, in the place of the good one
                put_aside(self.last, ".damaged")
            return path, checkpoint
        if self.in_use():
            raise UserError(f"--resume: no checkpoint in {self.folder} can be read")
        return None


def put_aside(file, suffix):
    try:
        os.replace(file, f"{file}{suffix}")
    except OSError as error:
        raise UserError(f"{file}: cannot be renamed to {file}{suffix} ({error.strerror})") from None


def run_folder_path(args):
    seed = "" if args.seed == 1 else f"_seed{args.seed}"
    name = (
        f"{args.model}_{args.loss}_embedding{args.embedding_size}"
        f"_al{args.al}_be{args.be}_gam{args.gam}_{args.optimizer}_lr{args.lr}"
        f"_batch{args.batch_size}{seed}{args.remark}"
    )
    return Path(args.LOG_DIR, f"logs_{args.dataset}", name)


# --- results --------------------------------------------------------------------------------


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


# --- starting and continuing ----------------------------------------------------------------


def open_run(parser, args, given):
    """(flags, RunFolder, checkpoint or None): where to write, and what to continue from."""
    if len(os.fsencode(run_folder_path(args).name)) > 255:
        raise UserError(f"--remark {args.remark}: too long, it ends a folder's name")
    if args.resume is None:
        run_folder = RunFolder(run_folder_path(args), args)
        # differs: the script silently loads an old best checkpoint from the folder
        if run_folder.in_use() and not args.overwrite:
            raise UserError(
                f"{run_folder.folder} already holds a run: continue it with --resume, replace it "
                "with --overwrite, or name another with --remark"
            )
        return args, run_folder, None
    if args.resume:
        try:
            checkpoint = read_checkpoint(args.resume)
        except UserError as error:
            previous = args.resume.replace("_last.pth", "_previous.pth")
            if previous == args.resume or not Path(previous).is_file():
                raise
            raise UserError(f"{error}; the one before it is {previous}") from error
        args = merge_flags(parser, args, given, checkpoint, args.resume)
        run_folder = RunFolder(Path(args.resume).parent, args)
        if "LOG_DIR" in given and run_folder_path(args).resolve() != run_folder.folder.resolve():
            raise UserError(
                f"--LOG_DIR {args.LOG_DIR}: --resume {args.resume} continues in the checkpoint's "
                "own folder; leave --LOG_DIR out"
            )
        run_folder.lock()
        newest = run_folder.newest_checkpoint()
        if newest:
            newest_args = merge_flags(parser, args, given, newest[1], newest[0])
            if progress_of(newest[1]) > progress_of(checkpoint):
                print(f"{args.resume} is not the newest of its run: continuing from {newest[0]}")
                return newest_args, run_folder, newest[1]
        return args, run_folder, checkpoint
    run_folder = RunFolder(run_folder_path(args), args)
    if not any(file.exists() for file in run_folder.files):
        raise UserError(f"--resume: there is no run in {run_folder.folder} to continue")
    run_folder.lock()
    found = run_folder.newest_checkpoint()
    if found is None:
        print(f"nothing of {run_folder.folder} was saved yet: starting at epoch 0")
        return args, run_folder, None
    path, checkpoint = found
    return merge_flags(parser, args, given, checkpoint, path), run_folder, checkpoint


def merge_flags(parser, args, given, checkpoint, path):
    """The flags to continue with: those that the run was started with, and the free ones given."""
    if PARTS - checkpoint.keys():
        raise UserError(
            f"--resume {path}: this checkpoint cannot be continued, it lacks "
            f"{', '.join(sorted(PARTS - checkpoint.keys()))}; to start a run from its network use "
            f"--weights {path}"
        )
    check_state(checkpoint, path)
    stored = parse_stored(parser, checkpoint["args"], path)
    for name, value in given.items():
        if name not in FREE_ON_RESUME and getattr(stored, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run of {path} was started with "
                f"{getattr(stored, name)}; leave the flag out, or start another run"
            )
        setattr(stored, name, value)
    return stored


def progress_of(checkpoint):
    """Orders the checkpoints of a run."""
    partial = checkpoint["partial"]
    return len(checkpoint["history"]), partial["step"] if partial else 0


def check_state(checkpoint, path):
    """Refuse what no run of ours has written, before anything is computed from it."""
    epoch, partial, history = checkpoint["epoch"], checkpoint["partial"], checkpoint["history"]

    def numbers(record, or_none=False):
        return isinstance(record, dict) and all(
            isinstance(name, str)
            and (or_none if value is None else type(value) in (int, float) and abs(value) < 1e300)
            for name, value in record.items()
        )

    sound = (
        type(epoch) is int
        and isinstance(history, list)
        and len(history) == epoch + (partial is None)
        and all(
            numbers(record, or_none=True)
            and record.get("epoch") == i
            and "R@1" in record
            and None not in recalls_of(record).values()
            for i, record in enumerate(history)
        )
        and isinstance(checkpoint["args"], dict)
    )
    if partial is not None:
        sound = (
            sound
            and isinstance(partial, dict)
            and type(partial.get("step")) is int
            and partial["step"] >= 0
            and numbers(partial.get("totals"))
            and (partial["step"] == 0 or "loss" in partial["totals"])
            and numbers(partial.get("seconds"))
            and partial["seconds"].keys() == {"data", "step"}
        )
    if not sound:
        raise UserError(f"{path}: its epoch, partial, history or args are not a training run's")


def restore(optimizer, scheduler, checkpoint, path):
    """Step the scheduler as far as the run has come and load the optimiser's tensors. What the
    flags determine, such as learning rates, is not taken from the file, but has to agree."""
    for _ in checkpoint["history"]:
        scheduler.step()
    groups = optimizer.state_dict()["param_groups"]
    try:
        stored = checkpoint["optimizer_state_dict"]
        require_agreement(scheduler.state_dict(), checkpoint["scheduler_state_dict"])
        for ours, theirs in zip(groups, stored["param_groups"], strict=True):
            require_agreement(ours, theirs)
        require_tensors(optimizer, stored["state"])
        optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not this network's optimiser or scheduler ({error})") from error


def require_agreement(ours, theirs):
    for name in ours.keys() & theirs.keys():  # another version of torch may have others too
        if repr(ours[name]) != repr(theirs[name]):
            raise ValueError(f"{name} is {theirs[name]!r}, not {ours[name]!r}")


def require_tensors(optimizer, state):
    """Refuse a `state` {parameter's number: {name: tensor}} that `optimizer` has not written."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    like = state_after_a_step(optimizer)
    for number, tensors in state.items():
        if number not in range(len(parameters)):
            raise ValueError(f"there is no parameter {number}")
        if tensors.keys() != like.keys():
            raise ValueError(f"it has {', '.join(tensors)}, not {', '.join(like)}")
        for name, tensor in tensors.items():
            shape = parameters[number].shape if like[name].dim() else ()
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {shape}")
            if tensor.layout != torch.strided or 0 in tensor.stride():
                raise ValueError(f"{name} is not an ordinary tensor")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")
            if like[name] >= 0 > tensor.min():  # a count or a mean of squares
                raise ValueError(f"{name} is negative")


def state_after_a_step(optimizer):
    """{name: tensor} that an optimiser of this kind keeps of a parameter [1] of gradient -1."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = -torch.ones(1)
    scratch = type(optimizer)([parameter])
    scratch.param_groups[0].update({**optimizer.param_groups[0], "params": [parameter]})
    scratch.step()
    return scratch.state[parameter]


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
        "threads": torch.get_num_threads(),
    }


def warn_of_other_bits(record, process):
    """Where a run is continued by other means than it was started with: `record` is args.json's."""
    for what in ("versions", "device", "threads"):
        if record.get(what) != process[what]:
            warn(
                f"this run was started with {what} {record.get(what)} and continues with "
                f"{process[what]}: its numbers may differ in the last digits"
            )
