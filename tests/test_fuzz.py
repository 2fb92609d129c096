"""Files changed at random: they are read or refused, and nothing but a UserError comes out."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from dataset.files import read_image
from storage import read_checkpoint
from tests.conftest import SOP, write_image
from utils import UserError

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)
CHECKPOINT = {"model_state_dict": {"x": torch.arange(9.0)}, "history": [1], "args": {"lr": 0.1}}


def read_or_refused(read, *args):
    """What `read` gives, or None."""
    try:
        return read(*args)
    except UserError as error:
        assert str(error)


def mutated(data, edits):
    data = bytearray(data)
    for where, value in edits:
        data[where % len(data)] = value
    return bytes(data)


@FUZZ
@given(st.lists(st.lists(st.text(max_size=8), max_size=6).map(" ".join), max_size=6).map("\n".join))
def test_fuzzed_list_files_are_read_or_refused(tmp_path, text):
    (tmp_path / SOP).mkdir(exist_ok=True)
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        (tmp_path / SOP / name).write_text("image_id\n" + text, encoding="utf-8", newline="")
    read_or_refused(dataset.load, "SOP", tmp_path, "train")


@FUZZ
@given(edits=EDITS, suffix=st.sampled_from(["jpg", "png", "webp", "gif", "bmp", "tif"]))
def test_fuzzed_images_are_read_or_refused(tmp_path, edits, suffix):
    path = tmp_path / f"image.{suffix}"
    write_image(path, seed=0)
    path.write_bytes(mutated(path.read_bytes(), edits))
    for background in (None, "white"):
        image = read_or_refused(read_image, path, background)
        assert image is None or image.mode == "RGB"


@FUZZ
@given(edits=EDITS, zipped=st.booleans(), cut=st.integers(0, 10**6))
def test_fuzzed_checkpoints_of_others_are_read_or_refused(tmp_path, edits, zipped, cut):
    path = tmp_path / "fuzzed.pth"
    torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=zipped)
    data = mutated(path.read_bytes(), edits)
    path.write_bytes(data[: cut % len(data)] if cut % 3 == 0 else data)
    read_or_refused(read_checkpoint, path)
