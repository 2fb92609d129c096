"""The data sets by name: `load(name, root, split)`.

Each is a module with `read(root) -> {split: [(path, class name)]}`, `KS` and what it has of these:

KS         the K of its Recall@K
PUBLISHED  {split: (images, classes)}
RECIPE     the flags of its published command that differ from the defaults
PAPER      the paper's recalls, in per cent
FILES      {path under the data root: (MD5, URL or None)}, which dataset.download fetches
SOURCE     where to get these files by hand
OWN        the flag that says where users' own images are; all other images are read as published
"""

import os
from collections import Counter
from importlib import import_module
from pathlib import Path

from dataset import table
from dataset.files import WHITE, found_and_missing
from dataset.images import ImageSet
from flags import flag_of
from utils import UserError, did_you_mean, plural, warn

DATASETS = {
    "cub": import_module("dataset.cub"),
    "cars": import_module("dataset.cars"),
    "SOP": import_module("dataset.sop"),
    "Inshop": import_module("dataset.inshop"),
    "demo": import_module("dataset.demo"),
    "kanji": import_module("dataset.kanji"),
    "folder": import_module("dataset.folder"),
}
ALIASES = {"car": "cars"}  # differs: the script does not know the name its README uses
CHOICES = f"{', '.join(DATASETS)}, or a list FILE.csv or FILE.tsv"


def canonical_name(name):
    """The data set's name as run folders and wandb projects spell it; for a list, its path."""
    if name.lower().endswith(table.SUFFIXES):
        return os.path.normpath(name)
    spellings = {known.lower(): known for known in DATASETS} | ALIASES
    if name.lower() not in spellings:
        near = did_you_mean(name.lower(), spellings)
        raise UserError(f"--dataset {name}: unknown data set{near}; choose from {CHOICES}")
    return spellings[name.lower()]


def module_of(name):
    return DATASETS.get(canonical_name(name), table)


def own_flag(name):
    """The flag that says where users' own images are; None for a published data set."""
    return getattr(module_of(name), "OWN", None)


def title(name):
    """The name in run folders and wandb projects; a list is called by its file's name."""
    return Path(name).stem if module_of(name) is table else canonical_name(name)


def ks(name, chosen=None):
    """The K of Recall@K, sorted: `chosen`, by default the data set's."""
    return sorted(set(chosen or module_of(name).KS))


def read(name, root):
    """{split: [(path, class name)]}, from the data set's folders or lists."""
    module = module_of(name)
    return module.read(name if module is table else root)


def own_folder(name, root):
    """The folder that users' own images are in."""
    return Path(name).parent if module_of(name) is table else Path(root)


def refuse_own_flags(args):
    """UserError if a flag for users' own images is given with a published data set."""
    for flag in ("background", "skip_unreadable"):
        if getattr(args, flag) and not own_flag(args.dataset):
            raise UserError(f"{flag_of(flag)}: only for images of your own; {args.dataset} is read "
                            "as the published script reads it")  # fmt: skip


def prepare(name, root):
    """Draw the images of demo or kanji; other data sets need nothing before training."""
    if hasattr(module_of(name), "prepare"):
        module_of(name).prepare(root)


def load(name, root, split, transform=None, background=None):
    """One split as an ImageSet: `train`, `all`, or `test` (queries, then the gallery, if any).
    background: the colour under transparent pixels of users' own images, by default white."""
    return image_set(name, read(name, root), split, transform, background)


def image_set(name, splits, split, transform=None, background=None):
    """`load`, with the splits that `read` returned."""
    background = background or WHITE if own_flag(name) else None
    has_gallery = split == "test" and "gallery" in splits
    parts = ["query", "gallery"] if has_gallery else [split]
    if split == "all":
        parts = [part for part in splits if splits[part]] or ["train"]
    items = [images_on_disk(name, splits, part) for part in parts]
    images = ImageSet(sum(items, []), transform, len(items[0]) if has_gallery else None,
                      background)  # fmt: skip
    if own_flag(name):
        warn_of_odd_classes(f"{title(name)} {split}", images, splits, split)
    return images


def images_on_disk(name, splits, part):
    items, missing = found_and_missing(splits.get(part, ()))
    if not items:
        reason = f": none of the listed files is there, such as {missing[0]}" if missing else ""
        others = [name for name in splits if splits[name]]
        if others and not splits.get(part):
            reason = f", only for {' and '.join(others)}; add some"
            reason += ", or use --train-on all" if part == "test" else ""
        raise UserError(f"{name} {part}: there are no images{reason}")
    if difference := difference_from_published(name, part, items):
        warn(difference)
    return items


def difference_from_published(name, split, items):
    """A line if the numbers of images or classes differ from the published ones, else None."""
    found = (len(items), len({label for _, label in items}))
    published = getattr(module_of(name), "PUBLISHED", {}).get(split, found)
    if found != published:
        counts = [f"{plural(i, 'image')} of {plural(c, 'class')}" for i, c in (found, published)]
        return f"{name} {split}: found {counts[0]}, the published split has {counts[1]}"


def warn_of_odd_classes(where, images, splits, split):
    """Warn of classes of users' own images that are probably a mistake."""

    def warn_of(what, classes):
        if classes:
            names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            warn(f"{where}: {plural(len(classes), 'class')} {what}: {names}")

    labels = images.labels.tolist()
    gallery_counts = Counter(labels[images.queries or 0 :])
    needed = 1 if images.queries else 2  # without a gallery, a query is among its own matches
    queried = sorted(set(labels[: images.queries]))
    unmatched = [images.classes[label] for label in queried if gallery_counts[label] < needed]
    if split in ("train", "all"):
        warn_of("of one image", unmatched)
        return
    warn_of("without a match for a query", unmatched)
    if len(unmatched) == len(queried):
        warn(f"{where}: no query has a match, so every recall will be 0")
    trained = {name for _, name in splits.get("train", ())}
    warn_of("also in train, so not unseen", [name for name in images.classes if name in trained])
