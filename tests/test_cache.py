"""--cache ram: the pixels of the files, decoded once."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from dataset.files import read_image
from dataset.images import ImageSet
from loading import cache
from loading.cache import read_from_memory
from loading.loader import Loading, batches, test_loader, train_loader
from tests.conftest import equal, write_image
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture
def mixed(tmp_path):
    """Images of several sizes, colour modes and formats."""
    for i, (mode, suffix) in enumerate([("RGB", "jpg"), ("L", "jpg"), ("P", "png"), ("RGBA", "png"),
                                        ("CMYK", "jpg"), ("RGB", "png")]):  # fmt: skip
        write_image(tmp_path / f"{i % 2}/{i}.{suffix}", seed=i, mode=mode)
    return ImageSet([(str(path), path.parent.name) for path in sorted(tmp_path.rglob("*.*"))])


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_batches_are_those_of_the_files_bit_for_bit(mixed, workers):
    def loaded(read):
        loading = Loading(32, workers, CPU, read=read)
        loaders = train_loader(mixed, 2, 1, loading), test_loader(mixed, 4, loading)
        return [batch for loader in loaders for batch in batches(loader, CPU)]

    expected = loaded(read_image)
    read = read_from_memory(mixed.paths, workers)
    for path in mixed.paths:
        assert read(path).tobytes() == read_image(path).tobytes()
        Path(path).unlink()  # from here on, there is the cache alone
    assert equal(expected, loaded(read)) and len(expected) == 5


def test_a_cache_reaches_processes_that_inherit_nothing(mixed):
    read = read_from_memory(mixed.paths, 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        there = pool.submit(read, mixed.paths[0]).result()
    assert there.tobytes() == read_image(mixed.paths[0]).tobytes()


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_decoded(mixed, monkeypatch):
    monkeypatch.setattr(cache, "available_memory", lambda device: 1000)
    monkeypatch.setattr(cache, "decode", None)
    with pytest.raises(UserError, match="6 images, .* of memory are free.* --cache none"):
        read_from_memory(mixed.paths, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_when_it_is_cached(mixed, workers):
    torn = Path(mixed.paths[1])
    torn.write_bytes(torn.read_bytes()[:-200])
    with pytest.raises(UserError, match=mixed.paths[1]):
        read_from_memory(mixed.paths, workers)


def test_there_is_memory_and_its_limit_is_found():
    assert 2**20 < cache.available_memory() < 2**50
