"""What a user can get wrong, and what nobody trusts: each ends in one line that names it, exit
status 2, no traceback, and what was there before is still there."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dataset.files import read_image
from tests.conftest import (
    SOP,
    TINY,
    fails,
    make_cars,
    make_cars_devkit,
    make_cub,
    make_sop,
    replaced_by_folder,
    snapshot,
)

JPEG = "CUB_200_2011/images/001.Bird_0/Bird_0003.jpg"


def junk(here):
    (here / "junk").write_bytes(b"junk")


FLAGS = [
    # flags                          the line has
    ("--batch-size 21",              "--batch-size 21: larger than the 20 training"),
    ("--batch-size 0",               "--batch-size: invalid number"),
    ("--dataset birds",              "--dataset birds: unknown data set"),
    ("--model resnet50",             "--model: invalid choice: 'resnet50'"),
    ("--loss Triplet",               "--loss: invalid choice: 'Triplet'"),
    ("--optimizer lamb",             "--optimizer: invalid choice: 'lamb'"),
    ("--data-root nowhere",          "tried nowhere/CUB_200_2011/images, nowhere/cub/images"),
    ("--disent maybe",               "--disent: invalid boolean value: 'maybe'"),
    ("--bn-freeze 2",                "--bn-freeze: invalid boolean value: '2'"),
    ("--lr fast",                    "--lr: invalid number"),
    ("--lr nan",                     "--lr: invalid number"),
    ("--lr -1",                      "--lr: invalid number"),
    ("--lr 1e36",                    "--lr: invalid number"),
    ("--alpha inf",                  "--alpha: invalid number"),
    ("--epochs 0",                   "--epochs: invalid number"),
    ("--seed -1",                    "--seed: invalid number"),
    ("--image-size 104",             "--image-size: BN-Inception takes multiples of 32"),
    ("--IPC 3",                      "--IPC 3"),
    ("--IPC 2",                      "--IPC 2"),
    ("--batch 8",                    "unrecognized arguments: --batch 8"),
    ("--remark a/b",                 "--remark: a folder's name cannot hold 'a/b'"),
    (f"--remark {'x' * 250}",        "too long"),
    (f"--LOG_DIR {'x' * 300}",       "File name too long"),
    ("--remark '\udcff'",            "a folder's name cannot hold"),
    ("--embedding-size 1000000000",  "--embedding-size: invalid number"),
    ("--batch-size 9223372036854775808", "--batch-size: invalid number"),
    ("--image-size 320000",          "--image-size: BN-Inception takes"),
    ("--gpu-id -2",                  "--gpu-id: invalid number"),
    ("--checkpoint-every 0",         "--checkpoint-every: invalid number"),
    ("--weights nowhere.pth",        "nowhere.pth: no such checkpoint"),
    ("--weights junk",               "junk: not a checkpoint"),
    ("--weights imagenet",           "--weights imagenet: not in"),
    ("--resume",                     "--resume: there is no run in"),
    ("--resume nowhere.pth",         "nowhere.pth: no such checkpoint"),
    ("--resume junk",                "junk: not a checkpoint"),
    ("--resume --overwrite",         "--overwrite: not allowed with argument --resume"),
    ("--wandb online",               "--wandb online: no account"),
    ("--LOG_DIR junk",               "junk/logs_cub"),
]  # fmt: skip


@pytest.mark.parametrize("flags, line", FLAGS)
def test_a_bad_flag_ends_in_one_line(here, capsys, flags, line):
    junk(here)
    make_cub(here / "data")
    before = snapshot(here)
    assert line in fails(TINY + flags, capsys)
    assert snapshot(here) == before


def png(width, height, bits=8, colour=0):
    """A PNG that claims this size and holds hardly any data."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(bytes(100))
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def as_bytes(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
IMAGES = {
    "empty": b"",
    "text": b"not an image",
    "a web page": b"<html>404</html>",
    "torn after the header": as_bytes(NOISE, "JPEG")[:200],
    "torn in the middle": as_bytes(NOISE, "JPEG")[:2000],
    "torn PNG": as_bytes(NOISE, "PNG")[:3000],
    "a decompression bomb": png(30000, 30000),
    "half a decompression bomb": png(12000, 12000),
    "16 bits": as_bytes(Image.fromarray(np.full((40, 40), 40000, np.uint16)), "PNG"),
    "16 bits of RGB": png(40, 40, bits=16, colour=2),
    "16 bits of RGB in a PPM": b"P6\n40 40\n65535\n" + bytes(40 * 40 * 6),
    "16 bits of RGB in a plain PPM": b"P3\n40 40\n1023\n" + b"7 " * 40 * 40 * 3,
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "a thread": as_bytes(Image.new("L", (1, 8000)), "PNG"),
    "floating point": as_bytes(Image.fromarray(np.ones((40, 40), np.float32)), "TIFF"),
    "a folder": replaced_by_folder,
    "a dangling link": dangling,
    "half a gigabyte": lambda path: os.truncate(path, 2**29),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_ends_in_one_line_that_names_it(here, capsys, kind, workers):
    path = make_cub(here / "data") / JPEG
    if callable(IMAGES[kind]):
        IMAGES[kind](path)
    else:
        path.write_bytes(IMAGES[kind])
    assert JPEG in fails(TINY + f"--batch-size 20 --workers {workers}", capsys)


def test_readable_images_of_odd_kinds_are_read(tmp_path):
    """CMYK with a profile, a PNG that is called JPEG, an animation's first frame."""
    for name, data in {
        "profile.jpg": (NOISE.convert("CMYK"), "JPEG", {"icc_profile": b"x" * 200}),
        "mislabelled.jpg": (NOISE, "PNG", {}),
        "animation.gif": (NOISE, "GIF", {"save_all": True, "append_images": [NOISE]}),
    }.items():
        image, kind, options = data
        image.save(tmp_path / name, kind, **options)
        assert read_image(tmp_path / name).mode == "RGB"


def sop_list(text, name="Ebay_train.txt", header="image_id class_id super_class_id path"):
    def change(root):
        path = make_sop(root) / SOP / name
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(header.encode() + b"\n" + data)

    return "SOP", change


def cars_mat(**variables):
    def change(root):
        make_cars(root)
        savemat(root / "cars_annos.mat", variables)

    return "cars", change


def records(*rows):
    return np.array([tuple(rows[0].values())], dtype=[(name, object) for name in rows[0]])


def without(make, name, dataset_name):
    def change(root):
        path = make(root) / name
        path.unlink() if path.is_file() else [child.unlink() for child in path.rglob("*.jpg")]

    return dataset_name, change


def oversized(make, name, dataset_name):
    def change(root):
        with open(make(root) / name, "ab") as file:
            file.truncate(2**29)

    return dataset_name, change


def write(name, data, dataset_name="cub"):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return dataset_name, change


FIELDS = {name: 1 for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")}
TREES = [
    # (data set, how its tree is made)                        the line has
    (("cub", lambda root: None),                              "tried"),
    (("cub", lambda root: make_cub(root, classes=1)),         "at least two classes"),
    (write("CUB_200_2011/images", b""),                       "images: Not a directory"),
    (without(make_cub, "CUB_200_2011/images", "cub"),         "at least two classes"),
    (without(make_sop, f"{SOP}/Ebay_test.txt", "SOP"),        "Ebay_test.txt"),
    (sop_list(""),                                            "Ebay_train.txt"),
    (sop_list("1 1 1\n"),                                     "Ebay_train.txt: each line"),
    (sop_list("1 one 1 a.jpg\n"),                             "Ebay_train.txt: each line"),
    (sop_list("1 1 1 a b.jpg\n"),                             "Ebay_train.txt: each line"),
    (sop_list(b"\xff\xfe\x00 1 1 x\n"),                       "Ebay_train.txt: each line"),
    (sop_list("1 1 1 ../../etc/passwd\n"),                    "leaves the data set's folder"),
    (sop_list("1 1 1 /etc/passwd\n"),                         "leaves the data set's folder"),
    (sop_list("1 0 1 a.jpg\n"),                               "Ebay_train.txt: each line"),
    (sop_list(f"1 {10**22} 1 a.jpg\n", "Ebay_test.txt"),      "Ebay_test.txt: each line"),
    (sop_list("1 1 1 nowhere.jpg\n"),                         "none of the files"),
    (sop_list("1 1 1 a\0b.jpg\n"),                            "none of the files"),
    (sop_list("1 1 1 ../x.jpg\n", "Ebay_test.txt"),           "leaves the data set's folder"),
    (sop_list("", header="1 1 1 a.jpg"),                      "the header is missing"),
    (oversized(make_sop, f"{SOP}/Ebay_test.txt", "SOP"),      "larger than 256 MiB"),
    (oversized(make_cars, "cars_annos.mat", "cars"),          "larger than 256 MiB"),
    (write("cars_annos.mat", b"", "cars"),                    "cars_annos.mat: not a MATLAB file"),
    (write("cars_annos.mat", b"MATLAB 5.0" * 99, "cars"),     "cars_annos.mat: not a MATLAB file"),
    (cars_mat(other=1),                                       "cars_annos.mat: not a MATLAB file"),
    (cars_mat(annotations=np.eye(3)),                         "cars_annos.mat: not a MATLAB file"),
    (cars_mat(annotations=records({"path": "a.jpg"})),        "cars_annos.mat: not a MATLAB file"),
    (cars_mat(annotations=records({"path": "../a.jpg", **FIELDS})), "leaves the data set's folder"),
    (cars_mat(annotations=records({"path": "/a.jpg", **FIELDS})),   "leaves the data set's folder"),
    (without(make_cars_devkit, "devkit/cars_test_annos_withlabels.mat", "cars"),
     "cars_test_annos_withlabels.mat"),
    (without(make_cars_devkit, "cars_test", "cars"),          "none of the files"),
]  # fmt: skip


@pytest.mark.parametrize("tree, line", TREES)
def test_a_bad_data_tree_ends_in_one_line(here, capsys, tree, line):
    name, make = tree
    make(here / "data")
    assert line in fails(TINY + f"--dataset {name}", capsys)
    assert not (here / "logs").exists()
