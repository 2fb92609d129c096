"""Checkpoints that nobody should trust: damaged, of another network, changed by hand. Each is
refused in one line, exit status 2, and nothing in it is executed."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from tests.conftest import (
    TINY,
    checkpoint_of,
    fails,
    make_cub,
    replaced_by_folder,
    run_folder,
    snapshot,
)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def altered(change):
    """The checkpoint of a real run, changed."""

    def make(path):
        checkpoint = torch.load(path)
        torch.save(change(checkpoint) or checkpoint, path)

    return make


def put(*path, value):
    """`value` at a path into the checkpoint."""
    *parents, key = path

    def change(checkpoint):
        for parent in parents:
            checkpoint = checkpoint[parent]
        checkpoint[key] = value

    return altered(change)


def weight(name, value):
    return put("model_state_dict", f"model.{name}", value=value)


def flag(name, value):
    return put("args", name, value=value)


def damaged(change):
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes())))


def flip(data):
    data[len(data) // 2] ^= 4
    return data


def saved(value):
    return lambda path: torch.save(value, path)


def without_a_head(checkpoint):
    del checkpoint["model_state_dict"]["model.embedding.bias"]


def without_history(checkpoint):
    del checkpoint["history"]


def as_published(checkpoint):
    return {"model_state_dict": checkpoint["model_state_dict"]}


EVALUATE, TRAIN = evaluate.main, train.main
CHECKPOINTS = [
    # read by   how it is made                                   the line has
    (EVALUATE,  lambda path: path.write_bytes(b""),              "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(b"some text\n"),   "not a checkpoint"),
    (EVALUATE,  saved(Malicious()),                              "more than tensors and plain"),
    (EVALUATE,  replaced_by_folder,                              "without a run's checkpoints"),
    (EVALUATE,  damaged(lambda data: data[: len(data) // 2]),    "damaged, or"),
    (EVALUATE,  damaged(flip),                                   "its SHA-256 is not the stored"),
    (EVALUATE,  saved([1, 2]),                                   "no dictionary"),
    (EVALUATE,  saved({"x": 1}),                                 "no model_state_dict"),
    (EVALUATE,  put("args", value=None),                         "odd flags"),
    (EVALUATE,  altered(without_a_head),                         "missing model.embedding.bias"),
    (EVALUATE,  weight("fc.bias", torch.zeros(2)),               "unexpected model.fc.bias"),
    (EVALUATE,  weight("embedding.bias", torch.zeros(9)),        "(9,) instead of (16,)"),
    (EVALUATE,  flag("model", "os.system"),                      "stored flags are not valid"),
    (TRAIN,     altered(as_published),                           "evaluate.py takes it"),
    (TRAIN,     altered(without_history),                        "it lacks history"),
    (TRAIN,     flag("lr", float("nan")),                        "stored flags are not valid"),
    (TRAIN,     weight("embedding.bias", torch.zeros(9)),        "its state is not that of this"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch: its data, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    make_cub(folder / "data")
    train.main((TINY + f"--epochs 1 --data-root {folder}/data --LOG_DIR {folder}/logs").split())
    return folder / "data", checkpoint_of(run_folder(folder))


@pytest.fixture
def bad(here, trained):
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copy(trained[1], here / "bad_last.pth"))


@pytest.mark.parametrize("read, make, line", CHECKPOINTS)
def test_a_bad_checkpoint_ends_in_one_line_and_executes_nothing(
    here, capsys, bad, read, make, line
):
    make(bad)
    before = snapshot(here)
    error = fails(f"--resume {bad} {'--epochs 2' if read is TRAIN else ''}", capsys, read)
    assert line in error and str(bad) in error
    assert not (here / "executed").exists() and snapshot(here) == before


@pytest.mark.parametrize("read, flags", [(EVALUATE, ""), (TRAIN, "--epochs 2")])
def test_weights_that_are_not_finite_are_of_no_use(capsys, bad, read, flags):
    weight("embedding.bias", torch.full((16,), torch.nan))(bad)
    before = bad.read_bytes()
    assert "finite" in fails(f"--resume {bad} {flags}", capsys, read)
    assert bad.read_bytes() == before and not list(bad.parent.glob("cub_*.pth"))


@pytest.mark.parametrize("flags, line", [
    ("",                                              "name one checkpoint or run folder"),
    ("{good} --resume {good}",                        "name one checkpoint or run folder"),
    ("--resume nowhere.pth",                          "nowhere.pth: no such checkpoint"),
    ("--resume {good} --json /nowhere/r.json",        "--json /nowhere/r.json"),
    ("--resume {good} --json /",                      "--json /"),
    ("--resume {good} --json /dev/null",              "--json /dev/null"),
    ("--resume {good} --dataset birds",               "--dataset birds: unknown data set"),
    ("--resume {good} --data-root nowhere",           "tried nowhere"),
    ("--resume {good} --loss Triplet",                "unrecognized arguments: --loss"),
    ("--resume {good} --image-size 4",                "--image-size 4: not for toy"),
    ("--resume {good} --embedding-size 9",            "embedding.weight (16, 16) instead of (18"),
    ("--resume {good} --model resnet18",              "missing model.bn1.bias"),
    ("--resume {good} --model timm/vit_tiny_patch16_22", "did you mean timm/vit_tiny_patch16_224"),
])  # fmt: skip
def test_a_bad_flag_of_evaluate_ends_in_one_line(here, capsys, trained, flags, line):
    assert line in fails(flags.format(good=trained[1]), capsys, evaluate.main)


@pytest.mark.parametrize("flags, line", [
    ("--weights {good} --model resnet18",             "missing model.bn1.bias"),
    ("--weights {good} --model timm/test_vit",        "missing model.blocks.0"),
    ("--weights {good} --embedding-size 9",           "embedding.weight (16, 16) instead of (18"),
    ("--weights odd.pth",                             "conv.weight int instead of (16, 3, 5, 5)"),
])  # fmt: skip
def test_weights_of_another_network_are_refused_by_name(here, capsys, trained, flags, line):
    torch.save({"conv.weight": 3}, here / "odd.pth")
    data, good = trained
    error = fails(TINY + f"--data-root {data} " + flags.format(good=good), capsys)
    assert "pth: not the weights of this network" in error and line in error
    assert not (here / "logs").exists()
