"""Cars-196 (Krause et al., 2013): 196 car models, in any of the three forms it was published."""

from scipy.io import loadmat

from dataset.images import class_folders, first_existing, half_of_classes, on_disk
from utils import UserError

KS = (1, 2, 4, 8, 16, 32)
PUBLISHED = {"train": (8054, 98), "test": (8131, 98)}  # images, classes

FOLDERS = (".", "car", "cars196")
LAYOUTS = ("cars_annos.mat", "devkit", "car_data/car_data/train", "car_data/train")


def read(root, split):
    """[(path, label)]; the classes of the whole set in order, the first half of them trains,
    whichever half of the files their photographer put them in."""
    candidates = [f"{folder}/{layout}" for folder in FOLDERS for layout in LAYOUTS]
    found = first_existing(root, candidates, "cars")
    if found.name == "cars_annos.mat":
        items = read_annotations(found)
    elif found.name == "devkit":
        items = read_devkit(found)
    else:
        items = class_folders(found)
        if (found.parent / "test").is_dir():
            items += class_folders(found.parent / "test")
    return half_of_classes(items, split, found)


def read_annotations(file):
    """cars_annos.mat: the path is field 0, the 1-based class field 5; paths are beside it."""
    annotations = load_mat(file)
    path, label = annotations.dtype.names[0], annotations.dtype.names[5]
    items = [(str(row[path].item()), int(row[label].item())) for row in annotations]
    return on_disk(file.parent, items, file)


def read_devkit(folder):
    """The later dev-kit: named fields, one file for each of cars_train/ and cars_test/."""
    items = []
    for images, name in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        file = first_existing(folder, (name, f"../{name}"), "cars dev-kit")
        listed = [
            (f"{images}/{row['fname'].item()}", int(row["class"].item())) for row in load_mat(file)
        ]
        items += on_disk(folder.parent, listed, file)
    return items


def load_mat(file):
    try:
        return loadmat(file)["annotations"].ravel()
    except Exception as error:  # scipy fails in many ways on a damaged file
        raise UserError(f"{file}: not a MATLAB file with `annotations` ({error})") from error
