"""Files that cannot be torn, and checkpoints that say when they are damaged."""

import contextlib
import hashlib
import io
import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from flags import flag_of
from utils import UserError

# A checkpoint is a zip file, as torch.save writes it, with its own SHA-256 as the zip's comment:
# any program that reads the one reads the other.
CHECKSUM = b"ddml-sha256:"
COMMENT_LENGTH = len(CHECKSUM) + 64


def temporary_of(path):
    """Where the bytes of a file are until all of them are there."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def replacing(path, keep=None, needed=""):
    """In a `with`, the path of a new file that takes the place of `path` at the end: all of it or
    nothing, even when the machine stops. With `keep`, what was there before is kept under that
    path; `needed` is what else the one line says where it could not be written."""
    path = Path(path)
    temporary = temporary_of(path)
    try:
        yield temporary
        sync(temporary)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync(path.parent)  # the renames have to reach the disk too
    except OSError as error:
        reason = error.strerror or error
        if error.filename and Path(error.filename) != temporary:  # what was to be written, say
            reason = f"{error.filename}: {reason}"
        raise UserError(f"{path}: cannot be written{needed} ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, data, keep=None):
    with replacing(path, keep, f", {len(data):,} bytes needed") as new:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest[: 2**24]) :]
        finally:
            os.close(descriptor)


def require_writable(args, *flags):
    """UserError, before the work, where what a flag names cannot be a new file."""
    for flag in flags:
        name = getattr(args, flag)
        out = name and Path(name).resolve()
        if out and (out.exists() and not out.is_file() or not out.parent.is_dir()):
            raise UserError(f"{flag_of(flag)} {name}: not a file's path in a folder that exists")


def require_format(args, **formats):
    """UserError, before the work, where a flag's file is of no kind that is written, or of one
    whose packages are missing; a flag of `formats` has {suffix: packages}."""
    for flag, packages in formats.items():
        name = getattr(args, flag)
        needed = packages.get(Path(name).suffix.lower()) if name else ()
        if needed is None:
            raise UserError(f"{flag_of(flag)} {name}: must end in {' or '.join(packages)}")
        if not all(map(find_spec, needed)):
            raise UserError(f"{flag_of(flag)} {name}: pip install {' '.join(needed)}")


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_checkpoint(path, checkpoint, keep=None):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    # instead of the last two bytes, the length of an empty comment
    comment = CHECKSUM + hashlib.sha256(buffer.getbuffer()[:-2]).hexdigest().encode()
    buffer.seek(-2, os.SEEK_END)
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    write_atomically(path, buffer.getbuffer(), keep)


def read_checkpoint(path):
    """The dictionary in a .pth file; executes nothing. UserError for any file that is none or is
    damaged; one without our SHA-256, as others write it, is taken as it is."""
    return checkpoint_from(read_bytes(path), path)


def read_bytes(path):
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise OSError("not a file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint that can be read: {error}") from error


def checkpoint_from(data, path):
    """As `read_checkpoint`, of the bytes that were in the file."""

    def refuse(reason):
        raise UserError(f"{path}: not a checkpoint that can be read: {reason}")

    end = len(data) - COMMENT_LENGTH
    if data.startswith(CHECKSUM, end):
        digest = hashlib.sha256(memoryview(data)[: end - 2]).hexdigest()
        if not data.endswith(digest.encode()):
            refuse("damaged, its SHA-256 is not the stored one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch muses on odd files before it refuses them
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # it fails in a dozen ways, and words few of them well
        refuse("damaged, or it holds more than tensors and plain values")
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UserError(f"{path}: not a checkpoint (it holds no dictionary of tensors)")
    return checkpoint
