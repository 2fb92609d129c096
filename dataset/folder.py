"""A folder of one's own: train/CLASS/* and test/CLASS/*, or CLASS/*, split by class as CUB is."""

import os
from pathlib import Path

from dataset.files import class_folders, halves, listing
from utils import UserError, warn

KS = (1, 2, 4, 8)
OWN = "data_root"  # the flag that says which images


def read(root):
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    above = folder.resolve().parent
    if folder.resolve().name in ("train", "test") and {"train", "test"} <= {*os.listdir(above)}:
        raise UserError(f"--data-root {root}: is one half of the images; use {above}")
    halves_there = (folder / "train", folder / "test")
    splits = [half.name for half in halves_there if any(map(Path.is_dir, half.glob("*")))]
    if splits:
        others = [str(path) for path in listing(folder) if path.name not in splits]
        if others:
            what = f"{len(others):,} beside {' and '.join(splits)}, such as {others[0]}"
            warn(f"{folder}: skipped {what}")
        return {split: class_folders(folder / split) for split in splits}
    if not any(path.is_dir() for path in listing(folder)):
        raise UserError(
            f"--data-root {root}: has no folders in it; images belong into one folder per class: "
            f"{folder / 'CLASS' / 'NAME.jpg'}"
        )
    return halves(class_folders(folder), folder)
