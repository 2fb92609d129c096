"""The data sets, under one name each: `load(name, root, split, transform)`."""

from dataset import cars, cub, demo, sop
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
    """The `train` or `test` images of a data set, as an ImageSet, in any layout it comes in.

    Warns where the files found are not the published ones: a subset is a fine thing to train on.
    Raises UserError when there are none, naming every path tried.
    """
    name = canonical_name(name)
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split}")
    try:
        images = ImageSet(*DATASETS[name].read(root, split), transform)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    difference = unlike_published(name, split, images)
    if difference:
        warn(difference)
    return images


def unlike_published(name, split, images):
    """A line that says how the counts differ from the published split's, or None."""
    found = (len(images), images.num_classes)
    published = getattr(DATASETS[canonical_name(name)], "PUBLISHED", {}).get(split, found)
    if found == published:
        return None
    return (
        f"{name} {split}: found {plural(found[0], 'image')} of {plural(found[1], 'class')}, the "
        f"published split has {plural(published[0], 'image')} of {plural(published[1], 'class')}"
    )
