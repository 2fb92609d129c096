"""Loading in worker processes: batches for training and evaluation, and any work on many files."""

import os
import signal
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dataset.files import UnreadableImage, read_image
from distributed import rows_of_this_rank, world_size
from loading.augment import crop_and_flip, draw, resize_and_crop
from loading.sampler import EpochBatches
from utils import UserError, plural, progress, stream_of_copies, warn

# the number of workers is the user's choice
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")


class Loading(NamedTuple):
    """How images arrive: as crops of `size` pixels a side, read by `workers` processes."""

    size: int
    workers: int
    device: torch.device
    interpolation: str = "bilinear"
    read: Callable = read_image  # (path, background) -> RGB image; or a loading.cache.Cache


class Work(Dataset):
    """Item `key`: function(key). A UserError is returned: raised, it would come as a traceback."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, key):
        try:
            return self.function(key)
        except UserError as error:
            return error


def collate(items, combine=default_collate):
    """(batch of the items, or None if there are none; [UserError])."""
    errors = [item for item in items if isinstance(item, UserError)]
    good = [item for item in items if not isinstance(item, UserError)]
    return combine(good) if good else None, errors


def leave_signals_to_parent(worker):
    """The parent needs its workers to finish its step and save. A terminal's Ctrl-C goes to its
    whole session, and a cluster's SIGTERM to every process."""
    os.setsid()
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_the_parent_says, daemon=True).start()


def end_when_the_parent_says():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def make_loader(function, workers, device, collate=collate, **batching):
    return DataLoader(
        Work(function),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each epoch draws from the global state
        **batching,
    )


def train_loader(images, batch_size, seed, loading, images_per_class=None):
    """Seeded, augmented batches; call `loader.batch_sampler.set_epoch` before each epoch."""
    keys = EpochBatches(images, batch_size, seed, images_per_class)
    function = partial(augmented, images, loading)
    return make_loader(function, loading.workers, loading.device, batch_sampler=keys)


def augmented(images, loading, key):
    index, numbers = key
    image = loading.read(images.paths[index], images.background)
    pixels = crop_and_flip(image, *draw(numbers, image.size), loading.size, loading.interpolation)
    return pixels, images.labels[index], index


def test_loader(images, batch_size, loading, rows=None):
    """Every image once, in order; each rank has its share, or `rows`."""
    if rows is None:
        if len(images) < world_size():
            raise UserError(f"{plural(len(images), 'test image')}: fewer than the {world_size()} "
                            "processes that share them; start fewer")  # fmt: skip
        rows = rows_of_this_rank(range(len(images)))
    return make_loader(partial(centred, images, loading), loading.workers, loading.device,
                       batch_size=batch_size, sampler=rows)  # fmt: skip


test_loader.__test__ = False  # not a test of pytest


def centred(images, loading, index):
    image = loading.read(images.paths[index], images.background)
    pixels = resize_and_crop(image, loading.size, loading.interpolation)
    return pixels, images.labels[index], index


def batches(loader, device, skip=False):
    """(pixels uint8 RGB [B, H, W, 3], labels [B], index [B] of the images) on `device`. A GPU
    computes while they are copied, or cropped. With `skip`, unreadable images are warned of and
    left out."""
    copying, loaded = stream_of_copies(device), iter(good(loader, skip))
    while True:
        with torch.cuda.stream(copying):
            batch = [x.to(device, non_blocking=True) for x in next(loaded, ())]
        if not batch:
            return
        if copying:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copying)
            for x in batch:  # else the next copy could overwrite it before it is read
                x.record_stream(computing)
        yield batch


def good(loader, skip=False):
    """The loader's batches; a UserError, or with `skip` a warning, for what failed."""
    if not isinstance(loader, DataLoader):  # --cache gpu: made on the device
        yield from loader
        return
    for batch, errors in loader:
        for error in errors:
            if not skip:
                # `error` itself would make a cycle with this frame: the loader would be collected
                # before its workers are told to stop
                hint = ""
                if isinstance(error, UnreadableImage):
                    hint = f"; {error.instead}; `python -m dataset.check` lists all such files"
                raise type(error)(f"{error}{hint}")
            warn(f"skipped {error}")
        if batch:
            yield batch


def in_parallel(function, items, workers, label):
    """[function(item) for each item], by `workers` processes, with a progress bar."""
    loader = make_loader(function, workers, torch.device("cpu"), partial(collate, combine=list),
                         batch_size=16, sampler=items)  # fmt: skip
    return [result for batch in progress(good(loader), len(loader), label) for result in batch]
