"""Drawn data sets: NAME/images/CLASS/* and NAME/factors.csv under the data root."""

import csv
import os
import shutil
from pathlib import Path

from dataset.files import class_folders, halves
from utils import UserError


def read(root, name):
    folder = Path(root, name, "images")
    if not folder.exists():
        raise UserError(f"{folder}: not drawn yet; train.py --dataset {name} draws it if there is "
                        f"no {folder.parent}")  # fmt: skip
    return halves(class_folders(folder), folder)


def folder_of(root, name):
    """The folder to draw into; UserError if `root` cannot be the data root."""
    if not Path(root).is_dir() and Path(root) != Path("data"):
        raise UserError(f"--data-root {root}: no such folder")
    if Path(root, "images").exists() and Path(root).resolve().name == name:
        raise UserError(f"--data-root {root}: use {Path(root).resolve().parent}")
    return Path(root, name)


def write(folder, drawn):
    """Write images/ and factors.csv into `folder`, all or nothing. drawn: (CLASS/NAME, image,
    {factor: value}) for each image."""
    unfinished, rows = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), []
    try:
        for name, image, values in drawn:
            path = unfinished / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)  # PNG ignores it
            rows.append({"path": f"images/{name}", **values})
        with open(unfinished / "factors.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "images").exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
