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
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[name] for _, name in items])
        self.transform, self.queries = transform, queries

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def hold_out(self, fraction, fold):
        """(rest, held): two ImageSets of whole classes, `held` with the `fold`-th (from 0) of the
        contiguous folds, each `fraction` of the sorted classes; ValueError if there is none."""
        start, stop = (round(i * fraction * len(self.classes)) for i in (fold, fold + 1))
        if not 0 <= start < stop <= len(self.classes):
            raise ValueError(
                f"hold_out({fraction}, {fold}): no such fold of {len(self.classes)} classes"
            )
        names = [self.classes[label] for label in self.labels.tolist()]
        in_fold = set(self.classes[start:stop])
        held = [name in in_fold for name in names]

        def side(is_held):
            items = [item for item, h in zip(zip(self.paths, names), held) if h == is_held]
            queries = self.queries and held[: self.queries].count(is_held)
            return ImageSet(items, self.transform, queries)

        return side(False), side(True)


def digest_of_names(sets):
    """A digest of the names and classes of all images, wherever the data root is."""
    digest = hashlib.sha256()
    for images in sets:
        for path, label in zip(images.paths, images.labels.tolist()):
            name = f"{'/'.join(path.split('/')[-2:])} {images.classes[label]}\n"
            digest.update(name.encode(errors="replace"))
    return digest.hexdigest()
