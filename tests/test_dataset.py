"""Every layout a data set comes in, every kind of image file, and seeded randomness."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import dataset
from cli import UserError
from dataset import demo
from dataset.files import read_image
from dataset.loader import SeededImages, batches, test_loader, train_loader
from dataset.transforms import test_transform, to_bytes, to_input, train_transform
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

test_loader.__test__ = test_transform.__test__ = False  # ours, not pytest's
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


@pytest.mark.parametrize("name, make, folder", LAYOUTS)
def test_layout_loads_with_its_halves_of_the_classes(tmp_path, name, make, folder):
    make(tmp_path, folder)
    train, test = (dataset.load(name, tmp_path, split) for split in ("train", "test"))
    classes = 4 if name.lower() == "sop" else 2
    assert train.num_classes == test.num_classes == classes
    assert len(train) == len(test) == 2 * PER_CLASS
    assert train.labels.unique().tolist() == list(range(classes))
    assert not set(train.labels.tolist()) & set(test.labels.tolist())
    assert not set(train.paths) & set(test.paths)
    image, label = test[0]
    assert image.mode == "RGB" and label == test.labels[0]


def test_cub_classes_are_sorted_folders_and_mac_leftovers_are_skipped(tmp_path):
    train = dataset.load("cub", make_cub(tmp_path), "train")
    assert [Path(path).parent.name for path in train.paths[::PER_CLASS]] == [
        "001.Bird_0",
        "002.Bird_1",
    ]
    assert not any("._" in path for path in train.paths)


def test_files_beside_the_class_folders_belong_to_no_class(tmp_path):
    write_image(make_cub(tmp_path) / "CUB_200_2011/images/cover.jpg", seed=0)
    assert len(dataset.load("cub", tmp_path, "train")) == 2 * PER_CLASS


def test_files_of_a_class_are_in_order_of_name(tmp_path, monkeypatch):
    make_cub(tmp_path)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listed(path))))
    paths = dataset.load("cub", tmp_path, "train").paths
    assert paths == sorted(paths)


def test_cars_keep_the_order_of_the_file_and_use_its_class_field(tmp_path):
    train = dataset.load("car", make_cars(tmp_path), "train")
    numbers = [int(Path(path).stem) - 1 for path in train.paths]
    assert numbers == sorted(numbers)
    assert train.labels.tolist() == [number % 4 for number in numbers]


def test_cars_devkit_splits_by_class_over_both_folders(tmp_path):
    train = dataset.load("cars", make_cars_devkit(tmp_path), "train")
    assert {Path(path).parent.name for path in train.paths} == {"cars_train", "cars_test"}


def test_cars_class_folders_are_in_ascii_order(tmp_path):
    test = dataset.load("cars", make_cars_folders(tmp_path), "test")
    assert {Path(path).parent.name for path in test.paths} == {"BMW M3 2012", "smart"}


def test_sop_training_labels_index_proxies_even_in_a_subset(tmp_path):
    make_sop(tmp_path)
    for path in (tmp_path / SOP / "bicycle_final").glob("2_*"):
        path.unlink()
    train = dataset.load("SOP", tmp_path, "train")
    assert train.labels.unique().tolist() == [0, 1, 2]


def test_counts_that_differ_from_the_published_are_one_warning_line(tmp_path, capsys):
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


def test_a_list_cannot_lead_out_of_its_folder(tmp_path):
    make_sop(tmp_path)
    file = tmp_path / SOP / "Ebay_train.txt"
    file.write_text(file.read_text() + "9 9 1 ../../secret.jpg\n")
    with pytest.raises(UserError, match="secret.jpg leaves"):
        dataset.load("SOP", tmp_path, "train")


@pytest.mark.parametrize("mode, suffix", [
    ("L", "jpg"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("LA", "png"), ("1", "png"),
])  # fmt: skip
def test_every_colour_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (40, 30), "white").convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert np.abs(np.asarray(image).astype(int) - 255).max() <= 6


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 torn"])
def test_an_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "bird.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bird.jpg"):
        read_image(path)


def test_input_is_bgr_minus_the_mean():
    pixels = to_bytes(Image.new("RGB", (2, 3), (10, 20, 30)))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = to_input(pixels[None], memory_format)
        assert images.shape == (1, 3, 3, 2) and images.is_contiguous(memory_format=memory_format)
        assert images[0, :, 0, 0].tolist() == [30 - 104, 20 - 117, 10 - 128]


@pytest.mark.parametrize("size, resized", [(224, 256), (64, 73)])
def test_test_transform_resizes_then_crops_the_centre(size, resized):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    left, top = round((round(resized * 4 / 3) - size) / 2), round((resized - size) / 2)
    small = image.resize((int(resized * 4 / 3), resized), Image.Resampling.BILINEAR)
    expected = to_bytes(small.crop((left, top, left + size, top + size)))
    assert torch.equal(test_transform(size)(image), expected)


def test_train_transform_crops_as_torchvision_does_by_default():
    theirs = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), to_bytes])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 400, 3), np.uint8))
    for seed in range(20):
        torch.manual_seed(seed)
        ours = train_transform(224)(image)
        torch.manual_seed(seed)
        assert torch.equal(ours, theirs(image))


def epoch_batches(images, epoch, workers=0, **kwargs):
    loader = train_loader(images, 8, seed=1, workers=workers, device=CPU, **kwargs)
    loader.batch_sampler.set_epoch(epoch)
    return list(batches(loader, CPU))


@pytest.fixture
def cub(tmp_path):
    return dataset.load("cub", make_cub(tmp_path), "train", train_transform(32))


def test_batches_are_the_same_for_any_number_of_workers(cub):
    alone = epoch_batches(cub, 3)
    torch.rand(10)  # what was drawn elsewhere does not matter
    assert equal(alone, epoch_batches(cub, 3, workers=2))
    assert not equal(alone, epoch_batches(cub, 4))


def test_batches_after_earlier_epochs_are_those_of_a_fresh_loader(cub):
    loader = train_loader(cub, 8, seed=1, workers=2, device=CPU)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        seen = list(batches(loader, CPU))
    assert equal(seen, epoch_batches(cub, 1))


def test_loading_leaves_the_global_random_state_alone(cub):
    state = torch.get_rng_state()
    epoch_batches(cub, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_an_epoch_visits_images_once_and_drops_the_incomplete_batch(cub):
    loader = train_loader(cub, 8, seed=1, workers=0, device=CPU)
    drawn = [index for batch in loader.batch_sampler for _, index, _ in batch]
    assert len(loader) == 2 and len(drawn) == len(set(drawn)) == 16


def order_of(images, epoch=0, seed=1, **kwargs):
    loader = train_loader(images, 8, seed, workers=0, device=CPU, **kwargs)
    loader.batch_sampler.set_epoch(epoch)
    return [index for batch in loader.batch_sampler for _, index, _ in batch]


@pytest.mark.parametrize("images_per_class", [None, 4])
def test_order_changes_with_the_epoch_and_with_the_seed(cub, images_per_class):
    orders = [
        order_of(cub, epoch, seed, images_per_class=images_per_class)
        for epoch in (0, 1) for seed in (1, 2)
    ]  # fmt: skip
    assert len({tuple(order) for order in orders}) == 4


def test_augmentation_changes_with_the_epoch_the_seed_and_the_image_alone(cub):
    def augmented(seed, epoch, index, occurrence=0):
        return SeededImages(cub, seed)[epoch, index, occurrence][0]

    assert torch.equal(augmented(1, 2, 3), augmented(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 3, 1)):
        assert not torch.equal(augmented(1, 2, 3), augmented(*other))


def test_the_rest_of_an_epoch_is_what_the_whole_one_ends_in(cub):
    loader = train_loader(cub, 4, seed=1, workers=0, device=CPU, images_per_class=2)
    loader.batch_sampler.set_epoch(3)
    whole = list(batches(loader, CPU))
    loader.batch_sampler.set_epoch(3, first_step=2)
    assert equal(whole[2:], list(batches(loader, CPU))) and len(whole) == 5


def test_files_are_those_of_the_batch(cub):
    sampler = train_loader(cub, 8, seed=1, workers=0, device=CPU).batch_sampler
    assert sampler.files(2, 1) == [cub.paths[index] for index in order_of(cub, 2)[8:]]


def test_balanced_batches_hold_n_images_of_each_of_b_over_n_classes(cub):
    for _, labels in epoch_batches(cub, 0, images_per_class=4):
        assert labels.bincount(minlength=2).tolist() == [4, 4]


def test_balanced_batches_draw_with_replacement_from_small_classes(tmp_path):
    images = dataset.load("SOP", make_sop(tmp_path), "train", train_transform(32))
    ((images, labels), *_) = epoch_batches(images, 0, images_per_class=8)
    assert len(labels.unique()) == 1 and len(labels) == 8  # the class has five images
    assert len({image.sum().item() for image in images}) == 8  # each drawing is augmented anew


@pytest.mark.parametrize("workers", [0, 2])
def test_a_workers_unreadable_image_reaches_the_user_as_a_user_error(cub, workers):
    Path(cub.paths[3]).write_bytes(b"torn")
    cub.transform = test_transform(32)
    with pytest.raises(UserError, match=cub.paths[3]):
        list(batches(test_loader(cub, 8, workers, CPU), CPU))


def test_demo_is_drawn_once_in_cubs_layout_with_disjoint_halves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 2)
    train = dataset.load("demo", tmp_path, "train")
    assert "drawing" in capsys.readouterr().out
    test = dataset.load("demo", tmp_path, "test")
    assert capsys.readouterr().out == ""
    assert train.num_classes == test.num_classes == 12
    assert not {Path(p).parent for p in train.paths} & {Path(p).parent for p in test.paths}
    assert all(path.endswith(".jpg") and Image.open(path).format == "JPEG" for path in train.paths)


def test_demo_is_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 1)
    first, second = (dataset.load("demo", tmp_path / name, "train") for name in "ab")
    assert all(
        Path(a).read_bytes() == Path(b).read_bytes() for a, b in zip(first.paths, second.paths)
    )
