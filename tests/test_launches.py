"""What a GPU is asked to do, counted on the CPU."""

import pytest

from benchmarks.launches import counted, trained
from runs.checkpoint import capture, largest_of


@pytest.fixture(scope="module")
def training_and_step():
    return trained("--precision bf16")


def test_a_step_of_bn_inception_in_bfloat16_is_1100_launches_at_most(training_and_step):
    launches = counted(training_and_step[1]).names
    assert launches["convolution"] == 69 and launches.total() <= 1100


def test_a_save_holds_up_training_for_a_copy_and_a_norm_however_many_tensors_there_are(
    training_and_step,
):
    training, _ = training_and_step
    launches = counted(lambda: (capture(training), largest_of(training))).names
    assert launches["_foreach_copy_"] == 2  # of float32, and of counters
    assert launches["_foreach_norm"] == 1 and launches.total() <= 6
