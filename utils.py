"""What training and evaluation share: seeded generators, the device, files that cannot be torn."""

import contextlib
import hashlib
import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from cli import UserError, warn


def seed_of(*key):
    """A seed that depends on nothing but `key`, non-negative integers such as (seed, epoch, index):
    not on the worker, the process or what was drawn before."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key):
    """A torch generator with the seed of `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


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


def memory_format(device):
    """How a network's maps lie in memory: on a CPU, convolutions over channels-last maps are faster
    (benchmarks/network.py)."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def temporary_of(path):
    """Where the bytes of a file are until all of them are there."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path, data, keep=None):
    """Replace `path` by the bytes `data`: all of it or nothing, even when the machine stops. With
    `keep`, what was there before is kept under that path."""
    path = Path(path)
    temporary = temporary_of(path)
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
    # instead of the last two bytes, the length of an empty comment
    comment = CHECKSUM + hashlib.sha256(buffer.getbuffer()[:-2]).hexdigest().encode()
    buffer.seek(-2, os.SEEK_END)
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    write_atomically(path, buffer.getbuffer(), keep)


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


def load(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch muses on odd files before it refuses them
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def outlived(read):
    """Whether a child process outlives `read`: a crash is no exception that could be caught."""
    child = os.fork()
    if not child:
        try:
            with contextlib.suppress(Exception):
                read()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def read_checkpoint(path):
    """The dictionary in a .pth file; executes nothing. Any file that is none, that is damaged or
    that would unpack to more than its size is a UserError."""
    try:
        if os.path.getsize(path) > MAX_CHECKPOINT_BYTES:
            raise BadCheckpoint("it is larger than 4 GiB")
        if not os.path.isfile(path) and not os.path.isdir(path):
            raise BadCheckpoint("it is a device or a pipe")
        data = Path(path).read_bytes()
        check_zip(data)
        if not outlived(lambda: load(data)):
            raise BadCheckpoint("it crashes the process that reads it")
        checkpoint = load(data)
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
