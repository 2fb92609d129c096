"""Stanford Online Products (Oh Song et al., 2016): 22,634 products, lists for train and test."""

from dataset.files import beside, first_existing, require_size
from utils import UserError

KS = (1, 10, 100, 1000)
PUBLISHED = {"train": (59551, 11318), "test": (60502, 11316)}  # images, classes


def read(root):
    """In the lists' order; a class's name is its number in them, of five digits."""
    return {split: read_list(root, f"Ebay_{split}.txt") for split in ("train", "test")}


def read_list(root, name):
    file = first_existing(root, (f"Stanford_Online_Products/{name}", f"sop/{name}"), "SOP")
    try:
        require_size(file)
        header, *lines = file.read_text().splitlines()
        if "image_id" not in header:
            raise ValueError("the header is missing")  # the first image would be taken for it
        rows = [line.split() for line in lines if line.strip()]
        items = [(path, int(class_id)) for _, class_id, _, path in rows]
        if not all(class_id > 0 for _, class_id in items):
            raise ValueError("class ids are counted from 1")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: each line after the header must be `image_id class_id super_class_id path` "
            f"({error})"
        ) from error
    return [(beside(file, path), f"{class_id:05d}") for path, class_id in items]
