"""The images of one split, and which they are."""

import hashlib

import torch
from torch.utils.data import Dataset

from dataset.files import read_image


class ImageSet(Dataset):
    """`paths` and `labels` [N] of one split; item i is (RGB image after `transform`, label).

    Training labels are 0 .. num_classes - 1, so that they index the proxies.
    """

    def __init__(self, items, transform=None):
        self.paths = [path for path, _ in items]
        self.labels = torch.tensor([label for _, label in items])
        self.num_classes = len(self.labels.unique())
        self.transform = transform
        self.read = read_image  # or a dataset.cache.Cache

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = self.read(self.paths[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])


def digest_of_names(*splits):
    """A digest of the images' names and labels, wherever the data root is."""
    digest = hashlib.sha256()
    for images in splits:
        for path, label in zip(images.paths, images.labels.tolist()):
            digest.update(f"{'/'.join(path.split('/')[-2:])} {label}\n".encode(errors="replace"))
    return digest.hexdigest()
