"""Where a run is written, what it is continued from, and what it takes to state it again."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from runs.checkpoint import flags_to_continue_with, progress_of
from runs.folder import RunFolder, run_folder_path
from storage import read_checkpoint
from utils import UserError, warn


def open_run(parser, args, given):
    """(flags, RunFolder, checkpoint or None): where to write, and what to continue from."""
    if len(os.fsencode(run_folder_path(args).name)) > 255:
        raise UserError(f"--remark {args.remark}: too long, it ends a folder's name")
    if args.resume:
        return open_checkpoint(parser, args, given)
    run_folder = RunFolder(run_folder_path(args), args)
    if args.resume is None:
        # differs: the script silently loads an old best checkpoint from the folder
        if run_folder.in_use() and not args.overwrite:
            raise UserError(
                f"{run_folder.folder} already holds a run: continue it with --resume, replace it "
                "with --overwrite, or name another with --remark"
            )
        return args, run_folder, None
    if not any(file.exists() for file in run_folder.files):
        raise UserError(f"--resume: there is no run in {run_folder.folder} to continue")
    run_folder.lock()
    found = run_folder.newest_checkpoint()
    if found is None:
        print(f"nothing of {run_folder.folder} was saved yet: starting at epoch 0")
        return args, run_folder, None
    path, checkpoint = found
    return flags_to_continue_with(parser, given, checkpoint, path), run_folder, checkpoint


def open_checkpoint(parser, args, given):
    """open_run for `--resume PATH`: the run that a checkpoint is of, from its newest one."""
    try:
        checkpoint = read_checkpoint(args.resume)
    except UserError as error:
        previous = args.resume.replace("_last.pth", "_previous.pth")
        if previous == args.resume or not Path(previous).is_file():
            raise
        raise UserError(f"{error}; the one before it is {previous}") from error
    args = flags_to_continue_with(parser, given, checkpoint, args.resume)
    run_folder = RunFolder(Path(args.resume).parent, args)
    if "LOG_DIR" in given and run_folder_path(args).resolve() != run_folder.folder.resolve():
        raise UserError(
            f"--LOG_DIR {args.LOG_DIR}: --resume {args.resume} continues in the checkpoint's "
            "own folder; leave --LOG_DIR out"
        )
    run_folder.lock()
    newest = run_folder.newest_checkpoint()
    if newest and progress_of(newest[1]) > progress_of(checkpoint):
        print(f"{args.resume} is not the newest of its run: continuing from {newest[0]}")
        path, checkpoint = newest
        args = flags_to_continue_with(parser, given, checkpoint, path)
    return args, run_folder, checkpoint


def describe_process(argv, device):
    """What it takes to state this run again: the command, the versions, the machine."""
    argv = sys.argv[1:] if argv is None else argv
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(["python", "train.py", *argv]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in
               ("torchvision", "timm", "pytorch-metric-learning", "numpy", "pillow")},
        },
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def warn_of_other_bits(description, process):
    """Where a run is continued by other means than it was started with: args.json's, and now."""
    for what in ("versions", "device", "threads"):
        if description.get(what) != process[what]:
            warn(
                f"this run was started with {what} {description.get(what)} and continues with "
                f"{process[what]}: its numbers may differ in the last digits"
            )
