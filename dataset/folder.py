"""Users' own images: train/CLASS/* and test/CLASS/*, or CLASS/*, where half the classes train."""

import os
from pathlib import Path

from dataset.files import class_folders, halves, listing
from utils import UserError, warn

KS = (1, 2, 4, 8)
OWN = "data_root"  # the flag that says where they are


def read(root):
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    above = folder.resolve().parent
    if folder.resolve().name in ("train", "test") and {"train", "test"} <= {*os.listdir(above)}:
        raise UserError(f"--data-root {root}: has one half of the images; use {above}")
    inside = listing(folder)
    for path in inside:
        if path.name.lower() in ("train", "test") and not path.name.islower() and path.is_dir():
            if any(map(Path.is_dir, path.iterdir())):  # else it is a class of that name
                raise UserError(f"{path}: rename it to {path.name.lower()}, in lower case")
    splits = [half for half in ("train", "test") if any(map(Path.is_dir, folder.glob(f"{half}/*")))]
    if splits:
        if others := [path for path in inside if path.name not in splits]:
            names = " and ".join(splits)
            warn(f"{folder}: skipped {len(others):,} beside {names}, such as {others[0]}")
        return {split: class_folders(folder / split) for split in splits}
    if not any(path.is_dir() for path in inside):
        raise UserError(f"--data-root {root}: has no folders in it; put the images into one folder "
                        f"per class: {folder}/CLASS/NAME.jpg")  # fmt: skip
    return halves(class_folders(folder), folder)
