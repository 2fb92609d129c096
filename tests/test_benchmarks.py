"""What of the benchmarks needs neither time nor a GPU."""

import importlib

import pytest
import torch

from benchmarks import gpu
from tests.conftest import ROOT, fails


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("benchmarks/[a-z]*.py")))
def test_a_benchmark_finds_what_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")


def test_without_a_gpu_the_benchmark_of_gpus_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device here" in fails("", capsys, lambda _: gpu.main())
