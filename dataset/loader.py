"""Batches whose content depends on (seed, epoch, index of the sample) alone: never on the
number of workers, on their state, or on where a run was interrupted (differs: the script draws
from the state of workers and process)."""

import warnings
from collections import Counter

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from cli import UserError, leave_signals_to_parent
from dataset.transforms import to_input
from utils import generator, memory_format, seed_of

ORDER, AUGMENTATION = 0, 1  # independent streams of random numbers under one seed

# The number of workers is the user's choice, and the published default is 4.
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")


class EpochBatches(Sampler):
    """Batches of (epoch, index, occurrence) for the epoch last given to `set_epoch`.

    A random permutation with the last incomplete batch dropped; with `images_per_class` n, each
    batch instead holds n images, drawn with replacement, of each of batch_size / n classes.
    """

    def __init__(self, images, batch_size, seed, images_per_class=None):
        self.batch_size, self.seed = batch_size, seed
        self.epoch = self.first_step = 0
        self.paths, self.images_per_class = images.paths, images_per_class
        if images_per_class:
            classes = images.labels.unique()
            self.members = [torch.nonzero(images.labels == c).flatten() for c in classes]

    def set_epoch(self, epoch, first_step=0):
        """What to iterate over next: an epoch, or the rest of one from `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        """Steps of a whole epoch."""
        return len(self.paths) // self.batch_size

    def __iter__(self):
        order = self.balanced_order() if self.images_per_class else self.shuffled_order()
        seen = Counter()
        keys = []
        for index in order[: len(self) * self.batch_size]:
            keys.append((self.epoch, index, seen[index]))
            seen[index] += 1
        for step in range(self.first_step, len(self)):
            yield keys[step * self.batch_size : (step + 1) * self.batch_size]

    def files(self, epoch, step):
        """Paths of the images of one batch."""
        self.set_epoch(epoch, step)
        return [self.paths[index] for _, index, _ in next(iter(self))]

    def shuffled_order(self):
        return torch.randperm(
            len(self.paths), generator=generator(self.seed, ORDER, self.epoch)
        ).tolist()

    def balanced_order(self):
        rng = generator(self.seed, ORDER, self.epoch)
        order = []
        for _ in range(len(self)):
            classes = torch.randperm(len(self.members), generator=rng)
            for c in classes[: self.batch_size // self.images_per_class].tolist():
                drawn = torch.randint(len(self.members[c]), (self.images_per_class,), generator=rng)
                order += self.members[c][drawn].tolist()
        return order


class SeededImages(Dataset):
    """`images` under keys (epoch, index, occurrence), which seed the augmentation. An image drawn
    again in an epoch, as balanced batches do, is another occurrence and augmented anew."""

    def __init__(self, images, seed):
        self.images, self.seed = images, seed

    def __getitem__(self, key):
        with torch.random.fork_rng(devices=[]):
            # where torchvision draws from
            torch.default_generator.manual_seed(seed_of(self.seed, AUGMENTATION, *key))
            return self.images[key[1]]


class CatchUserErrors(Dataset):
    """Hands a UserError over as an item: raised in a worker it would arrive as a traceback."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        try:
            return self.images[key]
        except UserError as error:
            return error


def collate(items):
    error = next((item for item in items if isinstance(item, UserError)), None)
    return error or default_collate(items)


def make_loader(images, workers, device, **batching):
    return DataLoader(
        CatchUserErrors(images),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each epoch draws from the global state
        **batching,
    )


def train_loader(images, batch_size, seed, workers, device, images_per_class=None):
    """Seeded, augmented batches; call `loader.batch_sampler.set_epoch` before each epoch."""
    batches = EpochBatches(images, batch_size, seed, images_per_class)
    return make_loader(SeededImages(images, seed), workers, device, batch_sampler=batches)


def test_loader(images, batch_size, workers, device):
    """Every image once, in order."""
    return make_loader(images, workers, device, batch_size=batch_size)


def batches(loader, device):
    """(the network's input [B, 3, H, W], labels [B]) on `device`; a UserError met by a worker is
    raised here, and so is the death of a worker."""
    loaded = iter(loader)
    while True:
        try:
            batch = next(loaded, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that loads images died, perhaps for lack of memory; use fewer "
                f"--workers ({str(error).splitlines()[0]})"
            ) from error
        if batch is None:
            return
        if isinstance(batch, UserError):
            # A new one: raising `batch` itself would make a cycle with this frame, and the loader
            # in it would be collected in an order in which its workers are not told to stop.
            raise UserError(str(batch))
        pixels, labels = (part.to(device, non_blocking=True) for part in batch)
        yield to_input(pixels, memory_format(device)), labels
