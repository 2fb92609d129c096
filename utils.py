"""What every script shares: user errors, seeded generators, files that cannot be torn."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; `run` prints it as one line and exits with status 2."""


def run(main):
    """Call `main` as a script: user errors become one line, our own bugs keep their traceback."""
    try:
        status = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def plural(count, word):
    """`1 class`, `2,000 images`."""
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}{'es' if word[-1] == 's' else 's'}"
    return f"{count:,} {word if count == 1 else many}"


def progress(iterable, total, label):
    """A tqdm bar on a terminal; elsewhere a plain line every half minute."""
    if sys.stderr.isatty():
        yield from tqdm(iterable, label, total, leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that knows no abbreviated flags."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def given_flags(parser, argv):
    """All flags as a namespace, and {name: value} of those that the command line gives."""
    args = parser.parse_args(argv)
    unset = object()
    absent = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    parsed = vars(parser.parse_args(argv, absent))
    return args, {name: value for name, value in parsed.items() if value is not unset}


def boolean(text):
    """argparse type: true/false, 1/0, yes/no in any case."""
    # differs: `bool("False")`, the published type, is True
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise ValueError(text) from None  # argparse names the flag and the value


def at_least(low, kind=int):
    """argparse type: a finite number no smaller than `low`."""

    def parse(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise ValueError(text)
        return value

    parse.__name__ = f"number (at least {low})"
    return parse


def image_size(text):
    """argparse type: BN-Inception halves its maps five times and joins them at each step."""
    value = int(text)
    if value < 32 or value % 32:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 32")
    return value


def generator(*key):
    """A torch generator that depends on nothing but `key`, non-negative integers such as
    (seed, epoch, index): not on the worker, the process or what was drawn before."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def choose_device(gpu_id):
    """`--gpu-id` -> torch.device. -1 asks for all GPUs, which is only possible with one so far."""
    count = torch.cuda.device_count()
    if count == 0:
        if gpu_id >= 0:
            warn(f"--gpu-id {gpu_id}: no CUDA device here, running on the CPU")
        return torch.device("cpu")
    if gpu_id == -1 and count > 1:
        raise UserError(f"--gpu-id -1: training on all {count} GPUs is not supported yet, name one")
    if gpu_id >= count:
        raise UserError(f"--gpu-id {gpu_id}: this machine has GPUs 0 to {count - 1}")
    return torch.device("cuda", max(gpu_id, 0))


def write_atomically(path, write):
    """Replace `path` by what `write(file)` writes to a binary file: all of it or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself has to reach the disk
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_checkpoint(path):
    """The dictionary in a .pth file; executes nothing. Any file that is none is a UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load fails in a dozen ways on a damaged file
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason})") from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UserError(f"{path}: not a checkpoint (it holds no dictionary of tensors)")
    return checkpoint
