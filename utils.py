"""What every script shares: user errors, seeded generators, files that cannot be torn."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; `run` prints it as one line and exits with status 2."""


class Interrupted(BaseException):
    """A signal arrived; like KeyboardInterrupt it is no error, and no `except Exception` takes it.
    `note` says what became of the work."""

    def __init__(self, number, note="nothing new was saved"):
        self.number, self.note = number, note


def run(main):
    """Call `main` as a script: user errors become one line, our own bugs keep their traceback."""
    name = Path(sys.argv[0]).name
    try:
        status = main()
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # whoever read our output, as in `| head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Interrupted as stop:
        print(f"{name}: {signal.Signals(stop.number).name}: {stop.note}", file=sys.stderr)
        status = 128 + stop.number
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
    """argparse type: a number no smaller than `low`, and not beyond all use."""

    def parse(text):
        value = kind(text)
        if not low <= value <= (2**63 if kind is int else 1e9):
            raise ValueError(text)
        return value

    parse.__name__ = f"number (at least {low})"
    return parse


def parse_stored(parser, flags, path, required=()):
    """The flags stored in a checkpoint, as a namespace, held to the same rules as typed ones."""
    argv = list(required)
    for name, value in flags.items():
        if value is not None and name not in ("resume", "overwrite"):  # they are no settings
            flag = name.replace("_", "-") if str(name).islower() else name  # LOG_DIR, IPC
            argv.append(f"--{flag}={value}")
    try:
        return parser.parse_args(argv)
    except UserError as error:
        raise UserError(f"{path}: its stored flags are not valid: {error}") from error


def image_size(text):
    """argparse type: BN-Inception joins maps that it has halved in two ways, one rounding up and
    one down, so the last maps but one have to have even sides."""
    value = int(text)
    if value < 31 or (value + 1) % 32 >= 8:
        raise argparse.ArgumentTypeError(
            f"BN-Inception takes multiples of 32 and up to 6 pixels more, not {value}"
        )
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
        warn(f"--gpu-id {gpu_id}: no CUDA device here, running on the CPU")
        return torch.device("cpu")
    if gpu_id == -1 and count > 1:
        raise UserError(f"--gpu-id -1: training on all {count} GPUs is not supported yet, name one")
    if gpu_id >= count:
        raise UserError(f"--gpu-id {gpu_id}: this machine has GPUs 0 to {count - 1}")
    device = torch.device("cuda", max(gpu_id, 0))
    torch.cuda.set_device(device)  # pinned memory belongs to the current device
    return device


def write_atomically(path, data, keep=None):
    """Replace `path` by the bytes `data`: all of it or nothing, even when the machine stops. With
    `keep`, what was there before is kept under that path."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest[: 2**24]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renames have to reach the disk too
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise UserError(
            f"{path}: cannot be written, {len(data):,} bytes needed ({error.strerror or error})"
        ) from error


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


# A checkpoint is a zip file, as torch.save writes it, with its own SHA-256 as the zip's comment:
# any program that reads the one reads the other.
CHECKSUM = b"ddml-sha256:"
MAX_CHECKPOINT_BYTES = 2**32  # ten times the largest that this network's training writes


def write_checkpoint(path, checkpoint, keep=None):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getvalue()[:-2]  # all but the length of an empty comment
    comment = CHECKSUM + hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, content + len(comment).to_bytes(2, "little") + comment, keep)


class BadCheckpoint(ValueError):
    """What is wrong with a checkpoint's file, in words for the user."""


def check_zip(data):
    """Raise BadCheckpoint for a zip file that is damaged or would unpack to more than its size."""
    if not data.startswith(b"PK"):
        return  # the format before torch 1.6, in which the ImageNet file is stored
    end = data.rfind(b"PK\x05\x06") + 20  # the last record: 20 bytes, a length, the comment
    comment = data[end + 2 :]
    if int.from_bytes(data[end : end + 2], "little") != len(comment):
        raise BadCheckpoint("it is damaged, its end is missing")
    digest = hashlib.sha256(memoryview(data)[:end]).hexdigest()
    if comment.startswith(CHECKSUM) and comment != CHECKSUM + digest.encode():
        raise BadCheckpoint("it is damaged, its SHA-256 is not the stored one")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise BadCheckpoint("it unpacks to more than its size")


def read_checkpoint(path):
    """The dictionary in a .pth file; executes nothing. Any file that is none, that is damaged or
    that would unpack to more than its size is a UserError."""
    try:
        if os.path.getsize(path) > MAX_CHECKPOINT_BYTES:
            raise BadCheckpoint("it is larger than 4 GiB")
        data = Path(path).read_bytes()
        check_zip(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch muses on odd files before it refuses them
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load fails in a dozen ways, and words few of them well
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if not isinstance(error, (OSError, BadCheckpoint)):
            reason = "damaged, or it holds more than tensors and plain values"
        raise UserError(f"{path}: not a checkpoint that can be read: {reason}") from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UserError(f"{path}: not a checkpoint (it holds no dictionary of tensors)")
    return checkpoint
