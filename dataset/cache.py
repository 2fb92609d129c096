"""--cache ram: decoded images, so that a JPEG is decoded once and not in every epoch."""

import contextlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import read_image, size_of
from dataset.loader import in_parallel
from utils import UserError, plural, say


class Cache:
    """Every image, under its path: a drop-in for `read_image`.

    `file` has the RGB bytes of the images of these sizes, int64 [N, 2], one after another. It is
    opened once per process, and its memory is the kernel's: all workers share it.
    """

    def __init__(self, file, paths, sizes):
        self.file, self.descriptor = file, os.open(file, os.O_RDONLY)
        starts = start_of_each(sizes).tolist()
        self.images = dict(zip(paths, zip(starts, sizes.tolist())))

    def __call__(self, path):
        start, (width, height) = self.images[path]
        return Image.frombytes(
            "RGB", (width, height), os.pread(self.descriptor, 3 * width * height, start)
        )

    def __getstate__(self):
        return {**self.__dict__, "descriptor": None}

    def __setstate__(self, state):
        self.__dict__ = {**state, "descriptor": os.open(state["file"], os.O_RDONLY)}


def start_of_each(sizes):
    """[N + 1] where each image of these sizes [N, 2] begins, and the last ends."""
    return np.concatenate([[0], 3 * sizes.prod(axis=1).cumsum()])


def cache_in_memory(paths, workers):
    """The Cache of these images, decoded by `workers` processes; UserError if it does not fit."""
    if not hasattr(os, "memfd_create"):
        raise UserError("--cache ram: this needs Linux")
    sizes = np.array(in_parallel(size_of, paths, workers, "sizes of images"))
    starts, available = start_of_each(sizes), available_memory()
    needed = f"{plural(len(paths), 'image')}, {starts[-1] / 2**30:.1f} GiB decoded"
    if starts[-1] > available:
        raise UserError(
            f"--cache ram: {needed}, and {available / 2**30:.1f} GiB of memory are free; "
            "use --cache none"
        )
    say(f"--cache ram: {needed}")
    # a file without a name, gone with this process; the path is for processes it starts
    file = f"/proc/{os.getpid()}/fd/{os.memfd_create('decoded images')}"
    os.truncate(file, starts[-1])
    jobs = [(file, *job) for job in zip(paths, sizes.tolist(), starts.tolist())]
    in_parallel(decode, jobs, workers, "decoding images")
    return Cache(file, paths, sizes)


def decode(job):
    """Write an image where it belongs."""
    file, path, size, start = job
    image = read_image(path)
    if list(image.size) != size:
        raise UserError(f"{path}: changed while it was decoded")
    with open(file, "r+b", buffering=0) as out:
        out.seek(start)
        rest = memoryview(image.tobytes())
        while rest:
            rest = rest[out.write(rest) :]


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
