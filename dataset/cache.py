"""Decoded images, so that a JPEG is decoded once and not in every epoch."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from cli import UserError, in_parallel, plural
from dataset.files import image_size, read_image

FOLDER = "decoded"  # below the data root, for --cache disk


class Cache:
    """Every image of a file of pixels, under its path: a drop-in for `read_image`.

    The file has the RGB bytes of the images one after another, then their int32 [N, 2] widths and
    heights. It is opened once per process, and its memory is the kernel's: all workers share it.
    """

    def __init__(self, file, paths):
        self.file, self.descriptor = file, os.open(file, os.O_RDONLY)
        tail, length = 8 * len(paths), os.fstat(self.descriptor).st_size
        sizes = os.pread(self.descriptor, tail, max(length - tail, 0))
        sizes = np.frombuffer(sizes, np.int32).reshape(len(paths), 2)
        starts = start_of_each(sizes)
        if length != starts[-1] + tail:
            raise ValueError(f"{file}: not of the length that its sizes say")
        self.images = {
            path: (start, width, height)
            for path, start, (width, height) in zip(paths, starts.tolist(), sizes.tolist())
        }

    def __call__(self, path):
        start, width, height = self.images[path]
        try:
            data = os.pread(self.descriptor, 3 * width * height, start)
            return Image.frombytes("RGB", (width, height), data)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: {path} cannot be read from it ({error})") from error

    def __getstate__(self):
        return {**self.__dict__, "descriptor": None}

    def __setstate__(self, state):
        self.__dict__ = {**state, "descriptor": os.open(state["file"], os.O_RDONLY)}


def start_of_each(sizes):
    """[N + 1] where each image of these sizes [N, 2] begins, and the last ends."""
    areas = sizes.astype(np.int64).prod(axis=1)
    return np.concatenate([[0], 3 * areas.cumsum()])


def open_cache(kind, name, paths, root, workers):
    """The Cache of these images: in memory for this run (`ram`), or in a file that later runs find
    as well (`disk`), until an image changes. Decodes them, by `workers` processes, if need be."""
    workers = max(workers, 1)
    if kind == "ram":
        if not hasattr(os, "memfd_create"):
            raise UserError("--cache ram: this needs Linux; use --cache disk")
        descriptor = os.memfd_create("decoded images")
        sizes = sizes_that_fit(paths, workers, "ram", available_memory(), "memory")
        decode(paths, sizes, f"/proc/{os.getpid()}/fd/{descriptor}", workers)
        return Cache(f"/proc/{os.getpid()}/fd/{descriptor}", paths)
    file = Path(root, FOLDER, f"{name}.{fingerprint(paths)}.pixels")
    try:
        file.parent.mkdir(exist_ok=True)
        with open(file.parent / f"{name}.lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # another run may be decoding them just now
            with contextlib.suppress(FileNotFoundError, ValueError):
                return Cache(file, paths)
            for old in file.parent.glob(f"*{name}.*.pixels*"):
                old.unlink()
            free = shutil.disk_usage(file.parent).free
            sizes = sizes_that_fit(paths, workers, "disk", free, f"space in {file.parent}")
            temporary = file.with_name(f".{file.name}.tmp")
            try:
                decode(paths, sizes, temporary, workers)
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
        return Cache(file, paths)
    except OSError as error:
        raise UserError(
            f"--cache disk: {error.filename or file}: {error.strerror}; use --cache ram or none"
        ) from error


def fingerprint(paths):
    """A digest that changes with any of the files, and with what decodes them."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for path in paths:
        status = os.stat(path)
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()[:16]


def sizes_that_fit(paths, workers, kind, available, what):
    """int32 [N, 2] width and height of each image; a UserError if they need more than there is."""
    sizes = in_parallel(image_size, paths, workers, "sizes of the images")
    sizes = np.array(sizes, np.int32)
    needed = start_of_each(sizes)[-1]
    if needed > available:
        raise UserError(
            f"--cache {kind}: {plural(len(paths), 'image')} need {needed / 2**30:.1f} GiB decoded, "
            f"and {available / 2**30:.1f} GiB of {what} are free; use another --cache"
        )
    return sizes


def available_memory():
    """Bytes that can be had without swapping: the machine's, and this container's if it is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit
        limit, used, parts = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text()
            for name in ("max", "current", "stat")
        )
        parts = dict(line.split() for line in parts.splitlines())
        files = int(parts["file"]) - int(parts["shmem"])  # these make room when it is needed
        available.append(int(limit) - int(used) + files)
    return min(available)


def decode(paths, sizes, file, workers):
    """Write the file that Cache reads."""
    jobs = [
        (path, tuple(size), file, start)
        for path, size, start in zip(paths, sizes.tolist(), start_of_each(sizes).tolist())
    ]
    with open(file, "wb") as out:
        in_parallel(decode_one, jobs, workers, "decoding the images")
        out.seek(0, os.SEEK_END)
        out.write(sizes.tobytes())
        out.flush()
        with contextlib.suppress(OSError):  # memory is not synchronised with anything
            os.fsync(out.fileno())


def decode_one(job):
    path, size, file, start = job
    image = read_image(path)
    if image.size != size:
        raise UserError(f"{path}: changed while it was decoded")
    descriptor = os.open(file, os.O_WRONLY)
    try:
        data = memoryview(image.tobytes())
        while data:
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written
    finally:
        os.close(descriptor)
