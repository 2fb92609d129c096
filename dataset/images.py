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
    """`paths` and `labels` [N] of one split, and `classes`, the name of each label 0 .. C - 1;
    item i is (RGB image after `transform`, label). The first `queries` images are queries, the rest
    the gallery; None: each image queries all others. `background`: as in read_image."""

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

    def joined(self, other):
        """Undoes hold_out, in another order."""
        return ImageSet(self.items() + other.items(), background=self.background)

    def hold_out(self, fraction, fold):
        """(rest, held): two ImageSets of whole classes. Folds are contiguous, each `fraction` of
        the sorted classes; `held` has the `fold`-th, from 0. ValueError if there is none."""
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
    """A digest of all images' folders, names and classes; the data root does not matter."""
    digest = hashlib.sha256()
    for images in sets:
        for path, class_name in images.items():
            name = f"{'/'.join(path.split('/')[-2:])} {class_name}\n"
            digest.update(name.encode(errors="replace"))
    return digest.hexdigest()


def digests_of_files(paths):
    """int64 [N]: the first 8 bytes of the SHA-256 of each file's content."""

    def digest(path):  # opening a pipe would wait forever
        data = Path(path).read_bytes() if os.path.isfile(path) else b""
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True)

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        digests = progress(pool.map(digest, paths), len(paths), "hashing files")
        return torch.tensor([*digests], dtype=torch.int64)


def trained_on(images):
    """What a checkpoint keeps of an ImageSet: {"classes": [names], "files": int64 [N]}."""
    return {"classes": images.classes, "files": digests_of_files(images.paths)}


def union(parts):
    """Several `trained_on` as one, without those that are None; None if all are."""
    known = [part for part in parts if part]
    return {"classes": sorted({name for part in known for name in part["classes"]}),
            "files": torch.cat([part["files"] for part in known])} if known else None  # fmt: skip


def counts_of(images, known=None):
    """{split: {"images", "classes", "digest"}} of {split: ImageSet}. "train + val": of both, the
    same for every fold. Of all splits but these and train also how many are in `known`, a
    `trained_on`: classes by name, images by content."""
    files = {split: digests_of_files(each.paths) for split, each in images.items()}
    if "val" in images:
        images = images | {"train + val": images["train"].joined(images["val"])}
        files["train + val"] = torch.cat([files["train"], files["val"]])
    counts = {}
    for split, each in images.items():
        counts[split] = {"images": len(each), "classes": len(each.classes),
                         "digest": digest_of(each, files[split])}  # fmt: skip
        if known and "train" not in split:
            counts[split]["trained_on"] = {
                "classes": len({*each.classes} & {*known["classes"]}),
                "images": int(torch.isin(files[split], known["files"]).sum()),
            }
    return counts


def digest_of(images, files):
    """A digest of folders, names, classes and content; the order and the data root do not matter.
    files: of digests_of_files."""
    lines = [f"{'/'.join(path.split('/')[-2:])} {class_name} {file}\n"
             for (path, class_name), file in zip(images.items(), files.tolist())]  # fmt: skip
    return hashlib.sha256("".join(sorted(lines)).encode(errors="replace")).hexdigest()
