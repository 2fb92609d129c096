"""What a GPU is asked to do, counted on the CPU."""

import re

import pytest

from benchmarks.launches import counted, counted_loss, trained
from losses import LOSSES
from runs.checkpoint import capture, largest_of
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def training_and_step():
    return trained("--precision bf16")


def test_a_step_of_bn_inception_in_bfloat16_is_1100_launches_at_most_and_no_wait(training_and_step):
    seen = counted(training_and_step[1])
    assert seen.names["convolution"] == 69 and seen.names.total() <= 1100 and not seen.waits


def test_a_save_holds_up_training_for_a_copy_and_a_norm_however_many_tensors_there_are(
    training_and_step,
):
    training, _ = training_and_step
    seen = counted(lambda: (capture(training), largest_of(training).item()))
    assert seen.names["_foreach_copy_"] == 2  # of float32, and of counters
    assert seen.names["_foreach_norm"] == 1 and seen.names.total() <= 6 and seen.waits == 1


@pytest.mark.parametrize("name", LOSSES)
def test_the_page_on_losses_says_how_often_each_waits_for_a_gpu(name):
    rows = re.findall(r"^\| (.*?) \| (?:yes|no) .* \| ([\d, ]+) \|$",
                      (ROOT / "docs/losses.md").read_text(), re.M)  # fmt: skip
    waits = {re.sub(r" \(.*\)", "", loss): number for losses, numbers in rows
             for loss, number in zip(losses.split(", "), numbers.split(", "), strict=True)}
    assert waits.keys() == LOSSES.keys() and counted_loss(name).waits == int(waits[name])
