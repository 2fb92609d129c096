"""python -m dataset.check: all problems of a data set, at once."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset
from dataset import check
from loading.loader import in_parallel
from tests.conftest import SOP, fails, make_cub, make_sop


def run_check(capsys, name, root):
    status = check.main(["--dataset", name, "--data-root", str(root), "--workers", "2"])
    return status, capsys.readouterr().out.splitlines()


def test_check_of_a_sound_data_set_finds_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset.cub, "PUBLISHED", {"train": (20, 2), "test": (20, 2)})
    status, lines = run_check(capsys, "cub", make_cub(tmp_path))
    assert (status, lines) == (0, ["cub: looked at 40 images", "0 problems found"])


def test_check_lists_all_problems_at_once_with_their_paths(tmp_path, capsys):
    images = make_cub(tmp_path) / "CUB_200_2011/images"
    torn, empty = images / "001.Bird_0/Bird_0003.jpg", images / "102.Bird_3/Bird_0001.jpg"
    torn.write_bytes(torn.read_bytes()[:500])
    empty.write_bytes(b"")
    first, second, twin = sorted(images.glob("*/Bird_0000.jpg"))[:3]
    for copy in (second, twin):
        copy.write_bytes(first.read_bytes())
    status, lines = run_check(capsys, "cub", tmp_path)
    assert status == 1 and lines[-1] == "5 problems found"
    assert sum("the published split has" in line for line in lines) == 2
    assert sum(line.startswith(f"{torn}: not an image") for line in lines) == 1
    assert sum(line.startswith(f"{empty}: not an image") for line in lines) == 1
    assert f"{first}, {second}, {twin}: the same file in 3 classes" in lines


def test_check_names_files_of_another_format_than_their_name_says(tmp_path, capsys):
    folder = make_cub(tmp_path) / "CUB_200_2011/images/001.Bird_0"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    noise.save(folder / "Bird_0003.jpg", "PNG")
    noise.convert("CMYK").save(folder / "Bird_0004.jpg", icc_profile=b"x" * 200)
    _, lines = run_check(capsys, "cub", tmp_path)
    assert f"{folder}/Bird_0003.jpg: a PNG file by another name" in lines
    assert f"{folder}/Bird_0004.jpg: CMYK, whose colour profile is ignored" in lines


def test_check_names_listed_files_that_are_missing(tmp_path, capsys):
    missing = make_sop(tmp_path) / SOP / "bicycle_final/2_3.JPG"
    missing.unlink()
    status, lines = run_check(capsys, "SOP", tmp_path)
    assert status == 1 and lines.count(f"{missing}: listed, but not there") == 1
    assert lines[0] == "SOP: looked at 39 images"


def test_check_of_a_folder_without_permission_ends_in_one_line(tmp_path, monkeypatch, capsys):
    make_cub(tmp_path)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    line = fails(f"--data-root '{tmp_path}'", capsys, check.main)
    assert line.endswith("images: Permission denied")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_work_in_parallel_keeps_the_order_of_the_items(workers):
    assert in_parallel(str, range(100), workers, "work") == [str(i) for i in range(100)]
    assert in_parallel(str, [], workers, "work") == []


def test_a_killed_worker_ends_in_one_line(capsys):
    line = fails("", capsys, main=lambda _: in_parallel(os._exit, [1], 1, "cub train"))
    assert "a process died, perhaps for lack of memory; use fewer --workers" in line
