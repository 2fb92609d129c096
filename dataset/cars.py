"""Cars-196 (Krause et al., 2013): 196 car models, in any of the three forms it was published."""

from functools import partial

from scipy.io import loadmat

from dataset.files import below, class_folders, first_existing, halves, require_size
from utils import UserError

KS = (1, 2, 4, 8, 16, 32)
PUBLISHED = {"train": (8054, 98), "test": (8131, 98)}  # images, classes
RECIPE = {"lr_decay_step": 20}
PAPER = {"R@1": 87.9, "R@2": 92.6, "R@4": 95.7, "R@8": 97.4}  # per cent
SOURCE = "a copy of http://ai.stanford.edu/~jkrause/car196/, whose host is gone"
FILES = {
    "car_ims.tgz": ("d5c8f0aa497503f355e17dc7886c3f14", None),
    "cars_annos.mat": ("b407c6086d669747186bd1d764ff9dbc", None),
}

FOLDERS = (".", "car", "cars196")
TRAIN_LIST, TEST_LIST = "cars_train_annos.mat", "cars_test_annos_withlabels.mat"
LAYOUTS = ("cars_annos.mat", f"devkit/{TRAIN_LIST}", "car_data/car_data/train", "car_data/train")


def read(root):
    """The classes of the whole set in order, the first half of them trains, whichever half of the
    files their photographer put them in."""
    candidates = [f"{folder}/{layout}" for folder in FOLDERS for layout in LAYOUTS]
    found = first_existing(root, candidates, "cars")
    if found.name == "cars_annos.mat":
        items = read_annotations(found)
    elif found.name == TRAIN_LIST:
        items = read_devkit(found.parent)
    else:
        items = class_folders(found)
        if (found.parent / "test").is_dir():
            items += class_folders(found.parent / "test")
    return halves(items, found)


def read_annotations(file):
    """cars_annos.mat: the path is field 0, the 1-based class field 5; paths are beside it."""

    def parse(mat):
        annotations = mat["annotations"].ravel()
        path, label = annotations.dtype.names[0], annotations.dtype.names[5]
        names = class_names(mat.get("class_names"))
        return [
            (below(file.parent, str(row[path].item())), names(int(row[label].item())))
            for row in annotations
        ]

    return parse_mat(file, parse)


def read_devkit(folder):
    """The later dev-kit: named fields, one file for each of cars_train/ and cars_test/."""
    meta = folder / "cars_meta.mat"
    names = class_names(parse_mat(meta, lambda mat: mat["class_names"]) if meta.exists() else None)

    def parse(images, mat):
        return [
            (below(images, str(row["fname"].item())), names(int(row["class"].item())))
            for row in mat["annotations"].ravel()
        ]

    items = []
    for images, name in (("cars_train", TRAIN_LIST), ("cars_test", TEST_LIST)):
        file = first_existing(folder, (name, f"../{name}"), "cars dev-kit")
        items += parse_mat(file, partial(parse, folder.parent / images))
    return items


def class_names(cells):
    """class number -> name, by which classes are sorted: its number, and what MATLAB calls it."""
    known = [] if cells is None else [str(cell.item()) for cell in cells.ravel()]

    def name(number):
        if number < 1:
            raise ValueError("classes are counted from 1")
        return f"{number:03d} {known[number - 1] if number <= len(known) else ''}".strip()

    return name


def parse_mat(file, parse):
    """What `parse` makes of a .mat file's variables."""
    try:
        require_size(file)
        return parse(loadmat(file))
    except Exception as error:  # scipy fails in many ways on a damaged file
        raise UserError(f"{file}: not the MATLAB file of Cars ({error})") from error
