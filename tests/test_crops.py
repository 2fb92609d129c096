"""--cache gpu: crops made by tensors, equal to Pillow's; here in the memory of the CPU."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import distributed
import train
from dataset.images import ImageSet
from loading import cache, crops
from loading.augment import crop_and_flip, draw, random_numbers
from loading.cache import keep_on_device, start_of_each
from loading.crops import resized_crops
from loading.loader import Loading, batches, test_loader, train_loader
from tests.conftest import TINY, equal, fails, make_cub, run_folder, write_image
from tests.operations import Operations

CPU = torch.device("cpu")
SIDES = [(40, 200), (60, 130), (200, 40), (150, 110), (64, 64), (64, 90), (90, 33), (3, 2), (1, 1)]


def images_and_crops(size, interpolation):
    """(bytes of images of SIDES, crops of them, the longest side, the same made by Pillow)."""
    rng, rows, theirs = np.random.default_rng(0), [], []
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in SIDES]
    starts = start_of_each(np.array(SIDES)).tolist()
    for number, numbers in enumerate(random_numbers(0, 0, 6 * len(SIDES)).tolist()):
        which = number % len(SIDES)
        width, height = SIDES[which]
        (left, top, right, bottom), flip = draw(numbers, SIDES[which])
        if number < len(SIDES):
            left, top, right, bottom = 0, 0, width, height
        start = starts[which] + 3 * (top * width + left)
        rows.append((start, width, bottom - top, right - left, flip))
        image, box = Image.fromarray(images[which]), (left, top, right, bottom)
        theirs.append(crop_and_flip(image, box, flip, size, interpolation))
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
    return pixels, torch.tensor(rows), 200, torch.stack(theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [64, 33, 1])
def test_crops_are_pillows_to_the_byte(size, interpolation):
    *where, theirs = images_and_crops(size, interpolation)
    assert torch.equal(resized_crops(*where, size, interpolation), theirs)


def test_crops_are_the_same_where_products_round_their_factors(monkeypatch):
    *where, theirs = images_and_crops(33, "bicubic")
    exact, rounded = torch.Tensor.__matmul__, []

    def product(a, b):
        rounded.append(a)
        return exact(a.half().float(), b.half().float())  # to 11 bits, as TensorFloat-32

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert torch.equal(resized_crops(*where, 33, "bicubic"), theirs) and len(rounded) == 2


def test_crops_on_a_gpu_never_wait_for_it_and_multiply_halves_in_eights():
    def look(operation, args, result):
        if operation is torch.ops.aten.bmm.dtype:
            seen.append((*(x.dtype for x in args[:2]), result.dtype))
            assert args[0].shape[2] % 8 == 0

    seen = []
    with FakeTensorMode(), Operations(look):  # no such tensor has a value to be asked for
        pixels = torch.empty(10**6, dtype=torch.uint8, device="cuda")
        table = torch.empty(len(SIDES), 5, dtype=torch.long, device="cuda")
        made = resized_crops(pixels, table, 200, 33, "bicubic")
    assert made.shape == (len(SIDES), 33, 33, 3) and made.is_cuda
    assert seen == 2 * [(torch.half, torch.half, torch.float)]


# --- batches -----------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    for i in range(12):
        write_image(tmp_path / f"{i % 2}/{i}.jpg", seed=i, mode="L" if i == 3 else "RGB")
    return ImageSet([(str(path), path.parent.name) for path in sorted(tmp_path.rglob("*.jpg"))])


LOADING = Loading(32, 0, CPU, "bicubic")


def loaders(images):
    return train_loader(images, 4, 1, LOADING), test_loader(images, 5, LOADING)


def kept(images, workers=0):
    return keep_on_device(images, *loaders(images), LOADING._replace(workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_devices_memory_are_those_of_the_loaders(mixed, workers):
    (theirs, tested), (ours, kept_tests) = loaders(mixed), kept(mixed, workers)
    for loader in (theirs, ours):
        loader.batch_sampler.set_epoch(2, first_step=1)
    assert equal(list(batches(theirs, CPU)), list(batches(ours, CPU)))
    assert equal(list(batches(tested, CPU)), kept_tests) and len(kept_tests) == 3
    assert len(ours) == 3 and len(list(ours)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_cropped_on_cuda_while_it_computes_are_those_of_the_loaders(mixed):
    theirs, _ = loaders(mixed)
    device, loading = torch.device("cuda", 0), LOADING._replace(device=torch.device("cuda", 0))
    ours, _ = keep_on_device(mixed, theirs, None, loading)
    for made, expected in zip(batches(ours, device), batches(theirs, CPU), strict=True):
        torch.randn(4096, 4096, device=device).square().sum()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(made, expected))


def test_a_batch_is_made_in_pieces_that_bound_its_memory(mixed, monkeypatch):
    ours, seen = kept(mixed)[0], []
    whole = list(ours)

    def watched(pixels, table, longest, *rest):
        assert table[:, 2:4].max() == longest
        seen.append(len(table) * max(longest, 32) ** 2)
        return resized_crops(pixels, table, longest, *rest)

    monkeypatch.setattr(crops, "resized_crops", watched)
    monkeypatch.setattr(crops, "PIXELS", 10_000)
    assert equal(list(ours), whole) and len(seen) > len(whole) and max(seen) <= 10_000


def test_each_process_makes_the_crops_of_its_rows(mixed, monkeypatch):
    ours = kept(mixed)[0]
    whole = list(ours)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(ours))
    assert equal([map(torch.cat, zip(*batch)) for batch in zip(*shares)], whole)


# --- runs --------------------------------------------------------------------------------------


def test_images_that_do_not_fit_on_the_gpu_are_refused_in_a_line_that_says_by_how_much(
    mixed, monkeypatch
):
    monkeypatch.setattr(cache, "decode", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20 // 4, 2**40))
    needed = sum(3 * w * h for w, h in (Image.open(path).size for path in mixed.paths))
    with pytest.raises(cache.UserError) as error:
        cache.decoded("gpu", mixed.paths, 0, torch.device("cuda", 0), more=2**20)
    assert f"{(needed + 2**20 * 3 / 4) / 2**30:.3g} GiB too few" in str(error.value)
    assert "of GPU memory are free" in str(error.value) and "--cache ram" in str(error.value)


@pytest.mark.parametrize("split", ["001.Bird_0", "102.Bird_3"])
def test_a_damaged_image_ends_the_run_in_one_line_before_it_trains(here, capsys, split):
    make_cub(here / "data")
    torn = next((here / "data").rglob(f"{split}/Bird_0003.jpg"))
    torn.write_bytes(torn.read_bytes()[:-200])
    assert str(torn.relative_to(here)) in fails(TINY + "--cache gpu", capsys)


def test_the_version_of_pillow_is_recorded_and_another_one_warned_of(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1 --cache gpu"))
    args = run_folder(here) / "args.json"
    described = json.loads(args.read_text())
    assert described["versions"]["pillow"] == Image.__version__
    described["versions"]["pillow"] = "9.9"
    args.write_text(json.dumps(described))
    train.main(shlex.split(TINY + "--resume --cache gpu"))
    assert "'pillow': '9.9'" in capsys.readouterr().err
