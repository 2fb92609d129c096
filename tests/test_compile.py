"""--compile, with a backend that traces and plans as the usual one does and needs no compiler."""

import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

import evaluate
import train
from net.backbones import average_and_maximum
from tests import kill
from tests.conftest import TINY, checkpoint_of, fails, make_cub, metrics, run_folder

COMPILE = torch.compile


@pytest.fixture
def fast(monkeypatch):
    """Compiles in a second; a user's process has one network to compile, this one has several."""
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def numbers_of(here, folder):
    (path,) = here.glob(f"{folder}/*/*")
    return metrics(path), torch.load(checkpoint_of(path))


@pytest.mark.parametrize("flags, loss", [
    ("", 1), ("--precision bf16", 1), ("--bn-freeze 0 --loss CosFace", 0)
])  # fmt: skip
def test_a_compiled_run_has_the_losses_and_the_names_of_one_that_is_not(here, fast, flags, loss):
    make_cub(here / "data")
    command = f"{TINY} {flags} --LOG_DIR "
    train.main(shlex.split(command + "plain"))
    train.main(shlex.split(command + "compiled --compile"))
    # network, loss, and evaluations, whose last batch is smaller: in warm-up, and after it
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * (2 + loss)
    (plain, expected), (found, state) = (numbers_of(here, name) for name in ("plain", "compiled"))
    for first, second in zip(plain, found, strict=True):
        for key in ("loss", "metric", "agnostic", "specific", "split"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)
    assert list(state["model_state_dict"]) == list(expected["model_state_dict"])
    torch.testing.assert_close(state["model_state_dict"], expected["model_state_dict"],
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_a_compiled_run_continues_to_the_same_bits_and_evaluates_without_compiling(here, fast):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--compile --LOG_DIR whole"))
    train.main(shlex.split(TINY + "--compile --epochs 1"))
    torch._dynamo.reset()
    train.main(shlex.split(TINY + "--compile --resume"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))
    assert run_folder(here).name.endswith("_compile1_size32_weightsnone")
    evaluate.main(shlex.split(f"{checkpoint_of(run_folder(here))} --workers 0 --json r.json"))
    last, found = metrics(run_folder(here))[-1], json.loads(Path("r.json").read_text())
    assert found["R@1"] == pytest.approx(last["R@1"], abs=5)  # one image of the twenty


def test_the_gradient_of_a_compiled_maximum_compares_no_values(fast):
    """With amax, bfloat16 maps and the usual backend, all gradients were NaN on the CPU."""
    maps = torch.ones(1, 1, 2, 2, requires_grad=True)
    torch.compile(average_and_maximum)(maps).sum().backward()
    assert maps.grad.flatten().tolist() == [1.25, 0.25, 0.25, 0.25]


def test_what_cannot_be_compiled_ends_in_one_line(here, monkeypatch, capsys):
    def without_a_compiler(graph, inputs, mode="the usual mode"):
        raise OSError(f"no compiler for {mode}")

    make_cub(here / "data")
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=without_a_compiler))
    for flags, mode in (("", "the usual mode"), ("reduce-overhead", "reduce-overhead")):
        line = fails(f"{TINY} --compile {flags} --overwrite", capsys)
        assert "--compile: torch cannot compile this network or loss: " in line
        assert f"no compiler for {mode}" in line
    assert "argument --compile: " in fails(TINY + "--compile fast", capsys)
