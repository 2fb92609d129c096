"""Batches whose content depends on (seed, epoch, position in the epoch) alone: never on the
number of workers, on their state, or on where a run was interrupted (differs: the script draws
from the state of workers and process)."""

import warnings

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils import UserError, generator

ORDER, AUGMENTATION = 0, 1  # independent streams of random numbers under one seed

# The number of workers is the user's choice, and the published default is 4.
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")


class EpochBatches(Sampler):
    """Batches of (epoch, position, index) for the epoch last given to `set_epoch`.

    A random permutation with the last incomplete batch dropped; with `images_per_class` n, each
    batch instead holds n images, drawn with replacement, of each of batch_size / n classes.
    """

    def __init__(self, labels, batch_size, seed, images_per_class=None):
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.num_images, self.images_per_class = len(labels), images_per_class
        if images_per_class:
            self.members = [torch.nonzero(labels == c).flatten() for c in labels.unique()]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.num_images // self.batch_size

    def __iter__(self):
        order = self.balanced_order() if self.images_per_class else self.shuffled_order()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = start + self.batch_size
            yield [(self.epoch, p, i) for p, i in zip(range(start, stop), order[start:stop])]

    def shuffled_order(self):
        return torch.randperm(
            self.num_images, generator=generator(self.seed, ORDER, self.epoch)
        ).tolist()

    def balanced_order(self):
        rng = generator(self.seed, ORDER, self.epoch)
        order = []
        for _ in range(len(self)):
            classes = torch.randperm(len(self.members), generator=rng)
            for c in classes[: self.batch_size // self.images_per_class].tolist():
                drawn = torch.randint(
                    len(self.members[c]), (self.images_per_class,), generator=rng
                )
                order += self.members[c][drawn].tolist()
        return order


class SeededImages(Dataset):
    """`images` under keys (epoch, position, index); the position seeds the augmentation, so that
    an image drawn twice in an epoch is augmented twice."""

    def __init__(self, images, seed):
        self.images, self.seed = images, seed

    def __getitem__(self, key):
        epoch, position, index = key
        with torch.random.fork_rng(devices=[]):
            key = generator(self.seed, AUGMENTATION, epoch, position).initial_seed()
            torch.default_generator.manual_seed(key)  # where torchvision draws from
            return self.images[index]


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
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each epoch draws from the global state
        **batching,
    )


def train_loader(images, batch_size, seed, workers, device, images_per_class=None):
    """Seeded, augmented batches; call `loader.batch_sampler.set_epoch` before each epoch."""
    batches = EpochBatches(images.labels, batch_size, seed, images_per_class)
    return make_loader(SeededImages(images, seed), workers, device, batch_sampler=batches)


def test_loader(images, batch_size, workers, device):
    """Every image once, in order."""
    return make_loader(images, workers, device, batch_size=batch_size)


def batches(loader, device):
    """(images [B, 3, H, W], labels [B]) on `device`; a UserError met by a worker is raised here."""
    for batch in loader:
        if isinstance(batch, UserError):
            # A new one: raising `batch` itself would make a cycle with this frame, and the loader
            # in it would be collected in an order in which its workers are not told to stop.
            raise UserError(str(batch))
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
