"""Where a run is written, what it is continued from, and what it takes to state it again."""

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from distributed import from_first, job, restarts, world
from flags import VERSION
from runs.checkpoint import (
    PARTS,
    by_class,
    bytes_needed,
    flags_to_continue_with,
    progress_of,
    require_parts,
)
from runs.folder import RunFolder, checkpoint_in
from runs.naming import deciding, difference, file_prefix, run_folder_path, settings
from runs.tracking import track
from storage import read_checkpoint
from utils import UserError, device_name, say, warn

KINDS = ("_last.pth", "_previous.pth", "_best.pth")


def open_run(parser, args, given):
    """(flags, RunFolder, checkpoint or None): where to write, and what to continue from."""
    folder = run_folder_path(args, parser)
    if restarts() and args.resume is None and stored(folder).get("job") == job():
        args.resume = ""  # what the processes before these have begun
    if len(os.fsencode(folder.name)) > 255:
        raise UserError(
            f"{folder.name}: too long for a folder's name; shorten --remark, or what the paths of "
            "--data-root and --weights end in"
        )
    if args.resume is not None:
        return continued_run(
            parser, args, given, Path(args.resume or find_run(args, given, folder))
        )
    run_folder = RunFolder(folder, file_prefix(args))
    # differs: the script silently loads an old best checkpoint from the folder
    if run_folder.in_use() and not args.overwrite:
        chosen, _ = settings(args, parser)
        differing = ", ".join(difference(chosen, stored_flags(folder)))
        raise UserError(
            f"{folder} already holds a run "
            + (f"with other flags ({differing}): " if differing else "of the same flags: continue "
               "it with --resume, ")
            + "replace it with --overwrite, or name another with --remark"
        )  # fmt: skip
    return args, run_folder, None


def open_on_first(parser, args, given):
    """open_run in the first process, which alone writes; RunFolder is None in the others. And
    whether the run is complete."""
    run_folder = whole = None

    def opened():
        nonlocal run_folder, whole
        found, run_folder, whole = open_run(parser, args, given)
        history = whole["history"] if whole else []
        sent = whole
        if whole and found.shard_proxies:  # of the proxies each will be given its part
            sent = by_class(whole, lambda x: x.to("meta"))
        return found, sent, run_folder.is_complete(history, found.epochs)

    args, sent, complete = from_first(opened)
    return args, run_folder, whole or sent, complete


def stored(folder):
    """A run's args.json; {} where that cannot be read."""
    try:
        return dict(json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def stored_flags(folder):
    flags = stored(folder).get("flags")
    return flags if isinstance(flags, dict) else {}


def find_run(args, given, folder):
    """What --resume without a path continues: the run of these flags, else the one in --LOG_DIR
    that was started with all of those given."""
    if RunFolder(folder, file_prefix(args)).in_use() or stored_flags(folder):
        return folder
    asked = {name: value for name, value in given.items() if name in deciding(args)}
    differences = {
        file.parent: difference(asked, flags)
        for file in sorted(Path(args.LOG_DIR).glob("logs_*/*/args.json"))
        if (flags := stored_flags(file.parent))
    }
    matching = [path for path, differing in differences.items() if not differing]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise UserError(
            f"--resume: {len(matching)} runs were started with these flags; name one of "
            f"{', '.join(map(str, matching))}"
        )
    near = ""
    if differences:
        path, differing = min(differences.items(), key=lambda item: len(item[1]))
        near = f"; the nearest, {path}, differs: {', '.join(differing)}"
    raise UserError(f"--resume: there is no run in {folder} to continue{near}")


def continued_run(parser, args, given, asked):
    """open_run for the run of a checkpoint or of a run folder, from the newest checkpoint in it."""
    if args.resume and "LOG_DIR" in given:
        raise UserError(
            f"--LOG_DIR {args.LOG_DIR}: --resume {args.resume} continues in the run's own folder; "
            "leave --LOG_DIR out"
        )
    of_a_run = asked.is_file() and asked.name.endswith(KINDS) and stored_flags(asked.parent)
    path, checkpoint = asked.parent if of_a_run else asked, None
    folder = path if path.is_dir() else path.parent
    if not path.is_dir():
        checkpoint = read_checkpoint(path)
        require_parts(checkpoint, path, {"args", "history"})
        args = flags_to_continue_with(parser, given, checkpoint["args"], path)
        run_folder = RunFolder(folder, file_prefix(args))
    elif any(path.glob("*.pth")):
        any_of_them = Path(checkpoint_in(path, ("last", "previous", "best")))
        run_folder = RunFolder(folder, any_of_them.name.rpartition("_")[0])
    else:
        if not stored_flags(folder):
            raise UserError(f"--resume {path}: there is no run in this folder to continue")
        args = flags_to_continue_with(parser, given, stored_flags(folder), folder)
        run_folder = RunFolder(folder, file_prefix(args))
        run_folder.newest_checkpoint()  # there is none, and if there were results that is an error
        say(f"nothing of {folder} was saved yet: starting at epoch 0")
        return args, run_folder, None
    run_folder.lock()
    newest = run_folder.newest_checkpoint()
    if newest and (not checkpoint or progress_of(newest[1]) > progress_of(checkpoint)):
        path, checkpoint = newest
    if path != asked and not asked.is_dir():
        say(f"continuing from {path}, the newest of the run of {asked}")
    require_parts(checkpoint, path, PARTS)
    args = flags_to_continue_with(parser, given, checkpoint["args"], path)
    args.resume = str(path)
    return args, run_folder, checkpoint


@contextlib.contextmanager
def recorded(run_folder, training, argv, mode, train, test, checkpoint):
    """In a `with`, the run's folder and its wandb run, which it gives; None without wandb, and of
    several processes in all but the first."""
    if not run_folder:
        yield
        return
    args = training.args
    description = run_folder.claim(args, new=checkpoint is None)
    run_folder.require_room(bytes_needed(training))
    run_id, process = description.get("wandb_id"), describe_process(argv, training.device)
    description = {**process, "flags": vars(args), "resumed": [], **description, "job": job()}
    if checkpoint:
        warn_of_other_bits(description, process)
        description["resumed"].append(process)
    counts = {split: {"images": len(images), "classes": len(images.classes)}
              for split, images in (("train", train), ("test", test)) if images}  # fmt: skip
    config = {**vars(args), **process, "data": counts}
    with track(args, mode, run_folder.folder, run_id, config, training.history) as wandb_run:
        description["wandb_id"] = wandb_run.id if wandb_run else run_id
        run_folder.start(description, training.history if checkpoint else None)
        yield wandb_run


def describe_process(argv, device):
    """What it takes to state this run again: the command, the versions, the machine."""
    argv = sys.argv[1:] if argv is None else argv
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "commit": commit.stdout.strip() if commit else "",  # none in an unpacked archive
        "command": shlex.join(["python", "train.py", *argv]),
        "versions": {
            "ddml": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{
                name: version(name)
                for name in ("torchvision", "timm", "pytorch-metric-learning", "numpy", "pillow")
            },
        },
        "device": device_name(device),
        "processes": world(),
        "threads": torch.get_num_threads(),
    }


def warn_of_other_bits(description, process):
    """Where a run is continued by other means than it was started with: args.json's, and now."""
    for what in ("versions", "device", "threads", "processes"):
        if description.get(what) != process[what]:
            warn(
                f"this run was started with {what} {description.get(what)} and continues with "
                f"{process[what]}: its numbers may differ in the last digits"
            )
