"""Where a run is written, what it continues from, and what is recorded of it."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch

from dataset.images import counts_of, trained_on, union
from distributed import from_rank_0, job, rank, restarts, world_size
from flags import VERSION
from runs.checkpoint import bytes_needed, flags_to_continue_with, require_parts
from runs.folder import NoFolder, RunFolder
from runs.naming import differences, file_prefix, run_folder_path, setting_name
from runs.results import is_finished
from runs.tracking import track, wandb_mode
from sharded import map_proxies
from storage import read_checkpoint
from utils import UserError, device_name, say, warn

ENDINGS = ("_last.pth", "_previous.pth", "_best.pth")  # of a run's checkpoints


def open_run(parser, args, given):
    """(flags, RunFolder, checkpoint or None): where to write, and what to continue from. Rank 0
    decides; the others get a NoFolder and, with --shard-proxies, no data of proxies."""
    return from_rank_0(partial(open_on_rank_0, parser, args, given), for_others)


def for_others(run):
    args, run_folder, checkpoint = run
    if checkpoint and args.shard_proxies:
        checkpoint = map_proxies(checkpoint, lambda x: x.to("meta"))
    return args, NoFolder(run_folder.complete), checkpoint


def open_on_rank_0(parser, args, given):
    folder = run_folder_path(args, parser)
    if len(os.fsencode(folder.name)) > 255:
        raise UserError(f"{folder.name}: too long for a folder's name; shorten --remark, or what "
                        "the paths of --data-root and --weights end in")  # fmt: skip
    if args.resume is not None or restarts() and stored(folder).get("job") == job():
        return continued_run(parser, args, given, Path(args.resume or folder))
    run_folder = RunFolder(folder, file_prefix(args))
    # differs: the script silently loads an old best checkpoint from the folder
    if run_folder.in_use() and not args.overwrite:
        differing = ", ".join(differences(args, parser, stored(folder).get("flags", {})))
        found = (f"with other flags ({differing}): " if differing else
                 "of the same flags: continue it with --resume, ")  # fmt: skip
        raise UserError(f"{folder} already holds a run {found}replace it with --overwrite, or "
                        "name another with --remark")  # fmt: skip
    return args, run_folder, None


def stored(folder):
    """A run's args.json; {} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "args.json").read_text())
    return {}


def continued_run(parser, args, given, path):
    """As open_on_rank_0, for --resume; `path`: the run's folder, or a checkpoint in it."""
    if args.resume and "LOG_DIR" in given:
        raise UserError(f"--LOG_DIR {args.LOG_DIR}: --resume {args.resume} continues in the run's "
                        "own folder; leave --LOG_DIR out")  # fmt: skip
    if path.is_file() and not path.name.endswith(ENDINGS):
        raise UserError(f"--resume {path}: not a run's checkpoint, whose name ends in "
                        f"{' or '.join(ENDINGS)}; evaluate.py takes it, and --weights {path} "
                        "starts a new run from its network")  # fmt: skip
    folder = path.parent if path.is_file() else path
    flags = stored(folder).get("flags")
    saved = [path] if path.is_file() else [*folder.glob("*_last.pth")]
    saved = saved or [*folder.glob("*_previous.pth")]
    if not flags and not saved:
        raise UserError(f"--resume: there is no run in {path} to continue; name its folder with "
                        "--resume FOLDER, or leave the flag out")  # fmt: skip
    if saved:
        prefix = saved[0].name.rpartition("_")[0]
    else:
        args = flags_to_continue_with(parser, given, flags, folder)
        prefix = file_prefix(args)
    run_folder = RunFolder(folder, prefix)
    run_folder.lock()
    source, checkpoint = run_folder.newest_checkpoint()
    if not checkpoint:
        say(f"nothing of {folder} was saved yet: starting at epoch 0")
        return args, run_folder, None
    if path not in (folder, source):
        say(f"continuing from {source}, the newest of the run of {path}")
    require_parts(checkpoint, source)
    args = flags_to_continue_with(parser, given, checkpoint["args"], source)
    if checkpoint["partial"] and len(checkpoint["history"]) >= args.epochs:
        raise UserError(f"--epochs {args.epochs}: the run of {source} has begun the next one; "
                        "continue it with more")  # fmt: skip
    args.resume = str(source)
    # the last file of a run; runs from before it have no results.json
    drawn = run_folder.curves.exists() and run_folder.summary.exists()
    run_folder.complete = drawn and is_finished(checkpoint["history"], args)
    return args, run_folder, checkpoint


