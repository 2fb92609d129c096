"""Every layout a data set comes in, every kind of image file, and seeded randomness."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision.transforms import RandomResizedCrop, v2

import dataset
from dataset import demo
from dataset.files import read_image
from loading.augment import crop_and_flip, draw, random_numbers, resize_and_crop, to_pixels
from loading.loader import Loading, batches, test_loader, train_loader
from loading.sampler import EpochBatches
from tests.conftest import (
    PER_CLASS,
    SOP,
    equal,
    make_cars,
    make_cars_devkit,
    make_cars_folders,
    make_cub,
    make_sop,
    write_image,
)
from utils import UserError

CPU = torch.device("cpu")

LAYOUTS = [
    # data set  made by             in the folder
    ("cub",     make_cub,           "CUB_200_2011/images"),
    ("cub",     make_cub,           "cub/images"),
    ("car",     make_cars,          "."),
    ("car",     make_cars,          "car"),
    ("cars",    make_cars,          "cars196"),
    ("cars",    make_cars_devkit,   "."),
    ("cars",    make_cars_devkit,   "cars196"),
    ("cars",    make_cars_folders,  "car_data"),
    ("cars",    make_cars_folders,  "car_data/car_data"),
    ("cars",    make_cars_folders,  "car/car_data"),
    ("SOP",     make_sop,           SOP),
    ("sop",     make_sop,           "sop"),
]  # fmt: skip


def halves(name, root):
    return [dataset.load(name, root, split) for split in ("train", "test")]


@pytest.mark.parametrize("name, make, folder", LAYOUTS)
def test_every_layout_loads_the_published_halves_of_the_classes(tmp_path, name, make, folder):
    train, test = halves(name, make(tmp_path, folder))
    for images in (train, test):
        assert len(images) == 2 * PER_CLASS
        assert len(images.classes) == (4 if name.lower() == "sop" else 2)
        assert images.labels.unique().tolist() == list(range(len(images.classes)))
    assert max(train.classes) < min(test.classes)
    assert not set(train.paths) & set(test.paths)
    image, label = test[0]
    assert image.mode == "RGB" and label == test.labels[0]


# a row of cells, as in the distributed .mat files
CAR_NAMES = {"class_names": np.array([[f"car {c}" for c in range(1, 197)]], dtype=object)}


def named_cars(root):
    file = make_cars(root) / "cars_annos.mat"
    savemat(file, {"annotations": loadmat(file)["annotations"], **CAR_NAMES})


def named_cars_devkit(root):
    savemat(make_cars_devkit(root) / "devkit/cars_meta.mat", CAR_NAMES)


@pytest.mark.parametrize("name, make, train, test", [
    ("cub", make_cub, ["001.Bird_0", "002.Bird_1"], ["101.Bird_2", "102.Bird_3"]),
    ("cars", make_cars, ["001", "002"], ["099", "100"]),
    ("cars", make_cars_devkit, ["001", "002"], ["099", "100"]),
    ("cars", named_cars, ["001 car 1", "002 car 2"], ["099 car 99", "100 car 100"]),
    ("cars", named_cars_devkit, ["001 car 1", "002 car 2"], ["099 car 99", "100 car 100"]),
    ("cars", make_cars_folders, ["AM General Hummer SUV 2000", "Eagle Talon Hatchback 1998"],
     ["FIAT 500 Abarth 2012", "smart fortwo Convertible 2012"]),
    ("SOP", make_sop, ["00001", "00002", "00003", "00004"], ["00005", "00006", "00007", "00008"]),
])  # fmt: skip
def test_class_names_are_kept_in_order(tmp_path, name, make, train, test):
    make(tmp_path)
    assert [images.classes for images in halves(name, tmp_path)] == [train, test]


@pytest.mark.parametrize("name, make, unseen", [
    ("cub", make_cub, {"101.Bird_2", "102.Bird_3"}),
    ("cars", make_cars_folders, {"FIAT 500 Abarth 2012", "smart fortwo Convertible 2012"}),
])  # fmt: skip
def test_a_subset_keeps_the_published_split(tmp_path, capsys, name, make, unseen):
    for path in list(make(tmp_path).rglob("*")):  # all but one of the classes that train
        if path.is_dir() and path.name.startswith(("001", "AM General")):
            shutil.rmtree(path)
    train, test = halves(name, tmp_path)
    assert len(train.classes) == 1 and set(test.classes) == unseen
    for path in list(tmp_path.rglob(f"{train.classes[0]}/*")):
        path.unlink()
    with pytest.raises(UserError, match="train: there are no images, only for test; add some"):
        dataset.load(name, tmp_path, "train")
    assert set(dataset.load(name, tmp_path, "test").classes) == unseen
    assert set(dataset.load(name, tmp_path, "all").classes) == unseen


def test_a_class_of_cub_without_a_number_is_named(tmp_path):
    write_image(make_cub(tmp_path) / "CUB_200_2011/images/Crow/a.jpg", seed=0)
    with pytest.raises(UserError, match="images/Crow: CUB's folders are named as in 001.Black"):
        dataset.load("cub", tmp_path, "test")


@pytest.mark.parametrize("name, make, class_of", [
    ("cub", make_cub, lambda path: path.parent.name),
    ("cars", make_cars, lambda path: ["001", "002", "099", "100"][(int(path.stem) - 1) % 4]),
    ("cars", make_cars_folders, lambda path: path.parent.name),
    ("SOP", make_sop, lambda path: path.stem.split("_")[0].zfill(5)),
])  # fmt: skip
def test_labels_index_the_classes(tmp_path, name, make, class_of):
    for images in halves(name, make(tmp_path)):
        for path, label in zip(images.paths, images.labels):
            assert images.classes[label] == class_of(Path(path))


def test_a_module_with_read_and_ks_is_a_data_set(tmp_path, monkeypatch):
    write_image(tmp_path / "a.jpg", seed=0)
    items = [(str(tmp_path / "a.jpg"), name) for name in ("wren", "auk")]
    own = SimpleNamespace(read=lambda root: {"train": items}, KS=(1,))
    monkeypatch.setitem(dataset.DATASETS, "own", own)
    images = dataset.load("own", tmp_path, "train")
    assert images.classes == ["auk", "wren"] and images.labels.tolist() == [1, 0]
    assert dataset.ks("own") == [1] and dataset.ks("own", [8, 2]) == [2, 8]


def test_mac_leftovers_and_files_beside_the_class_folders_are_skipped(tmp_path):
    write_image(make_cub(tmp_path) / "CUB_200_2011/images/cover.jpg", seed=0)
    names = {Path(path).name for path in dataset.load("cub", tmp_path, "train").paths}
    assert names == {f"Bird_{i:04d}.jpg" for i in range(PER_CLASS)}


def test_files_of_a_class_are_in_order_of_name(tmp_path, monkeypatch):
    make_cub(tmp_path)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listed(path))))
    paths = dataset.load("cub", tmp_path, "train").paths
    assert paths == sorted(paths)


def test_cars_keep_the_order_of_the_file(tmp_path):
    train = dataset.load("car", make_cars(tmp_path), "train")
    numbers = [int(Path(path).stem) for path in train.paths]
    assert numbers == sorted(numbers) and train.labels.tolist() != sorted(train.labels.tolist())


def test_cars_devkit_splits_by_class_over_both_folders(tmp_path):
    train = dataset.load("cars", make_cars_devkit(tmp_path), "train")
    assert {Path(path).parent.name for path in train.paths} == {"cars_train", "cars_test"}


def test_missing_files_are_left_out_and_labels_stay_contiguous(tmp_path):
    make_sop(tmp_path)
    for path in (tmp_path / SOP / "bicycle_final").glob("2_*"):
        path.unlink()
    train = dataset.load("SOP", tmp_path, "train")
    assert train.classes == ["00001", "00003", "00004"]
    assert train.labels.unique().tolist() == [0, 1, 2]


def test_a_list_whose_files_are_all_missing_is_a_user_error_that_names_one(tmp_path):
    make_sop(tmp_path)
    for path in (tmp_path / SOP / "bicycle_final").glob("*"):
        path.unlink()
    with pytest.raises(UserError, match="none of .* is there, such as .*1_0.JPG"):
        dataset.load("SOP", tmp_path, "train")


def test_counts_unlike_the_published_ones_are_warned_of_in_one_line(tmp_path, capsys):
    dataset.load("cub", make_cub(tmp_path), "train")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: cub train: found 20 images of 2 classes, "
        "the published split has 5,864 images of 100 classes"
    ]


@pytest.mark.parametrize("name", ["cub", "car", "SOP"])
def test_missing_data_names_every_path_tried(tmp_path, name):
    with pytest.raises(UserError) as error:
        dataset.load(name, tmp_path, "train")
    folders = {folder for known, _, folder in LAYOUTS if known.lower() == name.lower()}
    for folder in folders:
        assert str(tmp_path / folder) in str(error.value)


# --- images: read, augmented, centred ----------------------------------------------------------


@pytest.mark.parametrize("mode, suffix", [
    ("L", "jpg"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("LA", "png"), ("1", "png"),
])  # fmt: skip
def test_every_colour_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (40, 30), "white").convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image).astype(int) - 255).max() <= 6


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_pixels_are_rgb_bytes_rows_first():
    image = noise(5, 3)
    pixels = to_pixels(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 5, 3)
    assert tuple(pixels[2, 4].tolist()) == image.getpixel((4, 2))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 64, 33])
@pytest.mark.parametrize("sides", [(400, 300), (301, 407), (259, 256), (40, 31)])
def test_a_test_image_is_resized_and_cropped_as_by_torchvision(sides, size, interpolation):
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(size * 256 // 224, mode), v2.CenterCrop(size), to_pixels])
    image = noise(*sides)
    assert torch.equal(resize_and_crop(image, size, interpolation), theirs(image))


class SameNumbers:
    """torch, for torchvision to draw a box with the uniform numbers that `draw` is given."""

    def __init__(self, numbers):
        self.places, self.tries = iter(numbers[:2]), iter(numbers[3:])

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape):
        return self

    def uniform_(self, low, high):
        return torch.tensor([low + (high - low) * next(self.tries)], dtype=torch.double)

    def randint(self, low, high, size):
        return torch.tensor([int(next(self.places) * high)])


@pytest.mark.parametrize("sides", [(90, 400), (300, 200), (1000, 9), (9, 1000), (500, 50), (1, 2)])
def test_crop_boxes_equal_torchvisions_and_half_are_flipped(monkeypatch, sides):
    image, flips = Image.new("RGB", sides), []
    for numbers in random_numbers(1, 0, 200).tolist():
        monkeypatch.setattr(torchvision.transforms.transforms, "torch", SameNumbers(numbers))
        (left, top, right, bottom), flip = draw(numbers, sides)
        theirs = RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        assert (top, left, bottom - top, right - left) == theirs
        flips.append(flip)
    assert 70 < sum(flips) < 130


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_augmented_pixels_equal_torchvisions(interpolation):
    image, mode = noise(400, 90), v2.InterpolationMode(interpolation)
    for numbers in random_numbers(1, 0, 10).tolist():
        box, flip = draw(numbers, image.size)
        theirs = v2.functional.resize(image.crop(box), [224, 224], mode)
        theirs = v2.functional.horizontal_flip(theirs) if flip else theirs
        ours = crop_and_flip(image, box, flip, 224, interpolation)
        assert torch.equal(ours, to_pixels(theirs))


def test_augmentation_depends_on_seed_epoch_and_position_alone():
    state = torch.get_rng_state()
    first = random_numbers(1, 2, 50)
    others = [first, random_numbers(0, 2, 50), random_numbers(1, 0, 50)]
    assert len({draw(row, (400, 300)) for rows in others for row in rows.tolist()}) == 150
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(10)  # what was drawn elsewhere does not matter
    assert torch.equal(random_numbers(1, 2, 50), first)


# --- batches -----------------------------------------------------------------------------------


ALONE = Loading(32, 0, CPU)


def epoch_batches(images, epoch, workers=0, **kwargs):
    loader = train_loader(images, 8, 1, Loading(32, workers, CPU), **kwargs)
    loader.batch_sampler.set_epoch(epoch)
    return list(batches(loader, CPU))


@pytest.fixture
def cub(tmp_path):
    return dataset.load("cub", make_cub(tmp_path), "train")


def test_a_batch_is_pixels_labels_and_the_index_of_each_image(cub):
    numbers = iter(random_numbers(1, 0, 16)[::8].tolist())
    for pixels, labels, index in epoch_batches(cub, 0):
        assert pixels.dtype == torch.uint8 and pixels.shape == (8, 32, 32, 3)
        assert torch.equal(labels, cub.labels[index])
        image = read_image(cub.paths[index[0]])
        drawn = draw(next(numbers), image.size)
        assert torch.equal(pixels[0], crop_and_flip(image, *drawn, 32))


def test_the_test_loader_yields_every_image_once_in_order(cub):
    tested = list(batches(test_loader(cub, 8, ALONE), CPU))
    assert [len(labels) for _, labels, _ in tested] == [8, 8, 4]
    pixels, labels, index = (torch.cat(part) for part in zip(*tested))
    assert index.tolist() == list(range(20)) and torch.equal(labels, cub.labels)
    assert torch.equal(pixels[17], resize_and_crop(read_image(cub.paths[17]), 32))


def test_batches_use_the_given_interpolation(cub):
    def images(interpolation):
        loading = Loading(32, 0, CPU, interpolation)
        yield next(batches(train_loader(cub, 8, 1, loading), CPU))[0]
        yield next(batches(test_loader(cub, 8, loading), CPU))[0]

    for bilinear, bicubic in zip(images("bilinear"), images("bicubic")):
        assert not torch.equal(bilinear, bicubic)
    assert torch.equal(bicubic[0], resize_and_crop(read_image(cub.paths[0]), 32, "bicubic"))


@pytest.mark.parametrize("images_per_class", [None, 4])
def test_batches_are_the_same_for_any_number_of_workers(cub, images_per_class):
    alone = epoch_batches(cub, 3, images_per_class=images_per_class)
    torch.rand(10)  # what was drawn elsewhere does not matter
    assert equal(alone, epoch_batches(cub, 3, workers=2, images_per_class=images_per_class))
    assert not equal(alone, epoch_batches(cub, 4, images_per_class=images_per_class))


def test_a_loader_used_before_yields_the_same_epoch_as_a_fresh_one(cub):
    loader = train_loader(cub, 8, 1, Loading(32, 2, CPU))
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        seen = list(batches(loader, CPU))
    assert equal(seen, epoch_batches(cub, 1))


def test_loading_leaves_the_global_random_state_alone(cub):
    state = torch.get_rng_state()
    epoch_batches(cub, 0)
    assert torch.equal(state, torch.get_rng_state())


def order_of(images, epoch=0, seed=1, images_per_class=None):
    sampler = EpochBatches(images, 8, seed, images_per_class)
    sampler.set_epoch(epoch)
    return [index for batch in sampler for index, _ in batch]


def test_an_epoch_visits_images_once_and_drops_the_incomplete_batch(cub):
    drawn = order_of(cub)
    assert len(EpochBatches(cub, 8, seed=1)) == 2 and len(drawn) == len(set(drawn)) == 16


@pytest.mark.parametrize("images_per_class", [None, 4])
def test_order_changes_with_the_epoch_and_with_the_seed(cub, images_per_class):
    orders = [order_of(cub, epoch, seed, images_per_class) for epoch in (0, 1) for seed in (1, 2)]
    assert len(set(map(tuple, orders))) == 4


def test_an_epoch_continued_in_the_middle_yields_the_remaining_batches(cub):
    loader = train_loader(cub, 4, 1, ALONE, images_per_class=2)
    loader.batch_sampler.set_epoch(3)
    whole = list(batches(loader, CPU))
    loader.batch_sampler.set_epoch(3, first_step=2)
    rest = list(batches(loader, CPU))
    assert (len(whole), len(rest)) == (5, 3) and equal(whole[2:], rest)


def test_files_names_the_images_of_the_batch(cub):
    assert EpochBatches(cub, 8, seed=1).files(2, 1) == [cub.paths[i] for i in order_of(cub, 2)[8:]]


def test_balanced_batches_hold_n_images_of_each_of_b_over_n_classes(cub):
    for _, labels, _ in epoch_batches(cub, 0, images_per_class=4):
        assert labels.bincount(minlength=2).tolist() == [4, 4]


def test_balanced_batches_draw_with_replacement_from_small_classes(tmp_path):
    images = dataset.load("SOP", make_sop(tmp_path), "train")
    pixels, labels, index = epoch_batches(images, 0, images_per_class=8)[0]
    assert len(labels.unique()) == 1 and len(index.unique()) <= 5 < len(labels)
    assert len({image.sum().item() for image in pixels}) == 8  # each drawing is augmented anew


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_in_a_worker_is_a_user_error(cub, workers):
    Path(cub.paths[3]).write_bytes(b"torn")
    with pytest.raises(UserError, match=cub.paths[3]):
        list(batches(test_loader(cub, 8, Loading(32, workers, CPU)), CPU))


# --- the demo data set -------------------------------------------------------------------------


def test_demo_is_drawn_once_in_cubs_layout_with_disjoint_halves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 2)
    dataset.prepare("demo", tmp_path)
    assert "drawing" in capsys.readouterr().out
    dataset.prepare("demo", tmp_path)
    train = dataset.load("demo", tmp_path, "train")
    test = dataset.load("demo", tmp_path, "test")
    assert capsys.readouterr().out == ""
    assert len(train.classes) == len(test.classes) == 12
    assert not set(train.classes) & set(test.classes)
    assert all(path.endswith(".jpg") and Image.open(path).format == "JPEG" for path in train.paths)


def test_demo_is_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 1)
    for name in "ab":
        (tmp_path / name).mkdir()
        dataset.prepare("demo", tmp_path / name)
    first, second = (dataset.load("demo", tmp_path / name, "train") for name in "ab")
    assert all(
        Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(first.paths, second.paths)
    )
