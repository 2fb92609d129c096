"""Loading in processes: the batches of training and of evaluation, and any work on many files."""

import os
import warnings
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dataset.files import UnreadableImage
from distributed import part, world
from loading.augment import crop_and_flip, draw, resize_and_crop
from loading.sampler import EpochBatches
from utils import UserError, plural, progress, stream_of_copies

# The number of workers is the user's choice, and the published default is 4.
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")


class Work(Dataset):
    """Item `key` is function(key), or the UserError that it raises: raised in a worker it would
    arrive as a traceback."""

    def __init__(self, function, count=None):
        self.function, self.count = function, count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        try:
            return self.function(key)
        except UserError as error:
            return error


def collate(items, combine=default_collate):
    error = next((item for item in items if isinstance(item, UserError)), None)
    return error or combine(items)


def leave_signals_to_parent(worker):
    """A terminal's Ctrl-C goes to a whole session: the death of a worker would break off what the
    parent is about to finish. A worker whose parent is gone ends by itself, within seconds."""
    os.setsid()


def make_loader(work, workers, device, collate=collate, **batching):
    return DataLoader(
        work,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each epoch draws from the global state
        **batching,
    )


def train_loader(
    images, size, batch_size, seed, workers, device, images_per_class=None, interpolation="bilinear"
):
    """Seeded, augmented batches; call `loader.batch_sampler.set_epoch` before each epoch."""
    keys = EpochBatches(images, batch_size, seed, images_per_class)
    work = Work(partial(augmented, images, size, interpolation))
    return make_loader(work, workers, device, batch_sampler=keys)


def augmented(images, size, interpolation, key):
    index, numbers = key
    image = images.read(images.paths[index])
    box, flip = draw(numbers, image.size)
    return crop_and_flip(image, box, flip, size, interpolation), images.labels[index], index


def test_loader(images, size, batch_size, workers, device, interpolation="bilinear"):
    """Every image once, in order; of several processes each has its part."""
    if len(images) < world():
        raise UserError(f"{plural(len(images), 'test image')}: fewer than the {world()} processes "
                        "that share them; start fewer")  # fmt: skip
    work = Work(partial(centred, images, size, interpolation), len(images))
    mine = part(range(len(images)))
    return make_loader(work, workers, device, batch_size=batch_size, sampler=mine)


def centred(images, size, interpolation, index):
    image = images.read(images.paths[index])
    return resize_and_crop(image, size, interpolation), images.labels[index], index


test_loader.__test__ = False  # no test of pytest's


def batches(loader, device):
    """(pixels uint8 RGB [B, H, W, 3], labels [B], index [B] of the images) on `device`; a UserError
    met by a worker is raised here. To a GPU they are copied while it computes."""
    copying = stream_of_copies(device)
    for batch in raising(loader):
        with torch.cuda.stream(copying):
            batch = [x.to(device, non_blocking=True) for x in batch]
        if copying:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copying)
            for x in batch:  # else their memory would be free for the next copy before it is read
                x.record_stream(computing)
        yield batch


def raising(loader):
    for batch in loader:
        if isinstance(batch, UserError):
            # A new one: raising `batch` itself would make a cycle with this frame, and the loader
            # in it would be collected in an order in which its workers are not told to stop.
            hint = "; replace it; `python -m dataset.check` lists all such files"
            raise type(batch)(f"{batch}{hint if isinstance(batch, UnreadableImage) else ''}")
        yield batch


def in_parallel(function, items, workers, label):
    """[function(item) for each item], in order, by `workers` processes; shows the progress."""
    work = Work(partial(call, function, items), len(items))
    cpu = torch.device("cpu")
    loader = make_loader(work, workers, cpu, collate=partial(collate, combine=list), batch_size=16)
    return [result for batch in progress(raising(loader), len(loader), label) for result in batch]


def call(function, items, index):
    return function(items[index])
