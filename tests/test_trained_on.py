"""A checkpoint records its training images, and an evaluation counts those among its own."""

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from net import create_model
from storage import read_checkpoint, write_checkpoint
from tests.conftest import TINY, checkpoint_of, make_cub, make_folder, run_folder, write_image
from tests.test_page import data_of

IMAGES = Path("data/CUB_200_2011/images")


def known_to(path):
    """(names of the classes, digests of the files) that a checkpoint was trained on."""
    trained_on = read_checkpoint(path)["trained_on"]
    assert trained_on["files"].dtype == torch.int64
    return trained_on["classes"], sorted(trained_on["files"].tolist())


def digests_of(paths):
    digests = (hashlib.sha256(Path(path).read_bytes()).digest() for path in paths)
    return sorted(int.from_bytes(digest[:8], "big", signed=True) for digest in digests)


def copied(source, count, folder):
    """`count` files of a class of CUB, in another folder and under other names."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in sorted((IMAGES / source).glob("Bird*"))[:count]:
        shutil.copy(path, Path(folder, f"copy of {source} {path.name}"))


def evaluated(path, capsys, flags=""):
    """(the lines printed, what --json has of the test images)."""
    capsys.readouterr()
    evaluate.main([str(path), *shlex.split(f"--workers 0 --json r.json {flags}")])
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(Path("r.json").read_text())["images"]["test"]


def test_copies_of_training_files_and_classes_of_the_same_name_are_counted(run, capsys):
    copied("001.Bird_0", 3, "own/test/new")
    copied("002.Bird_1", 2, "own/test/other")
    for i in range(4):
        write_image(Path(f"own/test/001.Bird_0/{i}.jpg"), seed=900 + i)
    lines, images = evaluated(run, capsys, "--dataset folder --data-root own --page p.html")
    line = "test: 1 of 3 classes, 5 of 9 images were trained on."
    assert line in lines and line in data_of("p.html")["about"]
    assert images["trained_on"] == {"classes": 1, "images": 5}
    shutil.rmtree("own/test/001.Bird_0")
    lines, images = evaluated(run, capsys, "--dataset folder --data-root own")
    assert "test: 5 of 5 images were trained on." in lines
    assert images["trained_on"] == {"classes": 0, "images": 5}


def test_nothing_is_said_of_a_test_split_that_was_not_trained_on(run, capsys):
    lines, images = evaluated(run, capsys)
    assert images["trained_on"] == {"classes": 0, "images": 0}
    results = json.loads((run / "results.json").read_text())["images"]
    assert results["test"] == images and "trained_on" not in results["train"]
    assert not any("trained on" in line for line in lines)
    assert "trained on" not in data_of(run / "page.html")["about"]
    assert "trained on" not in next(run.glob("*_results.txt")).read_text()
    for which in ("best", "last"):
        classes, files = known_to(checkpoint_of(run, which))
        assert classes == ["001.Bird_0", "002.Bird_1"]
        assert files == digests_of([*IMAGES.glob("00*/Bird*")])


def test_a_run_counts_the_training_images_among_its_test_images(here, capsys):
    odd = os.fsdecode(b"caf\xe9")  # no UTF-8
    make_folder(here / "photos/train", ["auk", odd])
    make_folder(here / "photos/test", ["wren"], first=5)
    shutil.copytree(here / "photos/train/auk", here / "photos/test/auk")
    train.main(shlex.split(TINY + "--dataset folder --data-root photos --epochs 1"))
    line, folder = "test: 1 of 2 classes, 8 of 16 images were trained on.", run_folder(here)
    assert line in capsys.readouterr().out.splitlines()
    assert line in next(folder.glob("*_results.txt")).read_text()
    assert line in data_of(folder / "page.html")["about"]
    images = json.loads((folder / "results.json").read_text())["images"]
    assert images["test"]["trained_on"] == {"classes": 1, "images": 8}
    assert known_to(checkpoint_of(folder))[0] == ["auk", odd]


def test_held_out_classes_do_not_count_as_trained_on_and_folds_count_together(
    here, capsys
):
    make_cub(here / "data", classes=12)
    flags = TINY.replace("--batch-size 8", "--batch-size 4") + "--val-classes 0.5 --epochs 1 "
    train.main(shlex.split(flags))
    folder = run_folder(here)
    classes, files = known_to(checkpoint_of(folder, "best"))
    assert classes == [f"00{c + 1}.Bird_{c}" for c in (3, 4, 5)]
    assert files == digests_of(path for c in (4, 5, 6) for path in IMAGES.glob(f"00{c}*/Bird*"))
    images = json.loads((folder / "results.json").read_text())["images"]
    for split in ("val", "test"):
        assert images[split]["trained_on"] == {"classes": 0, "images": 0}
    lines, _ = evaluated(folder, capsys)
    assert not any("trained on" in line for line in lines)

    train.main(shlex.split(flags + "--fold 1 --LOG_DIR other"))
    first, second = checkpoint_of(folder), next(here.glob("other/**/*_last.pth"))
    for c in (1, 4, 101):
        source = next(IMAGES.glob(f"{c:03d}*"))
        shutil.copytree(source, here / "own/test" / source.name)
    own = "--dataset folder --data-root own"
    for paths, classes in ((f"'{first}'", 1), (f"'{second}'", 1), (f"'{first}' '{second}'", 2)):
        evaluate.main(shlex.split(f"{paths} --workers 0 {own}"))
        line = f"test: {classes} of 3 classes, {10 * classes} of 30 images were trained on."
        assert line in capsys.readouterr().out


def test_a_continued_run_keeps_its_record_and_an_older_run_makes_one(here, run):
    last = checkpoint_of(run)
    known = known_to(last)
    next(IMAGES.glob("001*/*1.jpg")).write_bytes(next(IMAGES.glob("001*/*2.jpg")).read_bytes())
    train.main(shlex.split(TINY + "--epochs 2 --resume"))
    assert known_to(last) == known  # of the files as they were
    checkpoint = read_checkpoint(last)
    del checkpoint["trained_on"]
    write_checkpoint(last, checkpoint)
    train.main(shlex.split(TINY + "--epochs 3 --resume"))
    assert known_to(last) == (known[0], digests_of(IMAGES.glob("00*/Bird*")))


def test_the_training_images_of_weights_count_too(here, run):
    first = known_to(checkpoint_of(run))
    make_folder(here / "photos", ["auk", "wren", "x", "y"])
    train.main(shlex.split(
        TINY + f"--dataset folder --data-root photos --LOG_DIR second --epochs 1 --weights '"
        f"{checkpoint_of(run)}'"
    ))  # fmt: skip
    classes, files = known_to(next(here.glob("second/**/*_best.pth")))
    assert classes == [*first[0], "auk", "wren"]
    new = [path for name in ("auk", "wren") for path in Path("photos", name).iterdir()]
    assert files == sorted(first[1] + digests_of(new))


@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_without_a_record_is_named_and_others_are_counted(
    here, capsys, several
):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1 --train-on all"))
    torch.save({"model_state_dict": create_model("toy", 8).state_dict()}, "p.pth")
    known = f"'{checkpoint_of(run_folder(here))}' " if several else ""
    flags = "--dataset cub --data-root data --model toy --image-size 32 --workers 0 --json r.json"
    evaluate.main(shlex.split(f"{known}p.pth {flags}"))
    out, counts = capsys.readouterr().out, json.loads(Path("r.json").read_text())["images"]["test"]
    assert ("test: 2 of 2 classes, 20 of 20 images were trained on." in out) == several
    assert ("p.pth does not know what it was trained on." in out) == several
    assert ("trained_on" in counts) == several
