"""What a user can get wrong: each ends in one line that names it, exit status 2, no traceback, and
what was there before is still there."""

import io
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
VIT = "timm/vit_tiny_patch16_224"

FLAGS = [
    # flags                          the line has
    ("--batch-size 21",              "--batch-size 21: larger than the 20 training"),
    ("--batch-size 0",               "--batch-size: invalid number"),
    ("--batch 8",                    "unrecognized arguments: --batch 8"),
    ("--dataset birds",              "--dataset birds: unknown data set"),
    ("--data-root nowhere",          "tried nowhere/CUB_200_2011/images, nowhere/cub/images"),
    ("--optimizer lamb",             "--optimizer: invalid choice: 'lamb'"),
    ("--disent maybe",               "--disent: invalid boolean value: 'maybe'"),
    ("--lr fast",                    "--lr: invalid number"),
    ("--lr nan",                     "--lr: invalid number"),
    ("--lr 1e36",                    "--lr: invalid number"),
    ("--alpha inf",                  "--alpha: invalid number"),
    ("--proxy-lr-factor -1",         "--proxy-lr-factor: invalid number"),
    ("--epochs 0",                   "--epochs: invalid number"),
    ("--seed -1",                    "--seed: invalid number"),
    ("--IPC 3",                      "--IPC 3: a batch of --batch-size 8 cannot hold 3 images"),
    ("--IPC 2",                      "--IPC 2: a batch of --batch-size 8 cannot hold 2 images"),
    ("--embedding-size 1000000000",  "--embedding-size: invalid number"),
    ("--gpu-id -2",                  "--gpu-id: invalid number"),
    ("--checkpoint-every 0",         "--checkpoint-every: invalid number"),
    ("--cache disk",                 "--cache: invalid choice: 'disk'"),
    ("--wandb online",               "--wandb online: no account"),
    # where it is written, and what it goes on from
    ("--remark a/b",                 "--remark: a folder's name cannot hold 'a/b'"),
    ("--remark '\udcff'",            "--remark: a folder's name cannot hold"),
    (f"--remark {'x' * 250}",        "too long"),
    (f"--LOG_DIR {'x' * 300}",       "File name too long"),
    ("--LOG_DIR junk",               "junk/logs_cub"),
    ("--resume",                     "--resume: there is no run in"),
    ("--resume nowhere.pth",         "there is no run in nowhere.pth"),
    ("--resume junk",                "junk: not a run's checkpoint"),
    ("--resume --overwrite",         "--overwrite: not allowed with argument --resume"),
    # losses
    ("--loss Magnet",                "--loss: invalid choice: 'Magnet'"),
    ("--loss Contrastive",           "--disent True: --loss Contrastive compares pairs"),
    ("--loss Triplet",               "--disent True: --loss Triplet compares pairs"),
    ("--loss MultiSimilarity",       "--disent True: --loss MultiSimilarity compares pairs"),
    ("--loss NPair",                 "--disent True: --loss NPair compares pairs"),
    ("--loss NormSoftmax --mrg 0.2", "--mrg: --loss NormSoftmax has no margin"),
    ("--loss NPair --alpha 3",       "--alpha: --loss NPair has no scale"),
    ("--loss NormSoftmax --alpha 0", "--alpha: invalid number"),
    ("--loss Triplet --proxy-lr-factor 2", "--proxy-lr-factor: --loss Triplet has no proxies"),
    # backbones
    ("--model resnet5",              "did you mean resnet50?"),
    ("--model timm/vit_tiny_patch16_22", f"did you mean {VIT}?"),
    (f"--model {VIT}.nonsense",      "Invalid pretrained tag"),
    ("--model timm/crossvit_9_240",  "its features are neither maps nor tokens"),
    ("--image-size 320000",          "--image-size: invalid number"),
    ("--image-size 4",               "--image-size 4: not for toy"),
    ("--image-size 104 --model bn_inception", "--image-size 104: not for bn_inception"),
    (f"--image-size 70 --model {VIT}", f"--image-size 70: not for {VIT}"),
    ("--image-size 64 --model timm/mixer_s16_224", "--image-size 64: not for timm/mixer"),
    ("--weights nowhere.pth",        "nowhere.pth: no such checkpoint"),
    ("--weights junk",               "junk: not a checkpoint"),
    ("--weights imagenet",           "--weights imagenet: there are none for toy"),
    ("--weights imagenet --model bn_inception", "checkpoints/bn_inception-52deb4733.pth"),
    ("--weights imagenet --model resnet18",     "checkpoints/resnet18-f37072fd.pth"),
    (f"--weights imagenet --model {VIT}",       "timm cannot get those of vit_tiny_patch16_224"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    return make_cub(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("flags, line", FLAGS)
def test_a_bad_flag_ends_in_one_line_and_writes_nothing(here, capsys, cub, flags, line):
    (here / "junk").write_bytes(b"junk")
    (here / "data").symlink_to(cub)
    assert line in fails(TINY + flags, capsys)
    assert list(snapshot(here)) == [here / "junk"]


def png(width, height, bits=8, colour=0, data=bytes(100)):
    """A PNG that claims this size and holds, by default, hardly any data."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
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
    "torn after the header": as_bytes(NOISE, "JPEG")[:200],
    "torn in the middle": as_bytes(NOISE, "JPEG")[:2000],
    "torn PNG": as_bytes(NOISE, "PNG")[:3000],
    "a decompression bomb": png(30000, 30000),
    "16 bits": as_bytes(Image.fromarray(np.full((40, 40), 40000, np.uint16)), "PNG"),
    "16 bits of RGB": png(40, 40, bits=16, colour=2),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "a thread": as_bytes(Image.new("L", (1, 8000)), "PNG"),
    "floating point": as_bytes(Image.fromarray(np.ones((40, 40), np.float32)), "TIFF"),
    "a folder": replaced_by_folder,
    "a dangling link": dangling,
}


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in IMAGES), ("text", 1)])
def test_a_bad_image_ends_in_one_line_that_names_it(here, capsys, kind, workers):
    path = make_cub(here / "data", classes=2) / JPEG
    if callable(IMAGES[kind]):
        IMAGES[kind](path)
    else:
        path.write_bytes(IMAGES[kind])
    assert JPEG in fails(TINY + f"--batch-size 10 --workers {workers}", capsys)


def test_readable_images_of_odd_kinds_are_read(tmp_path):
    """CMYK with a profile, a PNG that is called JPEG, an animation's first frame."""
    NOISE.convert("CMYK").save(tmp_path / "profile.jpg", icc_profile=b"x" * 200)
    NOISE.save(tmp_path / "mislabelled.jpg", "PNG")
    NOISE.save(tmp_path / "animation.gif", save_all=True, append_images=[NOISE])
    assert [read_image(path).mode for path in tmp_path.iterdir()] == ["RGB"] * 3


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


def record(**fields):
    return np.array([tuple(fields.values())], dtype=[(name, object) for name in fields])


def without(make, name, data_set):
    def change(root):
        path = make(root) / name
        path.unlink() if path.is_file() else [child.unlink() for child in path.rglob("*.jpg")]

    return data_set, change


def empty(name, data_set):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

    return data_set, change


FIELDS = {name: 1 for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")}
TREES = [
    # (data set, how its tree is made)                        the line has
    (("cub", lambda root: None),                              "tried"),
    (("cub", lambda root: make_cub(root, classes=1)),         "train: there are no images, only"),
    (empty("CUB_200_2011/images", "cub"),                     "images: Not a directory"),
    (without(make_cub, "CUB_200_2011/images", "cub"),         "cub train: there are no images"),
    (without(make_sop, f"{SOP}/Ebay_test.txt", "SOP"),        "Ebay_test.txt"),
    (sop_list(""),                                            "SOP train: there are no images"),
    (sop_list("1 1 1\n"),                                     "Ebay_train.txt, line 2: must"),
    (sop_list("1 one 1 a.jpg\n"),                             "Ebay_train.txt, line 2: must"),
    (sop_list(b"\xff\xfe\x00 1 1 x\n"),                       "Ebay_train.txt: not a list"),
    (sop_list("1 1 1 ../../etc/passwd\n"),                    "leaves the data set's folder"),
    (sop_list("1 0 1 a.jpg\n"),                               "Ebay_train.txt, line 2: must"),
    (sop_list("1 1 1 nowhere.jpg\n"),                         "none of the listed files is there"),
    (sop_list("1 1 1 a\0b.jpg\n"),                            "none of the listed files is there"),
    (sop_list("", header="1 1 1 a.jpg"),                      "line 1: must be the header"),
    (empty("cars_annos.mat", "cars"),                         "cars_annos.mat: not the MATLAB"),
    (cars_mat(other=1),                                       "cars_annos.mat: not the MATLAB"),
    (cars_mat(annotations=np.eye(3)),                         "cars_annos.mat: not the MATLAB"),
    (cars_mat(annotations=record(path="a.jpg")),              "cars_annos.mat: not the MATLAB"),
    (cars_mat(annotations=record(path="../a.jpg", **FIELDS)), "leaves the data set's folder"),
    (cars_mat(annotations=record(path="a.jpg", **FIELDS | {"class": 0})), "start at 1"),
    (without(make_cars_devkit, "devkit/cars_test_annos_withlabels.mat", "cars"),
     "cars_test_annos_withlabels.mat"),
    (without(make_cars, "car_ims", "cars"),                   "none of the listed files is there"),
]  # fmt: skip


@pytest.mark.parametrize("tree, line", TREES)
def test_a_bad_data_tree_ends_in_one_line(here, capsys, tree, line):
    name, make = tree
    make(here / "data")
    assert line in fails(TINY + f"--dataset {name}", capsys)
    assert not (here / "logs").exists()
