"""The images of one split."""

import hashlib

import torch
from torch.utils.data import Dataset

from dataset.files import read_image


class ImageSet(Dataset):
    """`paths` and `labels` [N] of one split, and `classes`, the name of each label 0 .. C - 1;
    item i is (RGB image after `transform`, label)."""

    def __init__(self, items, transform=None):
        self.paths = [path for path, _ in items]
        self.classes = sorted({name for _, name in items})
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[name] for _, name in items])
        self.transform = transform
        self.read = read_image  # or a dataset.cache.Cache

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = self.read(self.paths[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])


def digest_of_names(*splits):
    """A digest of the images' names and classes, wherever the data root is."""
    digest = hashlib.sha256()
    for images in splits:
        for path, label in zip(images.paths, images.labels.tolist()):
            name = f"{'/'.join(path.split('/')[-2:])} {images.classes[label]}\n"
            digest.update(name.encode(errors="replace"))
    return digest.hexdigest()
