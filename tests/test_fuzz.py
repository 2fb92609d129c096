"""Mutated list files, .mat files and checkpoints: nothing but a UserError ever comes out."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from cli import UserError
from tests.conftest import SOP, make_cars
from utils import read_checkpoint

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def reads_or_refuses(read):
    try:
        read()
    except UserError as error:
        assert str(error)


def mutated(data, edits):
    data = bytearray(data)
    for where, value in edits:
        data[where % len(data)] = value
    return bytes(data)


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)


@FUZZ
@given(st.lists(st.lists(st.text(max_size=8), max_size=6).map(" ".join), max_size=6).map("\n".join))
def test_fuzzed_list_files_are_read_or_refused(tmp_path, text):
    folder = tmp_path / SOP
    folder.mkdir(exist_ok=True)
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        (folder / name).write_text("image_id\n" + text, encoding="utf-8", newline="")
    for split in ("train", "test"):
        reads_or_refuses(lambda: dataset.load("SOP", tmp_path, split))  # noqa: B023


@FUZZ
@given(edits=EDITS)
def test_fuzzed_mat_files_are_read_or_refused(tmp_path, edits):
    if not (tmp_path / "original").exists():
        make_cars(tmp_path)
        (tmp_path / "cars_annos.mat").rename(tmp_path / "original")
    data = (tmp_path / "original").read_bytes()
    (tmp_path / "cars_annos.mat").write_bytes(mutated(data, edits))
    reads_or_refuses(lambda: dataset.load("cars", tmp_path, "train"))


@FUZZ
@given(edits=EDITS, zipped=st.booleans(), cut=st.integers(0, 10**6))
def test_fuzzed_checkpoints_are_read_or_refused(tmp_path, edits, zipped, cut):
    state = {"model_state_dict": {"x": torch.arange(9.0)}, "epoch": 1, "args": {"lr": 0.1}}
    path = tmp_path / "fuzzed.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data = mutated(path.read_bytes(), edits)
    path.write_bytes(data[: cut % len(data)] if cut % 3 == 0 else data)
    reads_or_refuses(lambda: read_checkpoint(path))
