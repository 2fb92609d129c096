"""The images of one split, and whether a network was trained on them."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dataset.files import read_image
from utils import progress


class ImageSet(Dataset):
    """One split: `paths` and `labels` [N], `classes`, the names of labels 0 .. C - 1. Item i is
    (RGB image after `transform`, label). The first `queries` images are queries, the rest the
    gallery; None: each image queries all others. `background`: as in read_image."""

    def __init__(self, items, transform=None, queries=None, background=None):
        self.paths = [path for path, _ in items]
        self.classes = sorted({name for _, name in items})
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([label_of[name] for _, name in items])
        self.transform, self.queries, self.background = transform, queries, background

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index], self.background)
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def items(self):
        """[(path, class name)]"""
        return list(zip(self.paths, (self.classes[label] for label in self.labels.tolist())))

    def hold_out(self, fraction, fold):
        """(rest, held): two ImageSets. The sorted classes are cut into folds, each a `fraction` of
        them; `held` is fold number `fold`, from 0. ValueError if there is no such fold."""
        count, labels, items = len(self.classes), self.labels.tolist(), self.items()
        start, stop = (round(i * fraction * count) for i in (fold, fold + 1))
        if not 0 <= start < stop <= count:
            raise ValueError(f"hold_out({fraction}, {fold}): no such fold of {count} classes")

        def side(is_held):
            chosen = [i for i, label in enumerate(labels) if (start <= label < stop) == is_held]
            queries = self.queries and sum(i < self.queries for i in chosen)
            return ImageSet([items[i] for i in chosen], self.transform, queries, self.background)

        return side(False), side(True)


def digest_of_names(sets):
    """A digest of all images' folders, names and classes, independent of the data root."""
    return digest_of(f"{name}\n" for images in sets for name in names_in(images))


def digest_of_contents(images, files):
    """The same with `files` (from digests_of_files), and independent of the images' order."""
    named = zip(names_in(images), files.tolist())
    return digest_of(sorted(f"{name} {file}\n" for name, file in named))


def names_in(images):
    return [f"{'/'.join(path.split('/')[-2:])} {class_name}" for path, class_name in images.items()]


def digest_of(lines):
    return hashlib.sha256("".join(lines).encode(errors="replace")).hexdigest()


def digests_of_files(paths):
    """int64 [N]: the first 8 bytes of each file's SHA-256; a missing file counts as empty."""

    def digest(path):  # opening a pipe would wait forever
        data = Path(path).read_bytes() if os.path.isfile(path) else b""
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True)

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        digests = progress(pool.map(digest, paths), len(paths), "hashing files")
        return torch.tensor([*digests], dtype=torch.int64)


def trained_on(images):
    """A checkpoint's record of its training images: {"classes": [names], "files": int64 [N]}."""
    return {"classes": images.classes, "files": digests_of_files(images.paths)}


def union(parts):
    """One record of several from `trained_on`, without those that are None; None if all are."""
    known = [part for part in parts if part]
    return {"classes": sorted({name for part in known for name in part["classes"]}),
            "files": torch.cat([part["files"] for part in known])} if known else None  # fmt: skip


def counts_of(images, known=None):
    """{split: {"images", "classes", "digest"}} of {split: ImageSet}. Beside val there is "train +
    val", the same for every fold. `known`, a record from `trained_on`, adds to val and test how
    many of their classes (by name) and images (by content) were trained on."""
    files = {split: digests_of_files(each.paths) for split, each in images.items()}
    if "val" in images:
        images = images | {"train + val": ImageSet(images["train"].items() + images["val"].items())}
        files["train + val"] = torch.cat([files["train"], files["val"]])
    counts = {}
    for split, each in images.items():
        counts[split] = {"images": len(each), "classes": len(each.classes),
                         "digest": digest_of_contents(each, files[split])}  # fmt: skip
        if known and "train" not in split:
            counts[split]["trained_on"] = {
                "classes": len({*each.classes} & {*known["classes"]}),
                "images": int(torch.isin(files[split], known["files"]).sum()),
            }
    return counts
