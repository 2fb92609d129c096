"""What a run says on the terminal."""

import re
import shlex
import sys
from functools import partial
from pathlib import Path

import train
import utils
from runs import safety
from tests.conftest import TINY, make_cub, run_folder


def test_a_run_says_what_will_happen_and_how_long_it_will_take(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 3"))
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("cub train: 20 images of 2 classes")
    # 16 x 3 x 5 x 5 + 16 and 2 x 16; 16 x 16 + 16, twice; 2 x 8
    assert lines[2].endswith("parameters: backbone 0.00125, heads 0.000544, proxies 1.6e-05")
    assert lines[3].endswith("float32: 3 epochs of 2 steps of 8 images")
    assert lines[4] == f"run folder: {run_folder(Path())}"
    assert lines[5].startswith("before training  R@1 ")
    assert lines[6].startswith("about ") and " for 3 epochs: " in lines[6]
    assert [bool(re.search(r"images/s; \d\d:\d\d left\)$", line)) for line in lines[7:10]] == [
        False, True, False  # a step of warm-up does not tell how long the others take
    ]  # fmt: skip


def test_a_quiet_run_prints_its_results_alone(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--quiet"))
    out, err = capsys.readouterr()
    assert out.startswith("start: R@1 ") and "\nlast: epoch 1  R@1 " in out and "loss" not in out
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert "quiet" not in run_folder(here).name
    train.main(shlex.split(TINY + "--epochs 3 --resume"))
    assert "epoch 2  loss" in capsys.readouterr().out


def test_the_bar_shows_loss_and_images_a_second(here, capsys, monkeypatch):
    make_cub(here / "data")
    monkeypatch.setattr(safety, "FETCH_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(utils, "tqdm", partial(utils.tqdm, mininterval=0))
    train.main(shlex.split(TINY + "--epochs 1"))
    _, err = capsys.readouterr()
    assert re.search(r"epoch 0: +\d+%.* images/s, loss \d+\.\d{4}\]", err)
