"""--cache: decoded images, so that a JPEG is decoded once and not in every epoch."""

import contextlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.files import read_image, size_of
from distributed import all_reduce_max, once_a_machine
from loading.crops import DeviceBatches
from loading.loader import batches, in_parallel
from utils import UserError, plural, progress, say

CPU = torch.device("cpu")


class Cache:
    """Every image, under its path: a drop-in for `read_image`.

    `file` has the RGB bytes of the images of these sizes, int64 [N, 2], one after another. Its
    memory is the kernel's: all workers share it.
    """

    def __init__(self, file, paths, sizes):
        starts = start_of_each(sizes).tolist()
        self.file, self.images = file, dict(zip(paths, zip(starts, sizes.tolist())))

    def __call__(self, path):
        start, (width, height) = self.images[path]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(start)
            return Image.frombytes("RGB", (width, height), file.read(3 * width * height))


def start_of_each(sizes):
    """[N + 1] where each image of these sizes [N, 2] begins, and the last ends."""
    return np.concatenate([[0], 3 * sizes.prod(axis=1).cumsum()])


def cache_in_memory(paths, workers):
    """The Cache of these images, decoded by `workers` processes; UserError if it does not fit."""
    file, sizes = decoded("ram", paths, workers)
    return Cache(file, paths, sizes)


def read_from_memory(sets, workers):
    """--cache ram: decode all images of the sets once, into memory that all processes share; what
    reads them from there."""
    paths = [path for images in sets for path in images.paths]
    return once_a_machine(partial(cache_in_memory, paths, workers))


def keep_on_device(images, train_batches, test_batches, loading):
    """--cache gpu: the same batches of two loaders, the second of which may be None, from the
    memory of a device: of the train `images` all pixels, of the test images their crops."""
    device, tested = loading.device, len(test_batches.sampler) if test_batches else 0
    more = 3 * loading.size**2 * tested
    file, sizes = once_a_machine(
        partial(decoded, "gpu", images.paths, loading.workers, device, more)
    )
    starts = start_of_each(sizes)
    pixels = torch.from_file(file, shared=True, size=int(starts[-1]), dtype=torch.uint8).to(device)
    all_reduce_max(0)  # every rank has opened the file
    if file.startswith(f"/proc/{os.getpid()}/"):  # from GPUs the images leave this machine's memory
        os.close(int(Path(file).name))
    kept = DeviceBatches(train_batches.batch_sampler, images.labels, pixels, starts, sizes, loading)
    if test_batches:
        cropped = batches(test_batches, device)
        test_batches = list(progress(cropped, len(test_batches), "cropping test images"))
    return kept, test_batches


def decoded(cache, paths, workers, device=CPU, more=0):
    """(file in memory with the pixels of these images, one after another, their sizes); UserError
    if they and as many bytes `more` do not fit there, or on the device."""
    if not hasattr(os, "memfd_create"):
        raise UserError(f"--cache {cache}: this needs Linux")
    sizes = np.array(in_parallel(size_of, paths, workers, "sizes of images"))
    starts = start_of_each(sizes)
    needed = int(starts[-1]) + more
    what = f"{plural(len(paths), 'image')}, {needed / 2**30:.1f} GiB decoded"
    for place in (CPU, device):  # a GPU's images are decoded on its machine
        if (free := available_memory(place)) < needed:
            gpu = place.type == "cuda"
            kind, instead = ("GPU memory", "ram") if gpu else ("memory", "none")
            raise UserError(
                f"--cache {cache}: {what}, and {free / 2**30:.1f} GiB of {kind} are free, "
                f"{(needed - free) / 2**30:.3g} GiB too few; use --cache {instead}"
            )
    say(f"--cache {cache}: {what}")
    descriptor = os.memfd_create("decoded images")
    # the file has no name and is gone with this process; others reach it by this path
    file = f"/proc/{os.getpid()}/fd/{descriptor}"
    os.truncate(file, starts[-1])
    jobs = [(file, *job) for job in zip(paths, sizes.tolist(), starts.tolist())]
    in_parallel(decode, jobs, workers, "decoding images")
    return file, sizes


def decode(job):
    """Write an image where it belongs."""
    file, path, size, start = job
    image = read_image(path)
    if list(image.size) != size:
        raise UserError(f"{path}: changed while it was decoded")
    with open(file, "r+b") as out:
        out.seek(start)
        out.write(image.tobytes())


def available_memory(device=CPU):
    """Bytes that can be had: of a GPU's memory, or else, without swapping, of the machine's, and
    this container's if that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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
