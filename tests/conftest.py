"""Small data sets of real JPEG files in the layouts they are distributed in, and small runs."""

import contextlib
import functools
import io
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import train
import utils
from net import create_model
from runs import finish
from tests import toy  # noqa: F401 (it adds --model toy)

torch.set_num_threads(1)  # the networks are so small that a second one only waits
os.environ["HF_HUB_OFFLINE"] = "1"  # what timm would download, it does not

PER_CLASS = 10
ROOT = Path(__file__).parent.parent
SOP = "Stanford_Online_Products"
TINY = (
    "--dataset cub --model toy --weights none --image-size 32 --batch-size 8 --embedding-size 8 "
    "--epochs 2 --workers 0 --wandb disabled --disent True --al 1 --be 0.1 --gam 1e-5 "
)
DISENT = TINY[TINY.index("--disent") :]


def write_image(path, seed, mode="RGB"):
    """A small noisy image, of another size and colour for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(path.suffix, seed, mode))


@functools.cache
def encoded(suffix, seed, mode):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(70, 100, 2)
    pixels = rng.integers(0, 60, (height, width, 3)) + rng.integers(0, 190, 3)
    file = io.BytesIO()
    kind = Image.registered_extensions()[suffix.lower()]
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()


def numbers(classes, last):
    """Numbers of classes, half of them up to `last`: those train, the others test."""
    train = classes // 2
    return [*range(1, train + 1), *range(last + 1, last + 1 + classes - train)]


def make_cub(root, folder="CUB_200_2011/images", classes=4):
    """As extracted: a folder per class; one image is grayscale, one file a Mac leftover."""
    images = Path(root, folder)
    for c, number in enumerate(numbers(classes, 100)):
        for i in range(PER_CLASS):
            name = images / f"{number:03d}.Bird_{c}" / f"Bird_{i:04d}.jpg"
            write_image(name, seed=100 * c + i, mode="L" if (c, i) == (1, 2) else "RGB")
    next(images.iterdir()).joinpath("._Bird_0000.jpg").write_bytes(b"Mac OS X")
    return root


def _structs(rows):
    """MATLAB's struct array: fields in order, each value in a cell of its own."""
    kinds = [(name, object) for name in rows[0]]
    return np.array([[tuple(row.values()) for row in rows]], dtype=kinds)


def make_cars(root, folder=".", classes=4):
    """car_ims/ and cars_annos.mat; the images of a class are not in one run."""
    folder = Path(root, folder)
    rows = []
    for i in range(PER_CLASS * classes):
        name = f"car_ims/{i + 1:06d}.jpg"
        write_image(folder / name, seed=i, mode="L" if i == 3 else "RGB")
        number = numbers(classes, 98)[i % classes]
        rows.append({"relative_im_path": name, "bbox_x1": 1, "bbox_y1": 1, "bbox_x2": 9,
                     "bbox_y2": 9, "class": number, "test": i % 2})  # fmt: skip
    savemat(folder / "cars_annos.mat", {"annotations": _structs(rows)})
    return root


