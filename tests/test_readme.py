"""What the README shows is run."""

import re
import runpy
import shlex
import subprocess

import numpy as np
import pytest
import torch

import evaluate
import search
import train
from dataset import demo
from tests.conftest import ROOT, TINY, make_folder, run_folder


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_python_block_embeds_an_image_of_the_demo(here, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 3)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    flags = re.search(r"^DEMO = (.*)$", makefile, re.M)[1]
    train.main(shlex.split(flags + " --epochs 1 --workers 0"))
    (block,) = (block for block in python_blocks() if "load_model" in block)
    names = {}
    exec(block, names)
    (expected,) = (path for path in run_folder(here).glob("*_last.pth"))
    assert names["embedding"].shape == (1, 64)
    assert abs(names["embedding"].norm().item() - 1) < 1e-5

    model = names["load_model"](expected)
    images = train.dataset.load("demo", "data", "train")
    cpu = torch.device("cpu")
    loader = train.test_loader(images, 8, train.Loading(64, 0, cpu))
    with torch.inference_mode():
        pixels, _, _ = next(train.batches(loader, cpu))
        first = model.embed(model.prepare(pixels))[:1]
    torch.testing.assert_close(names["embedding"], first, rtol=1e-4, atol=1e-5)


def test_the_example_runs_in_20_lines(capsys):
    example = ROOT / "examples" / "own_loop.py"
    code = [line for line in example.read_text().splitlines()
            if line.strip() and not line.startswith(("import", "from", '"""'))]  # fmt: skip
    assert len(code) <= 20
    runpy.run_module("examples.own_loop", run_name="__main__")
    assert capsys.readouterr().out.count("agnostic") == 3


def test_a_folder_of_ones_own_trains_evaluates_and_is_searched_with_the_commands_shown(here):
    make_folder(here / "photos", per_class=40)
    text = (ROOT / "README.md").read_text()
    first = re.search(r"^python train.py (--dataset folder .*)$", text, re.M)[1]
    second = re.search(r"^python evaluate.py (logs/logs_folder)$", text, re.M)[1]
    tiny = "--model toy --weights none --image-size 32 --embedding-size 8 --epochs 1"
    train.main(shlex.split(f"{first} {tiny} --workers 0 --wandb disabled"))
    evaluate.main([second, "--workers", "0"])
    third = re.search(r"^python search.py (.*)$", text, re.M)[1]
    next((here / "photos").glob("*/*")).rename("A.jpg")
    search.main([*shlex.split(third), "--workers", "0"])
    assert (here / "found.html").stat().st_size > 10_000


def test_the_export_is_searched_in_a_vector_database(here):
    for package in ("pyarrow", "pymilvus", "milvus_lite"):
        pytest.importorskip(package)
    make_folder(here / "photos", per_class=9)
    flags = TINY.replace("--embedding-size 8", "") + "--dataset folder --data-root photos"
    train.main(shlex.split(flags + " --epochs 1"))
    evaluate.main([str(run_folder(here)), "--workers", "0", "--export", "OUT.parquet"])
    (block,) = (block for block in python_blocks() if "Milvus" in block)
    assert len([line for line in block.splitlines() if line]) <= 10
    names = {}
    exec(block, names)
    client, part = names["client"], names["part"]
    assert client.describe_index("images", "embedding")["index_type"] == "FLAT"
    x = np.stack(part["embedding"].to_numpy(zero_copy_only=False))
    nearest = np.argsort(-(x @ x[0]))[:5]
    (found,) = names["found"]
    assert [hit["path"] for hit in found] == part["path"].take(nearest).to_pylist()
    assert [hit["distance"] for hit in found] == pytest.approx(np.sort(x @ x[0])[:-6:-1], abs=1e-5)
    client.close()


def test_make_alone_lists_what_there_is():
    command = ["make", "--no-print-directory"]  # else make within `make test` says where it is
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert names == ["make help", "make demo", "make test", "make test-gpu", "make install"]


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:py|md)|LICENSE)`", text)
    assert len(named) > 10
    folders = ("", "dataset/")  # the map for maintainers names a folder once for several files
    assert all(any((ROOT / folder / name).exists() for folder in folders) for name in named)
