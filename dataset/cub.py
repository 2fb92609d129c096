"""CUB-200-2011 (Wah et al., 2011): 200 bird species, a folder each."""

from dataset.files import class_folders, first_existing, halves

KS = (1, 2, 4, 8, 16, 32)
PUBLISHED = {"train": (5864, 100), "test": (5924, 100)}  # images, classes
PAPER = {"R@1": 70.0, "R@2": 79.6, "R@4": 87.1, "R@8": 92.0}  # per cent
SOURCE = "https://data.caltech.edu/records/65de6-vp158"
FILES = {
    "CUB_200_2011.tgz": ("97eceeb196236b17998738112f37df78", f"{SOURCE}/files/CUB_200_2011.tgz"),
}


def read(root):
    folder = first_existing(root, ("CUB_200_2011/images", "cub/images"), "cub")
    return halves(class_folders(folder), folder)
