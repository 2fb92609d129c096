"""CUB-200-2011 (Wah et al., 2011): 200 bird species, a folder each."""

import re

from dataset.files import by_class, class_folders, first_existing
from utils import UserError

KS = (1, 2, 4, 8, 16, 32)
PUBLISHED = {"train": (5864, 100), "test": (5924, 100)}  # images, classes
PAPER = {"R@1": 70.0, "R@2": 79.6, "R@4": 87.1, "R@8": 92.0}  # per cent
SOURCE = "https://data.caltech.edu/records/65de6-vp158"
FILES = {
    "CUB_200_2011.tgz": ("97eceeb196236b17998738112f37df78", f"{SOURCE}/files/CUB_200_2011.tgz"),
}


def read(root):
    """Classes 1 to 100 train, also in a subset."""
    folder = first_existing(root, ("CUB_200_2011/images", "cub/images"), "cub")
    return by_class(class_folders(folder), lambda name: number_of(folder / name) <= 100)


def number_of(folder):
    """The class number that the folder's name begins with."""
    digits = re.match("[0-9]+", folder.name)
    if not digits:
        raise UserError(f"{folder}: CUB's folders are named as in 001.Black_footed_Albatross, and "
                        "the number says which classes train; rename it or move it away, or use "
                        "--dataset folder for images of your own")  # fmt: skip
    return int(digits[0])
