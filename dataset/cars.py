"""Cars-196 (Krause et al., 2013): 196 car models, in any of its three published layouts."""

from scipy.io import loadmat

from dataset.files import below, by_class, class_folders, first_existing
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
    """Classes 1 to 98 train, also in a subset, whichever published folder an image is in."""
    candidates = [f"{folder}/{layout}" for folder in FOLDERS for layout in LAYOUTS]
    found = first_existing(root, candidates, "cars")
    if found.name == "cars_annos.mat":
        items = read_mat([found], found.parent, 0, 5)
    elif found.name == TRAIN_LIST:  # the later dev-kit
        items = []
        for images, name in (("cars_train", TRAIN_LIST), ("cars_test", TEST_LIST)):
            file = first_existing(found.parent, (name, f"../{name}"), "cars dev-kit")
            files = [*found.parent.glob("cars_meta.mat"), file]
            items += read_mat(files, found.parent.parent / images, "fname", "class")
    else:
        items = class_folders(found)
        if (found.parent / "test").is_dir():
            items += class_folders(found.parent / "test")
        # names have no numbers here: class 98 is an Eagle Talon, class 99 a FIAT
        return by_class(items, lambda name: name < "F")
    return by_class(items, lambda name: int(name.split()[0]) <= 98)


def read_mat(files, images, path, label):
    """[(path, class name)] from .mat files. One has the annotations, one may have class names;
    `path` and `label` are the annotations' fields."""
    mat, items = {}, []
    try:
        for file in files:
            mat |= loadmat(file)
        cells = mat["class_names"].ravel() if "class_names" in mat else []
        for row in mat["annotations"].ravel():
            number = int(row[label].item())
            if number < 1:
                raise ValueError("class numbers start at 1")
            name = cells[number - 1].item() if number <= len(cells) else ""
            # classes are sorted by name, so the number comes first
            items.append((below(images, str(row[path].item())), f"{number:03d} {name}".strip()))
    except Exception as error:  # scipy fails in many ways on a damaged file
        raise UserError(f"{file}: not the MATLAB file of Cars ({error})") from error
    return items
