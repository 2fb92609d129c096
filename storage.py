"""Atomic writes, and checkpoints with a checksum."""

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

# A checkpoint is torch.save's zip file, with its SHA-256 as the zip's comment: torch.load reads it.
CHECKSUM = b"ddml-sha256:"
COMMENT_LENGTH = len(CHECKSUM) + 64


def temporary_of(path):
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def replacing(path, keep=None, needed=""):
    """In a `with`: a temporary path, whose file replaces `path` at the end, as a whole or not at
    all. keep: where the old file goes; needed: bytes, in the error."""
    path = Path(path)
    temporary = temporary_of(path)
    try:
        yield temporary
        sync(temporary)
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        sync(path.parent)  # the renames
    except OSError as error:
        reason = error.strerror or error
        if error.filename and Path(error.filename) != temporary:  # such as a file to export
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
        new.write_bytes(data)


def require_writable(args, *flags):
    """UserError if the path that one of these flags names cannot be written to."""
    for flag in flags:
        name = getattr(args, flag)
        out = name and Path(name).resolve()
        if out and (out.exists() and not out.is_file() or not out.parent.is_dir()):
            raise UserError(f"{flag_of(flag)} {name}: not a file's path in a folder that exists")


def require_format(args, **formats):
    """UserError for a file of unknown suffix or missing packages; formats: {suffix: packages}."""
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
    # the last two bytes are the length of the comment, so far 0
    comment = CHECKSUM + hashlib.sha256(buffer.getbuffer()[:-2]).hexdigest().encode()
    buffer.seek(-2, os.SEEK_END)
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    write_atomically(path, buffer.getbuffer(), keep)


def read_checkpoint(path):
    """The dictionary in a .pth file; executes nothing. Verified if it has our SHA-256."""
    return checkpoint_from(read_bytes(path), path)


def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: not a checkpoint that can be read: {error}") from error


def checkpoint_from(data, path):
    """As `read_checkpoint`, from the bytes of the file."""
    unreadable = f"{path}: not a checkpoint that can be read"
    end = len(data) - COMMENT_LENGTH
    if data.startswith(CHECKSUM, end):
        digest = hashlib.sha256(memoryview(data)[: end - 2]).hexdigest()
        if not data.endswith(digest.encode()):
            raise UserError(f"{unreadable}: damaged, its SHA-256 is not the stored one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd files before it refuses them
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        raise UserError(f"{unreadable}: damaged, or it holds more than tensors and plain "
                        "values") from error  # fmt: skip
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UserError(f"{path}: not a checkpoint (it holds no dictionary of tensors)")
    return checkpoint