def make_cars_devkit(root, folder=".", classes=4):
    """cars_train/, cars_test/ and devkit/, the labels of the test images added later."""
    folder = Path(root, folder)
    (folder / "devkit").mkdir(parents=True)
    for half, annotations in (
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for i in range(PER_CLASS * classes // 2):
            name = f"{i + 1:05d}.jpg"
            write_image(folder / f"cars_{half}" / name, seed=i)
            rows.append({"bbox_x1": 1, "bbox_y1": 1, "bbox_x2": 9, "bbox_y2": 9,
                         "class": numbers(classes, 98)[i % classes], "fname": name})  # fmt: skip
        savemat(folder / "devkit" / annotations, {"annotations": _structs(rows)})
    return root


def make_cars_folders(root, folder="car_data", classes=4):
    """A folder per class in train/ and again in test/."""
    names = ["AM General Hummer SUV 2000", "Eagle Talon Hatchback 1998", "FIAT 500 Abarth 2012",
             "smart fortwo Convertible 2012"]  # fmt: skip
    for c, name in enumerate(names[:classes]):
        for i in range(PER_CLASS):
            half = "train" if i % 2 else "test"
            write_image(Path(root, folder, half, name, f"{i:05d}.jpg"), seed=100 * c + i)
    return root


def make_sop(root, folder=SOP, classes=4):
    """Ebay_train.txt and Ebay_test.txt, and images by super-class."""
    folder, image_id = Path(root, folder), 0
    for split, first in (("train", 1), ("test", classes + 1)):
        lines = ["image_id class_id super_class_id path"]
        for class_id in range(first, first + classes):
            for i in range(PER_CLASS // 2):
                image_id += 1
                name = f"bicycle_final/{class_id}_{i}.JPG"
                write_image(folder / name, seed=image_id, mode="L" if image_id == 2 else "RGB")
                lines.append(f"{image_id} {class_id} 1 {name}")
        (folder / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def make_inshop(root, folder="Inshop_Clothes", train=4, test=3):
    """The list, and images by kind of clothing and item; an item's images are queries or gallery,
    and one query has no match."""
    folder, lines = Path(root, folder), []
    for item in range(1, train + test + 1):
        for i in range(6):
            split = "train" if item <= train else "query" if i < 2 else "gallery"
            name = f"img/WOMEN/Dresses/id_{item:08d}/{i:02d}_1_front.jpg"
            write_image(folder / "Img" / name, seed=20 * item + i)
            lines.append(f"{name}      id_{item:08d}   {split}")
    name = "img/MEN/Denim/id_00000099/01_1_front.jpg"
    write_image(folder / "Img" / name, seed=999)
    lines.append(f"{name} id_00000099 query")
    head = [str(len(lines)), "image_name item_id evaluation_status"]
    (folder / "Eval").mkdir()
    (folder / "Eval/list_eval_partition.txt").write_text("\n".join(head + lines) + "\n")
    return root


CLASSES = ["синица", "house wren", 'so-called "auk"', "猫"]


def make_folder(root, classes=CLASSES, per_class=8, first=0):
    """CLASS/NAME, with names in other scripts, spaces and quotes."""
    for c, name in enumerate(classes, start=first):
        for i in range(per_class):
            write_image(Path(root, name, f"фото {i}.jpg"), seed=100 * c + i)
    return root


@pytest.fixture(autouse=True)
def no_account_no_network(monkeypatch, tmp_path):
    """No wandb account, and torch.hub finds nothing: a test that needs either says so."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")

    def refuse(url, *args, **kwargs):
        raise OSError(f"a test wanted to download {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(autouse=True)
def defaults_of_the_process():
    """No test finds it as another one's --precision or --deterministic has left it."""
    utils.set_precision("fp32")


@pytest.fixture(autouse=True)
def pictures_in_no_time(monkeypatch):
    """Pictures take seconds, several hundred runs are made; some tests put back what draws them."""
    monkeypatch.setattr(finish, "draw_curves", lambda history: b"a picture")
    monkeypatch.setattr(finish, "draw_neighbours", lambda *_: None)
    monkeypatch.setattr(finish, "log_picture", lambda *_: None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, so that ./data and ./logs are in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def made_once(tmp_path_factory):
    """For a fixture of wider scope: the current folder is a new one, for tests to copy."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(finish, "draw_curves", lambda history: b"a picture")
        yield folder


@pytest.fixture(scope="session")
def run_of_one_epoch(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_cub(folder / "data")
        train.main(shlex.split(TINY + "--epochs 1"))
    return folder


@pytest.fixture
def run(here, run_of_one_epoch):
    """A run of one epoch, in its folder below `here`."""
    shutil.copytree(run_of_one_epoch, here, dirs_exist_ok=True)
    return run_folder(here)


@pytest.fixture(scope="session")
def trained_on_photos_once(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_folder(folder / "photos")
        train.main(shlex.split(TINY + "--dataset folder --data-root photos --epochs 1"))
    return folder


@pytest.fixture
def trained(here, trained_on_photos_once):
    """A run on the folder `photos`; its run folder."""
    shutil.copytree(trained_on_photos_once, here, dirs_exist_ok=True)
    return run_folder(here)


def run_folder(here):
    (folder,) = here.glob("logs/logs_*/*")
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def equal(first, second):
    """Whether two lists of batches hold the same tensors."""
    return all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))


def snapshot(folder):
    """When every file below `folder` was last written, a run's lock aside."""
    return {
        path: path.stat().st_mtime_ns
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def fails(argv, capsys, main=train.main):
    """The one line that a user error ends in."""
    capsys.readouterr()
    try:  # pytest.raises would keep the frames, and workers in them that nobody tells to stop
        utils.run(lambda: main(shlex.split(argv)))
    except SystemExit as end:
        status = end.code
    assert status == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
    assert len(errors) == 1 and "error: " in errors[0]
    return errors[0]


def checkpoint_of(folder, which="last"):
    """A run's `last` or `best` checkpoint."""
    (path,) = folder.glob(f"*_{which}.pth")
    return path


def published_checkpoint(path, change=lambda state: None, **kwargs):
    state = create_model("bn_inception", 512, disent=True, **kwargs).state_dict()
    change(state)
    torch.save({"model_state_dict": state}, path)
    return path
