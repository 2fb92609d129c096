"""Cars-196 (Krause et al., 2013): 196 car models, in any of the three forms it was published."""

from concurrent.futures import ProcessPoolExecutor

from cli import UserError, leave_signals_to_parent
from dataset.files import class_folders, first_existing, half_of_classes, on_disk, require_size

KS = (1, 2, 4, 8, 16, 32)
PUBLISHED = {"train": (8054, 98), "test": (8131, 98)}  # images, classes

FOLDERS = (".", "car", "cars196")
TRAIN_LIST, TEST_LIST = "cars_train_annos.mat", "cars_test_annos_withlabels.mat"
LAYOUTS = ("cars_annos.mat", f"devkit/{TRAIN_LIST}", "car_data/car_data/train", "car_data/train")


def read(root, split):
    """([(path, label)], [missing path]); the classes of the whole set in order, the first half of
    them trains, whichever half of the files their photographer put them in."""
    candidates = [f"{folder}/{layout}" for folder in FOLDERS for layout in LAYOUTS]
    found = first_existing(root, candidates, "cars")
    if found.name == "cars_annos.mat":
        items, missing = read_annotations(found)
    elif found.name == TRAIN_LIST:
        items, missing = read_devkit(found.parent)
    else:
        items, missing = class_folders(found), []
        if (found.parent / "test").is_dir():
            items += class_folders(found.parent / "test")
    return half_of_classes(items, split, found), missing


def read_annotations(file):
    """cars_annos.mat: the path is field 0, the 1-based class field 5; paths are beside it."""
    return on_disk(file.parent, load_mat(file, annotated_paths), file)


def annotated_paths(annotations):
    path, label = annotations.dtype.names[0], annotations.dtype.names[5]
    return [(str(row[path].item()), int(row[label].item())) for row in annotations]


def read_devkit(folder):
    """The later dev-kit: named fields, one file for each of cars_train/ and cars_test/."""
    found, missing = [], []
    for images, name in (("cars_train", TRAIN_LIST), ("cars_test", TEST_LIST)):
        file = first_existing(folder, (name, f"../{name}"), "cars dev-kit")
        listed = [(f"{images}/{name}", label) for name, label in load_mat(file, devkit_names)]
        there, absent = on_disk(folder.parent, listed, file)
        found, missing = found + there, missing + absent
    return found, missing


def devkit_names(annotations):
    return [(str(row["fname"].item()), int(row["class"].item())) for row in annotations]


def load_mat(file, parse):
    """What `parse` makes of a .mat file's `annotations`. Read in a process of its own: scipy's
    reader is compiled code, which a crafted file can crash."""
    try:
        with ProcessPoolExecutor(1, initializer=leave_signals_to_parent) as pool:
            return pool.submit(parse_mat, file, parse).result()
    except Exception as error:  # scipy fails in many ways on a damaged file
        raise UserError(
            f"{file}: not a MATLAB file with the `annotations` of Cars ({error})"
        ) from error


def parse_mat(file, parse):
    from scipy.io import loadmat  # only here: the other data sets do without

    require_size(file)
    return parse(loadmat(file)["annotations"].ravel())
