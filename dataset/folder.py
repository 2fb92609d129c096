"""A folder of one's own: train/CLASS/* and test/CLASS/*, or CLASS/*, split by class as CUB is."""

from pathlib import Path

from dataset.files import class_folders, halves, listing
from utils import UserError

KS = (1, 2, 4, 8)
OWN = True


def read(root):
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    given = [split for split in ("train", "test") if (folder / split).is_dir()]
    if given:
        return {split: class_folders(folder / split) for split in given}
    if not any(path.is_dir() for path in listing(folder)):
        raise UserError(
            f"--data-root {root}: has no folders in it; images belong into one folder per class: "
            f"{folder / 'CLASS' / 'NAME.jpg'}"
        )
    return halves(class_folders(folder), folder)
