"""Data sets that are drawn: NAME/images/CLASS/* below the data root, and NAME/factors.csv."""

import csv
import os
import shutil
from pathlib import Path

from dataset.files import class_folders, halves
from utils import UserError


def read(root, name):
    folder = Path(root, name, "images")
    if not folder.exists():
        raise UserError(f"{folder}: not drawn yet; train.py --dataset {name} does")
    return halves(class_folders(folder), folder)


def folder_of(root, name):
    """The folder of the images to draw; UserError if `root` cannot be the data root."""
    if not Path(root).is_dir() and Path(root) != Path("data"):
        raise UserError(f"--data-root {root}: no such folder")
    if Path(root, "images").exists() and Path(root).resolve().name == name:
        raise UserError(f"--data-root {root}: use {Path(root).resolve().parent}")
    return Path(root, name, "images")


def factors_of(folder):
    """The list of what varies beside the class: path, relative to the list, and the factors."""
    return folder.with_name("factors.csv")


def write(folder, drawn):
    """Write the images, all or nothing, and their factors. drawn: CLASS/NAME, image, {factor:
    value} of each. Where the images are there already, only the factors are written."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    images, factors = unfinished / folder.name, factors_of(unfinished / folder.name)
    rows = []
    try:
        for name, image, values in drawn:
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(images / name, quality=90)  # of JPEGs
            rows.append({"path": f"{folder.name}/{name}", **values})
        with open(factors, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        factors.replace(factors_of(folder))
        try:
            images.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has drawn the same images meanwhile
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
