"""The data sets, under one name each: `load(name, root, split)`.

Each is a module with `read(root) -> {split: [(path, class name)]}`, the KS of its Recall@K, and,
where there is one, its PUBLISHED split.
"""

from dataset import cars, cub, demo, sop
from dataset.files import on_disk
from dataset.images import ImageSet
from utils import UserError, plural, warn

DATASETS = {"cub": cub, "cars": cars, "SOP": sop, "demo": demo}
ALIASES = {"car": "cars"}  # differs: the script does not know the name its README uses


def canonical_name(name):
    """The one spelling of a data set's name that folders and wandb projects use."""
    spellings = {known.lower(): known for known in DATASETS} | ALIASES
    if name.lower() not in spellings:
        raise UserError(f"--dataset {name}: unknown data set, choose from {', '.join(DATASETS)}")
    return spellings[name.lower()]


def ks(name):
    """The K for which this data set's Recall@K is published."""
    return DATASETS[canonical_name(name)].KS


def load(name, root, split, transform=None):
    """One split of a data set, `train` or `test`, as an ImageSet, in any layout it comes in.

    Warns where the files found are not the published ones: a subset is a fine thing to train on.
    Raises UserError when there are none, naming every path tried.
    """
    splits = read(name, root)
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, not {split}")
    items, missing = on_disk(splits[split])
    if not items:
        such_as = f": none of the listed files is there, such as {missing[0]}" if missing else ""
        raise UserError(f"{name} {split}: there are no images{such_as}")
    difference = unlike_published(name, split, items)
    if difference:
        warn(difference)
    return ImageSet(items, transform)


def read(name, root):
    """{split: [(path, class name)]}: what the data set's folders or lists name."""
    try:
        return DATASETS[canonical_name(name)].read(root)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def unlike_published(name, split, items):
    """A line that says how the counts differ from the published split's, or None."""
    found = (len(items), len({label for _, label in items}))
    published = getattr(DATASETS[canonical_name(name)], "PUBLISHED", {}).get(split, found)
    if found == published:
        return None
    return (
        f"{name} {split}: found {plural(found[0], 'image')} of {plural(found[1], 'class')}, the "
        f"published split has {plural(published[0], 'image')} of {plural(published[1], 'class')}"
    )
