"""Which images are in which batch, and their random numbers: a function of (seed, epoch) alone."""

import torch
from torch.utils.data import Sampler

from distributed import rows_of_this_rank
from loading.augment import random_numbers
from utils import ORDER, generator


class EpochBatches(Sampler):
    """This rank's rows of an epoch's batches of (index of an image, random numbers for `draw`). The
    order is a random permutation, without the last incomplete batch. With `images_per_class` n,
    each batch holds n images, drawn with replacement, of each of batch_size / n classes."""

    def __init__(self, images, batch_size, seed, images_per_class=None):
        self.batch_size, self.seed = batch_size, seed
        self.epoch = self.first_step = 0
        self.paths, self.images_per_class = images.paths, images_per_class
        counts = images.labels.bincount().tolist()
        self.members = images.labels.argsort(stable=True).split(counts)  # indices by class

    def set_epoch(self, epoch, first_step=0):
        """The next iteration gives this epoch, from `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        return len(self.paths) // self.batch_size  # steps of a whole epoch

    def __iter__(self):
        return map(rows_of_this_rank, self.whole_batches())

    def whole_batches(self):
        order = self.order()
        numbers = random_numbers(self.seed, self.epoch, len(self) * self.batch_size)
        for step in range(self.first_step, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield list(zip(order[batch], numbers[batch].tolist()))

    def files(self, epoch, step):
        """Paths of the images of one batch."""
        self.set_epoch(epoch, step)
        return [self.paths[index] for index, _ in next(self.whole_batches())]

    def order(self):
        """Indices of the images, batch after batch."""
        rng = generator(self.seed, ORDER, self.epoch)
        if not self.images_per_class:
            return torch.randperm(len(self.paths), generator=rng).tolist()
        order = []
        for _ in range(len(self)):
            classes = torch.randperm(len(self.members), generator=rng)
            for c in classes[: self.batch_size // self.images_per_class].tolist():
                drawn = torch.randint(len(self.members[c]), (self.images_per_class,), generator=rng)
                order += self.members[c][drawn].tolist()
        return order
