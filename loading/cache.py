"""--cache: each image is decoded once, not once per epoch."""

import contextlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.files import read_image, size_of
from distributed import barrier, from_rank_0
from loading.crops import DeviceBatches
from loading.loader import batches, in_parallel
from utils import UserError, plural, progress, say

CPU = torch.device("cpu")


class Cache:
    """A drop-in for `read_image`. `file` holds the RGB bytes of images of these sizes, int64
    [N, 2], one after another, in memory that all workers share."""

    def __init__(self, file, sizes, paths):
        starts = start_of_each(sizes).tolist()
        self.file, self.images = file, dict(zip(paths, zip(starts, sizes.tolist())))

    def __call__(self, path, background=None):  # it was decoded on one
        start, (width, height) = self.images[path]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(start)
            return Image.frombytes("RGB", (width, height), file.read(3 * width * height))


def start_of_each(sizes):
    """[N + 1]: the first byte of each image of these sizes [N, 2], then the end of the last."""
    return np.concatenate([[0], 3 * sizes.prod(axis=1).cumsum()])


def read_from_memory(paths, workers, background=None):
    """--cache ram: the Cache of these images, shared by all processes that are on one machine."""
    decode_all = partial(decoded, "ram", paths, workers, background=background)
    return Cache(*from_rank_0(decode_all, each_machine=True), paths)


def keep_on_device(images, train_loader, test_loader, loading):
    """--cache gpu: the batches of both loaders (test_loader may be None) from a device's memory,
    which keeps all pixels of the train `images` and the crops of the test images."""
    device, workers = loading.device, loading.workers
    more = 3 * loading.size**2 * len(test_loader.sampler) if test_loader else 0
    decode_all = partial(decoded, "gpu", images.paths, workers, device, more, images.background)
    file, sizes = from_rank_0(decode_all, each_machine=True)
    starts = start_of_each(sizes)
    pixels = torch.from_file(file, shared=True, size=int(starts[-1]), dtype=torch.uint8).to(device)
    barrier()  # every rank has opened the file
    if file.startswith(f"/proc/{os.getpid()}/"):  # with GPUs, this frees the machine's memory
        os.close(int(Path(file).name))
    kept = DeviceBatches(train_loader.batch_sampler, images.labels, pixels, starts, sizes, loading)
    if not test_loader:
        return kept, None
    return kept, list(progress(batches(test_loader, device), len(test_loader), "test images"))


def decoded(cache, paths, workers, device=CPU, more=0, background=None):
    """(file in memory with the images' RGB bytes, one after another; their sizes [N, 2]). UserError
    if they and `more` bytes do not fit into the machine's and the device's memory."""
    if not hasattr(os, "memfd_create"):
        raise UserError(f"--cache {cache}: this needs Linux")
    size = partial(size_of, own=background is not None)
    sizes = np.array(in_parallel(size, paths, workers, "sizes of images"))
    starts = start_of_each(sizes)
    needed = int(starts[-1]) + more
    what = f"{plural(len(paths), 'image')}, {needed / 2**30:.1f} GiB decoded"
    for place, kind, instead in (CPU, "memory", "none"), (device, "GPU memory", "ram"):
        if (free := available_memory(place)) < needed:
            raise UserError(
                f"--cache {cache}: {what}, and {free / 2**30:.1f} GiB of {kind} are free, "
                f"{(needed - free) / 2**30:.3g} GiB too few; use --cache {instead}"
            )
    say(f"--cache {cache}: {what}")
    # the file has no name and is gone with this process; others reach it by this path
    file = f"/proc/{os.getpid()}/fd/{os.memfd_create('decoded images')}"
    os.truncate(file, starts[-1])
    jobs = [(file, *job) for job in zip(paths, starts.tolist())]
    in_parallel(partial(decode, background), jobs, workers, "decoding images")
    return file, sizes


def decode(background, job):
    """Write an image's RGB bytes at its place in the file."""
    file, path, start = job
    image = read_image(path, background)
    with open(file, "r+b") as out:
        out.seek(start)
        out.write(image.tobytes())


def available_memory(device=CPU):
    """Free bytes: of a GPU, or of the machine without swapping, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(machine["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit
        limit, used, parts = (Path(f"/sys/fs/cgroup/memory.{name}").read_text()
                              for name in ("max", "current", "stat"))  # fmt: skip
        parts = dict(line.split() for line in parts.splitlines())
        files = int(parts["file"]) - int(parts["shmem"])  # the kernel can drop these
        available = min(available, int(limit) - int(used) + files)
    return available
