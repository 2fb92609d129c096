"""What of benchmarks.gpu can be run without a GPU: the same code, small, on the CPU."""

import torch

from benchmarks import gpu
from tests.conftest import fails


def test_without_a_gpu_the_benchmark_of_gpus_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device here" in fails("", capsys, lambda _: gpu.main())


def test_the_tables_of_the_benchmark_of_gpus_can_be_made_but_the_demos(here, capsys, monkeypatch):
    small = "--model toy --batch-size 64 --image-size 32 --embedding-size 8 --epochs 1 "
    for name, value in {
        "DEVICE": torch.device("cpu"), "B": 8, "SIZE": 32, "WORKERS": 0, "PRODUCT": 64,
        "COPY": 2**10, "GALLERY": 200, "PER_CLASS": 2, "EPOCHS": {"gpu": 2},
        "SETTINGS": {name: flags for name, flags in gpu.SETTINGS.items()
                     if "compile" not in flags},
        "CUB": gpu.CUB + small,
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.seconds_of, "__defaults__", (1,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    monkeypatch.setattr("benchmarks.input.HEIGHT", 48)
    monkeypatch.setattr("benchmarks.input.WIDTH", 64)
    for part in gpu.PARTS[:-1]:  # the last one is runs again, of the data set that takes drawing
        part()
    said = capsys.readouterr().out
    for table in ("TFLOP/s", "of the roofline", "same bits", "embeddings/s", "ours / product",
                  "grey levels off Pillow's", "s of evaluation"):  # fmt: skip
        assert table in said