def left_out_before(run_folder, checkpoint):
    """What a run that is continued has left out by --skip-unreadable; None of a new one."""
    return from_rank_0(lambda: stored(run_folder.folder).get("left_out")) if checkpoint else None


@contextlib.contextmanager
def record(parser, run_folder, training, images, left_out, argv, checkpoint):
    """In a `with`: the run folder and the wandb run are written. Gives the wandb run; None without
    wandb and on ranks above 0."""
    if rank():
        yield
        return
    args, mode = training.args, wandb_mode(training.args.wandb)
    description = run_folder.claim(args, new=checkpoint is None)
    run_folder.require_room(bytes_needed(training))
    training.trained_on = training.trained_on or all_trained_on(args, images["train"])
    run_id, process = description.get("wandb_id"), describe_process(argv, training.device)
    description = {"resumed": [], **(description or process), "flags": vars(args), "job": job(),
                   "left_out": left_out}  # fmt: skip
    if checkpoint:
        warn_of_changes(description, process)
        description["resumed"].append(process)
    counts = {split: {"images": len(each), "classes": len(each.classes)}
              for split, each in images.items()}  # fmt: skip
    config = {**vars(args), **process, "data": counts}
    setting = setting_name(args, parser)
    folder, history = run_folder.folder, training.history
    with track(args, mode, setting, folder, run_id, config, history) as wandb_run:
        description["wandb_id"] = wandb_run.id if wandb_run else run_id
        run_folder.start(description, training, new=checkpoint is None)
        yield wandb_run
    run_folder.file_lock.release(force=True)


def all_trained_on(args, images):
    """What a run trains on, and what the network of --weights was trained on before."""
    parts = [trained_on(images)]
    if os.path.isfile(args.weights):
        parts += filter(None, [read_checkpoint(args.weights).get("trained_on")])
    return union(parts)


@cache
def git(*command):
    """What a git command prints about this repository; "" without git or a repository."""
    here = ["git", "-C", Path(__file__).parent, *command]
    with contextlib.suppress(OSError):
        return subprocess.run(here, capture_output=True, text=True).stdout.strip()
    return ""


def describe_process(argv, device):
    """What is needed to repeat this run: the command, the versions, the machine."""
    argv = sys.argv[1:] if argv is None else argv
    packages = ("torchvision", "timm", "pytorch-metric-learning", "numpy", "pillow")
    versions = {"ddml": VERSION, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", ":/*.py")),
        "command": shlex.join(["python", "train.py", *argv]),
        "versions": versions | {name: version(name) for name in packages},
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def facts_of(images, device, known=None):
    """Behind the numbers: counts and digest of each split, how many images are in `known` (a
    trained_on), commit, device."""
    process, names = describe_process([], device), ("commit", "uncommitted_changes", "device")
    return {"images": counts_of(images, known), **{name: process[name] for name in names}}


def warn_of_changes(description, process):
    """Warn if the machine or the code is not the one that the run was started with."""
    for what in ("commit", "uncommitted_changes", "versions", "device", "threads", "processes"):
        if description.get(what, process[what]) != process[what]:
            warn(f"this run was started with {what} {description[what]} and continues with "
                 f"{process[what]}: its numbers may differ in the last digits")  # fmt: skip
