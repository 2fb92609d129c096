"""The data sets, under one name each: `load(name, root, split)`.

Each is a module with `read(root) -> {split: [(path, class name)]}` and

KS         of its Recall@K
PUBLISHED  {split: (images, classes)}
RECIPE     the flags of its published command that are not every data set's default
PAPER      the paper's recalls, in per cent
FILES      {path under the data root: (MD5, URL or None)} of what dataset.download fetches
SOURCE     where to get those by hand
OWN        of users' own images, the flag that says which they are
"""

import os
from collections import Counter
from importlib import import_module
from pathlib import Path

from dataset import table
from dataset.files import on_disk
from dataset.images import ImageSet
from utils import UserError, did_you_mean, plural, warn

MODULES = {  # --dataset: the file in this folder
    "cub": "cub",
    "cars": "cars",
    "SOP": "sop",
    "Inshop": "inshop",
    "demo": "demo",
    "folder": "folder",
}
DATASETS = {name: import_module(f"dataset.{module}") for name, module in MODULES.items()}
ALIASES = {"car": "cars"}  # differs: the script does not know the name its README uses
CHOICES = f"{', '.join(DATASETS)}, or a list FILE.csv or FILE.tsv"


def canonical_name(name):
    """The one spelling of a data set's name that folders and wandb projects use; a list's path."""
    if name.lower().endswith(table.SUFFIXES):
        return os.path.normpath(name)
    spellings = {known.lower(): known for known in DATASETS} | ALIASES
    if name.lower() not in spellings:
        near = did_you_mean(name.lower(), spellings)
        raise UserError(f"--dataset {name}: unknown data set{near}; choose from {CHOICES}")
    return spellings[name.lower()]


def module_of(name):
    return DATASETS.get(canonical_name(name), table)


def is_own(name):
    return hasattr(module_of(name), "OWN")


def title(name):
    """What a run folder and a wandb project call it: a list by its file's name."""
    return Path(name).stem if module_of(name) is table else canonical_name(name)


def ks(name, chosen=None):
    """The K of Recall@K: the chosen ones, else those for which the data set's is published."""
    return sorted(set(chosen or module_of(name).KS))


def read(name, root):
    """{split: [(path, class name)]}: what the data set's folders or lists name."""
    module = module_of(name)
    try:
        return module.read(name if module is table else root)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def prepare(name, root):
    """Make what can be made: train.py calls this, the demo draws its images."""
    if hasattr(module_of(name), "prepare"):
        module_of(name).prepare(root)


def load(name, root, split, transform=None):
    """One split of a data set as an ImageSet, in any layout it comes in: `train`, or `test`, which
    is `query` and then `gallery` where there are those, or `all` that there is.

    Warns where the files found are not the published ones: a subset is a fine thing to train on.
    Raises UserError when there are none, naming every path tried.
    """
    return image_set(name, read(name, root), split, transform)


def image_set(name, splits, split, transform=None):
    """`load` for what `read` has found."""
    against_gallery = split == "test" and "gallery" in splits
    parts = ["query", "gallery"] if against_gallery else list(splits) if split == "all" else [split]
    items = [on_disk_of(name, splits, part) for part in parts]
    queries = len(items[0]) if against_gallery else None
    images = ImageSet([item for part in items for item in part], transform, queries)
    if is_own(name):
        warn_of_oddities(name, split, images, splits)
    return images


def on_disk_of(name, splits, part):
    """The images of a split that are there."""
    items, missing = on_disk(splits.get(part, ()))
    if not items:
        reason = ""
        if part not in splits:
            reason = f", only {' and '.join(splits)}; add some"
            reason += ", or use --train-on all" if part == "test" else ""
        if missing:
            reason = f": none of the listed files is there, such as {missing[0]}"
        raise UserError(f"{name} {part}: there are no images{reason}")
    if difference := unlike_published(name, part, items):
        warn(difference)
    return items


def unlike_published(name, split, items):
    """A line that says how the counts differ from the published split's, or None."""
    found = (len(items), len({label for _, label in items}))
    published = getattr(module_of(name), "PUBLISHED", {}).get(split, found)
    if found == published:
        return None
    return (
        f"{name} {split}: found {plural(found[0], 'image')} of {plural(found[1], 'class')}, the "
        f"published split has {plural(published[0], 'image')} of {plural(published[1], 'class')}"
    )


def warn_of_oddities(name, split, images, splits):
    """What a folder or list of one's own may hold by mistake, by name and count."""

    def say(what, classes):
        if classes:
            names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            warn(f"{title(name)} {split}: {plural(len(classes), 'class')} {what}: {names}")

    labels, classes = images.labels.tolist(), images.classes
    counts = Counter(labels[images.queries or 0 :])  # of those among which matches are looked for
    need = 1 if images.queries else 2
    asked = sorted(set(labels[: images.queries]))
    unmatched = [classes[label] for label in asked if counts[label] < need]
    if split in ("train", "all"):
        say("of one image", unmatched)
        return
    say("without a match for a query", unmatched)
    if len(unmatched) == len(asked):
        warn(f"{title(name)} {split}: no query has a match, so every recall will be 0")
    trained = {label for _, label in splits.get("train", ())}
    say("also in train, so not unseen", [name for name in classes if name in trained])
