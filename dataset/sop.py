"""Stanford Online Products (Oh Song et al., 2016): 22,634 products, lists for train and test."""

from dataset.files import below, first_existing, parse_list

KS = (1, 10, 100, 1000)
PUBLISHED = {"train": (59551, 11318), "test": (60502, 11316)}  # images, classes
RECIPE = {"lr_decay_step": 20, "lr_decay_gamma": 0.25, "bn_freeze": False}
PAPER = {"R@1": 79.9, "R@10": 91.1, "R@100": 96.2, "R@1000": 98.6}  # per cent
SOURCE = ("ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip (often down; its page is "
          "https://cvgl.stanford.edu/projects/lifted_struct/)")  # fmt: skip
FILES = {  # not by FTP: urllib cannot resume it
    "Stanford_Online_Products.zip": (
        "7f73d41a2f44250d4779881525aea32e",
        "https://drive.usercontent.google.com/download?id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8"
        "&export=download&confirm=t",
    ),
}


def read(root):
    """A class is named by its number, in five digits."""
    return {split: read_list(root, f"Ebay_{split}.txt") for split in ("train", "test")}


def read_list(root, name):
    file = first_existing(root, (f"Stanford_Online_Products/{name}", f"sop/{name}"), "SOP")

    def parse(image_id, class_id, super_class_id, path):
        if int(class_id) < 1:
            raise ValueError("class numbers start at 1")
        return below(file.parent, path), f"{int(class_id):05d}"

    return parse_list(file, parse, "image_id class_id super_class_id path", header=1)
