"""Which images are in which batch, and by which numbers they are augmented: a function of (seed,
epoch) alone."""

import torch
from torch.utils.data import Sampler

from distributed import rows_of_this_rank
from loading.augment import random_numbers
from utils import generator

ORDER = 0  # its stream of random numbers, beside the augmentation's and the loss's


class EpochBatches(Sampler):
    """Batches of keys (index of an image, random numbers of its augmentation) for the epoch last
    given to `set_epoch`.

    A random permutation with the last incomplete batch dropped; with `images_per_class` n, each
    batch instead holds n images, drawn with replacement, of each of batch_size / n classes.
    """

    def __init__(self, images, batch_size, seed, images_per_class=None):
        self.batch_size, self.seed = batch_size, seed
        self.epoch = self.first_step = 0
        self.paths, self.images_per_class = images.paths, images_per_class
        if images_per_class:
            counts = images.labels.bincount().tolist()
            self.members = images.labels.argsort(stable=True).split(counts)

    def set_epoch(self, epoch, first_step=0):
        """What to iterate over next: an epoch, or the rest of one from `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        """Steps of a whole epoch."""
        return len(self.paths) // self.batch_size

    def __iter__(self):
        """This rank's rows of the batches."""
        return map(rows_of_this_rank, self.whole_batches())

    def whole_batches(self):
        order = self.balanced_order() if self.images_per_class else self.shuffled_order()
        numbers = random_numbers(self.seed, self.epoch, len(self) * self.batch_size)
        for step in range(self.first_step, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield list(zip(order[batch], numbers[batch].tolist()))

    def files(self, epoch, step):
        """Paths of the images of one batch."""
        self.set_epoch(epoch, step)
        return [self.paths[index] for index, _ in next(self.whole_batches())]

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
