"""What a step that is not finite has left is never saved: the run stops, with one line that says
which step it was."""

import os
import shlex
import shutil
import signal
from math import inf, nan

import pytest

import dataset.files
import train
from losses import DDML
from runs import safety
from storage import read_checkpoint
from tests.conftest import TINY, fails, make_cub, metrics, run_folder

TEN_STEPS = TINY + "--batch-size 2 "  # an epoch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = make_cub(tmp_path_factory.mktemp("trained") / "data").parent
    flags = f"--epochs 1 --data-root {folder}/data --LOG_DIR {folder}/logs"
    train.main(shlex.split(TEN_STEPS + flags))
    return folder


@pytest.fixture
def folder(here, trained):
    """The folder of a run that has finished its first epoch."""
    shutil.copytree(trained, here, dirs_exist_ok=True)
    return run_folder(here)


def weights(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")}


def spoil(monkeypatch, at, source="loss", factor=nan, then=lambda: None):
    """Make a number of step `at` not finite; returns the steps made, which grow with the run."""
    steps, original = [], DDML.forward

    def forward(self, head, *rest):
        total, terms = original(self, head, *rest)
        if len(steps) == at:
            then()
            if source == "gradient":
                head.register_hook(lambda gradient: gradient * factor)
            elif source == "loss":
                total = total * factor
            else:
                terms[source] = terms[source] * factor
        steps.append(total)
        return total, terms

    monkeypatch.setattr(DDML, "forward", forward)
    return steps


@pytest.mark.parametrize("factor", [nan, inf])
@pytest.mark.parametrize("source", ["loss", "split", "gradient"])
def test_the_line_names_epoch_step_number_and_files(folder, capsys, monkeypatch, source, factor):
    before, read, original = weights(folder), [], dataset.files.opened
    spoil(monkeypatch, 1, source, factor)
    monkeypatch.setattr(
        dataset.files, "opened", lambda path, own: read.append(path) or original(path, own)
    )
    error = fails(TEN_STEPS + "--resume", capsys)
    assert f"epoch 1, step 1: the {source} is not finite" in error
    assert error.endswith(f"Files of the batch: {', '.join(read[2:4])}")
    assert weights(folder) == before and len(metrics(folder)) == 1


@pytest.mark.parametrize("flags, seconds, made", [
    ("",                     0,   2),   # at the next look at the losses
    ("",                     1e9, 10),  # at the end of the epoch
    ("--checkpoint-every 3", 1e9, 3),   # before a checkpoint
])  # fmt: skip
def test_the_run_stops_at_the_next_look_or_save(folder, capsys, monkeypatch, flags, seconds, made):
    assert safety.FETCH_SECONDS <= 1
    before = weights(folder)
    monkeypatch.setattr(safety, "FETCH_SECONDS", seconds)
    steps = spoil(monkeypatch, 1)
    assert "epoch 1, step 1: the loss" in fails(TEN_STEPS + f"--resume {flags}", capsys)
    assert len(steps) == made and weights(folder) == before


def test_a_signal_does_not_save_it_either(folder, capsys, monkeypatch):
    before = weights(folder)
    spoil(monkeypatch, 1, then=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "epoch 1, step 1: the loss" in fails(TEN_STEPS + "--resume", capsys)
    assert weights(folder) == before


@pytest.mark.parametrize("flags", ["", "--checkpoint-every 10"])
@pytest.mark.parametrize("what", ["weights", "moments"])
def test_an_update_that_overflowed_is_not_saved(folder, capsys, monkeypatch, what, flags):
    """Though every loss and gradient was finite."""
    before, steps, original = weights(folder), [], train.train_step

    def train_step(model, criterion, optimizer, *rest):
        values = original(model, criterion, optimizer, *rest)
        steps.append(values)
        if len(steps) == 10:
            proxies = criterion.metric_loss.proxies
            tensor = proxies.data if what == "weights" else optimizer.state[proxies]["exp_avg"]
            tensor[0, 0] = inf
        return values

    monkeypatch.setattr(train, "train_step", train_step)
    line = fails(TEN_STEPS + f"--resume {flags}", capsys)
    assert "epoch 1, step 9: the state of network, proxies or optimiser after it is not" in line
    assert weights(folder) == before and len(metrics(folder)) == 1


@pytest.mark.parametrize("flags", ["--weight-decay 1e9", "--optimizer sgd", "--optimizer rmsprop"])
def test_of_a_run_that_diverges_only_finite_numbers_are_saved(here, capsys, flags):
    make_cub(here / "data")
    flags = TINY + f"--lr 1e9 --checkpoint-every 1 --epochs 9 {flags}"
    assert "finite" in fails(flags, capsys)
    for path in weights(run_folder(here)):
        checkpoint = read_checkpoint(path)
        for part in checkpoint.keys() & {"model_state_dict", "criterion_state_dict"}:
            assert all(t.isfinite().all() for t in checkpoint[part].values()), path
