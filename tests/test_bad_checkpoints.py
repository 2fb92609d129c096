"""Checkpoints that nobody trusts: torn, forged, of another network. Each is refused in one line,
exit status 2, and nothing in it is executed."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import evaluate
import train
from tests.conftest import (
    TINY,
    fails,
    make_cub,
    published_checkpoint,
    replaced_by_folder,
    run_folder,
    snapshot,
)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**33)


def crashing(path):
    """A tuple in a tuple, three million times, as a key: its hash overflows the stack."""
    pickled = b"\x80\x02}" + b")" + b"\x85" * 3_000_000 + b"K\x01s."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("version", b"3"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)


def altered(change, save=torch.save):
    """The checkpoint of a real run, changed."""

    def make(path):
        checkpoint = torch.load(path)
        save(change(checkpoint) or checkpoint, path)

    return make


def put(key, value):
    return altered(lambda checkpoint: checkpoint.update({key: value}))


def weight(value):
    key = "model.embedding.weight"
    return altered(lambda checkpoint: checkpoint["model_state_dict"].update({key: value}))


def flag(name, value):
    return altered(lambda checkpoint: checkpoint["args"].update({name: value}))


def damaged(change):
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes())))


def flip(data):
    data[len(data) // 2] ^= 4
    return data


def state_of_another_shape(checkpoint):
    state = checkpoint["optimizer_state_dict"]["state"]
    state[next(iter(state))]["exp_avg"] = torch.zeros(2, 2)


def forged(part, *path, value=None):
    """`value` put, or nothing left, at a path into one of the stored states."""

    def change(checkpoint):
        at = checkpoint[f"{part}_state_dict"]
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return altered(change)


def published_of_size(size):
    """A checkpoint without flags, of an embedding that says it has `size` dimensions."""
    tensor = torch.zeros(1, 1).expand(size, 1024)
    return lambda path: torch.save({"model_state_dict": {"model.embedding.weight": tensor}}, path)


TRAIN, EVALUATE = "train", "evaluate"
CHECKPOINTS = [
    # read by   how it is made                                   the line has
    (EVALUATE,  lambda path: path.write_bytes(b""),              "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(b"some text\n"),   "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(b"PK\3\4" * 50),   "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(pickle.dumps(Malicious())), "not a checkpoint"),
    (EVALUATE,  lambda path: torch.save(Malicious(), path),      "more than tensors and plain"),
    (EVALUATE,  lambda path: torch.save({"x": Path()}, path),    "more than tensors and plain"),
    (EVALUATE,  lambda path: torch.save([1, 2], path),           "no dictionary"),
    (EVALUATE,  lambda path: torch.save({}, path),               "no dictionary"),
    (EVALUATE,  lambda path: torch.save({"x": 1}, path),         "no model_state_dict"),
    (EVALUATE,  lambda path: torch.save({"model_state_dict": {}}, path), "missing model."),
    (EVALUATE,  replaced_by_folder,                              "Is a directory"),
    (EVALUATE,  bomb,                                            "unpacks to more than its size"),
    (EVALUATE,  sparse,                                          "larger than 4 GiB"),
    (EVALUATE,  damaged(lambda data: data[: len(data) // 2]),    "its end is missing"),
    (EVALUATE,  damaged(flip),                                   "its SHA-256 is not the stored"),
    (EVALUATE,  weight(5),                                       "embedding.weight int instead of"),
    (EVALUATE,  weight(torch.tensor(1.0)),                       "embedding.weight () instead"),
    (EVALUATE,  lambda path: os.unlink(path) or os.mkfifo(path), "it is a device or a pipe"),
    (EVALUATE,  crashing,                                        "it crashes the process"),
    (EVALUATE,  weight(torch.zeros(16, 1024, dtype=torch.complex64)), "misshapen"),
    (TRAIN,     flag(("a",), 1),                                 "stored flags are not valid"),
    (EVALUATE,  flag("embedding_size", 10**9),                   "stored flags are not valid"),
    (EVALUATE,  weight(torch.zeros(3, 3)),                       "misshapen"),
    (EVALUATE,  weight(torch.full((16, 1024), float("nan"))),    "not all finite"),
    (EVALUATE,  weight(torch.zeros(16, 1024).to_sparse()),       "cannot be loaded"),
    (EVALUATE,  put("args", None),                               "no dictionary"),
    (EVALUATE,  published_of_size(10**12),                       "embedding-size: invalid number"),
    (EVALUATE,  published_of_size(0),                            "embedding-size: invalid number"),
    (EVALUATE,  flag("dataset", "birds"),                        "birds: unknown data set"),
    (EVALUATE,  flag("batch_size", "many"),                      "stored flags are not valid"),
    (EVALUATE,  flag("model", "os.system"),                      "stored flags are not valid"),
    (TRAIN,     put("optimizer_state_dict", {}),                 "optimiser or scheduler"),
    (TRAIN,     altered(state_of_another_shape),                 "optimiser or scheduler"),
    (TRAIN,     put("scheduler_state_dict", None),               "optimiser or scheduler"),
    (TRAIN,     forged("scheduler", "last_epoch", value=-7),     "last_epoch is -7, not 1"),
    (TRAIN,     forged("scheduler", "base_lrs", value=[torch.ones(2)]), "base_lrs is [tensor"),
    (TRAIN,     forged("optimizer", "param_groups", 0, "lr", value="x"), "lr is 'x', not 0.0001"),
    (TRAIN,     forged("optimizer", "param_groups", 0, "betas", value=(5, 5)), "betas is (5, 5)"),
    (TRAIN,     forged("optimizer", "param_groups", 0),          "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "param_groups"),             "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg"),    "it has step, exp_avg_sq, not"),
    (TRAIN,     forged("optimizer", "state", 279, value=[1]),    "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 10**6, value={}),   "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 279, "step", value=torch.tensor(-9.0)), "step is"),
    (TRAIN,     forged("optimizer", "state", 279, "step", value="x"), "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg", value=torch.ones(16).int()), "int32"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg", value=torch.ones(16) / 0), "finite"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg_sq", value=-torch.ones(16)), "negative"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg", value=torch.ones(1).expand(16)),
     "ordinary"),
    (TRAIN,     put("criterion_state_dict", {"metric_loss.proxies": torch.zeros(9, 8)}), "(9, 8)"),
    (TRAIN,     put("epoch", "two"),                             "are not a training run's"),
    (TRAIN,     put("history", []),                              "are not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": "best"}]),   "are not a training run's"),
    (TRAIN,     put("partial", {"step": -1}),                    "are not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": 1.0, "R@2": None}]), "not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": float("nan")}]), "not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": 10**400}]),  "not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": 1.0, 5: 1}]), "not a training run's"),
    (TRAIN,     put("args", [1]),                                "are not a training run's"),
    (TRAIN,     flag("lr", float("nan")),                        "stored flags are not valid"),
    (TRAIN,     flag("nonsense", 1),                             "stored flags are not valid"),
    (TRAIN,     lambda path: published_checkpoint(path),         "--weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    make_cub(folder / "data")
    here = os.getcwd()
    os.chdir(folder)
    train.main((TINY + "--epochs 1").split())
    os.chdir(here)
    return folder


@pytest.mark.parametrize("reader, make, line", CHECKPOINTS)
def test_a_bad_checkpoint_ends_in_one_line_and_executes_nothing(
    here, capsys, trained, reader, make, line
):
    path = here / "bad.pth"
    path.write_bytes((run_folder(trained) / "cub_bn_inception_last.pth").read_bytes())
    (here / "data").symlink_to(trained / "data")
    make(path)
    before = snapshot(here)
    command = f"--resume {path} --workers 0 "
    main = evaluate.main
    if reader == TRAIN:
        main, command = train.main, command + "--epochs 2"
    assert line in fails(command, capsys, main)
    assert not (here / "executed").exists() and snapshot(here) == before


@pytest.mark.parametrize("flags, line", [
    ("",                                        "--resume"),
    ("--resume nowhere.pth",                    "nowhere.pth: no such checkpoint"),
    ("--resume {run} --json /nowhere/r.json",   "--json /nowhere/r.json"),
    ("--resume {run} --json /",                 "--json /"),
    ("--resume {run} --json /dev/null",         "--json /dev/null"),
    ("--resume /dev/zero",                      "it is a device or a pipe"),
    ("--resume {run} --dataset birds",          "--dataset birds: unknown data set"),
    ("--resume {run} --embedding-size 9",       "embedding.weight (16, 1024) instead of (18"),
    ("--resume {run} --data-root nowhere",      "tried nowhere"),
])  # fmt: skip
def test_a_bad_flag_of_evaluate_ends_in_one_line(here, capsys, trained, flags, line):
    run = run_folder(trained) / "cub_bn_inception_last.pth"
    assert line in fails(flags.format(run=run), capsys, evaluate.main)


def test_weights_of_another_form_are_refused_in_one_line(here, capsys):
    make_cub(here / "data")
    torch.save({"conv1_7x7_s2.weight": 3}, here / "odd.pth")
    assert "odd.pth: not the weights" in fails(TINY + "--weights odd.pth", capsys)
