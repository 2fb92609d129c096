"""--cache: the pixels of the files, decoded once."""

import errno
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cli import UserError
from dataset import cache
from dataset.cache import open_cache
from dataset.files import read_image
from dataset.images import ImageSet
from dataset.loader import batches, test_loader
from dataset.transforms import test_transform
from tests.conftest import equal, write_image

test_loader.__test__ = test_transform.__test__ = False  # ours, not pytest's
CPU = torch.device("cpu")


@pytest.fixture
def mixed(tmp_path):
    """Images of several sizes, colour modes and formats."""
    for i, (mode, suffix) in enumerate([("RGB", "jpg"), ("L", "jpg"), ("P", "png"), ("RGBA", "png"),
                                        ("CMYK", "jpg"), ("RGB", "png")]):  # fmt: skip
        write_image(tmp_path / f"images/{i % 2}/{i}.{suffix}", seed=i, mode=mode)
    paths = sorted((tmp_path / "images").rglob("*.*"))
    return ImageSet([(str(path), int(path.parent.name)) for path in paths], test_transform(32))


def cached(kind, images, workers=1):
    root = Path(images.paths[0]).parents[2]
    return open_cache(kind, "mixed", images.paths, root, workers)


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pixels_are_those_of_the_files(mixed, kind, workers):
    expected = list(batches(test_loader(mixed, 4, workers, CPU), CPU))
    mixed.read = cached(kind, mixed, workers)
    assert equal(expected, list(batches(test_loader(mixed, 4, workers, CPU), CPU)))
    for path in mixed.paths:
        assert mixed.read(path).tobytes() == read_image(path).tobytes()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_reaches_processes_that_inherit_nothing(mixed, kind):
    read = cached(kind, mixed)
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        there = pool.submit(read, mixed.paths[0]).result()
    assert there.tobytes() == read_image(mixed.paths[0]).tobytes()


def test_a_disk_cache_is_reused_until_an_image_changes(mixed, monkeypatch):
    first = cached("disk", mixed)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", None)  # nothing is decoded again
        assert cached("disk", mixed).file == first.file
    write_image(Path(mixed.paths[0]), seed=99)
    assert cached("disk", mixed)(mixed.paths[0]).tobytes() == read_image(mixed.paths[0]).tobytes()
    assert not first.file.exists()


def test_two_processes_that_want_the_same_disk_cache_decode_it_once(mixed, capfd):
    with ProcessPoolExecutor(2) as pool:
        files = [pool.submit(cached, "disk", mixed) for _ in range(2)]
        first, second = (future.result().file for future in files)
    assert first == second and first.exists()
    assert capfd.readouterr().out.count("--cache disk: decoding 6 images") == 1


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:5], lambda data: data[:-1],
    lambda data: bytes(9) + data[9:], lambda data: data[:-20] + bytes(20),
])  # fmt: skip
def test_a_damaged_disk_cache_is_made_anew(mixed, damage):
    file = cached("disk", mixed).file
    file.write_bytes(damage(file.read_bytes()))
    for path in mixed.paths:
        assert cached("disk", mixed)(path).tobytes() == read_image(path).tobytes()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_that_does_not_fit_is_refused_before_anything_is_decoded(mixed, monkeypatch, kind):
    monkeypatch.setattr(cache, "available_memory", lambda: 1000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(cache, "decode", None)
    with pytest.raises(UserError, match=f"--cache {kind}: 6 images need .* are free"):
        cached(kind, mixed)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_an_unreadable_image_is_named_when_it_is_cached_and_nothing_is_left(mixed, kind):
    data = Path(mixed.paths[1]).read_bytes()
    Path(mixed.paths[1]).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=mixed.paths[1]):
        cached(kind, mixed)
    assert not list(Path(mixed.paths[0]).parents[2].rglob("*.pixels*"))


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_ends_caching_in_one_line_and_nothing_is_left(mixed, monkeypatch, kind, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match="cannot be written, .* bytes needed .No space left"):
        cached(kind, mixed)
    assert not list(Path(mixed.paths[0]).parents[2].rglob("*.pixels*"))


def test_there_is_memory_and_its_limit_is_found():
    assert 2**20 < cache.available_memory() < 2**50
