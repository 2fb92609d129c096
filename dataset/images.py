"""The images of one split."""

import hashlib

import torch
from torch.utils.data import Dataset

from dataset.files import read_image


class ImageSet(Dataset):
    """`paths` and `labels` [N] of one split, and `classes`, the name of each label 0 .. C - 1;
    item i is (RGB image after `transform`, label). The first `queries` images are queries, the rest
    the gallery; None: each image queries all others."""

    def __init__(self, items, transform=None, queries=None):
        self.paths = [path for path, _ in items]
        self.classes = sorted({name for _, name in items})
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([label_of[name] for _, name in items])
        self.transform, self.queries = transform, queries

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def items(self):
        """[(path, class name)]"""
        return list(zip(self.paths, (self.classes[label] for label in self.labels.tolist())))

    def joined(self, other):
        """Both sides of hold_out as one, sorted: the same for every fold."""
        return ImageSet(sorted(self.items() + other.items()))

    def hold_out(self, fraction, fold):
        """(rest, held): two ImageSets of whole classes. Folds are contiguous, each `fraction` of
        the sorted classes; `held` has the `fold`-th, from 0. ValueError if there is none."""
        count, labels, items = len(self.classes), self.labels.tolist(), self.items()
        start, stop = (round(i * fraction * count) for i in (fold, fold + 1))
        if not 0 <= start < stop <= count:
            raise ValueError(f"hold_out({fraction}, {fold}): no such fold of {count} classes")

        def side(is_held):
            chosen = [i for i, label in enumerate(labels) if (start <= label < stop) == is_held]
            queries = self.queries and sum(i < self.queries for i in chosen)
            return ImageSet([items[i] for i in chosen], self.transform, queries)

        return side(False), side(True)


def digest_of_names(sets):
    """A digest of all images' folders, names and classes; the data root does not matter."""
    digest = hashlib.sha256()
    for images in sets:
        for path, class_name in images.items():
            name = f"{'/'.join(path.split('/')[-2:])} {class_name}\n"
            digest.update(name.encode(errors="replace"))
    return digest.hexdigest()
