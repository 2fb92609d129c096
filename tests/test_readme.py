"""What README and docs/ show is run."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

import compare
import dataset
import evaluate
import search
import sweep
import train
from dataset import demo
from loading.loader import Loading, batches, test_loader
from losses import DDML
from tests.conftest import (
    ROOT,
    TINY,
    checkpoint_of,
    make_cars,
    make_cub,
    make_folder,
    make_sop,
    run_folder,
)

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NO_WORKERS = "--workers 0"
TINY_TRAINING = (
    "--model toy --weights none --image-size 32 --batch-size 8 --embedding-size 8 --epochs 1 "
    "--workers 0 --wandb disabled"
)
SCRIPTS = (train, evaluate, search, compare, sweep)


def python_blocks():
    text = "".join(page.read_text() for page in PAGES)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_python_block_embeds_an_image_of_the_demo(here, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 3)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    flags = re.search(r"^DEMO = (.*)$", makefile, re.M)[1]
    train.main(shlex.split(flags + " --epochs 1 --workers 0"))
    (block,) = (block for block in python_blocks() if "load_model" in block)
    names = {}
    exec(block, names)
    assert names["embedding"].shape == (1, 64)
    assert abs(names["embedding"].norm().item() - 1) < 1e-5

    model = names["load_model"](checkpoint_of(run_folder(here)))
    images = dataset.load("demo", "data", "train")
    cpu = torch.device("cpu")
    loader = test_loader(images, 8, Loading(64, 0, cpu))
    with torch.inference_mode():
        pixels, _, _ = next(batches(loader, cpu))
        first = model.embed(model.prepare(pixels))[:1]
    torch.testing.assert_close(names["embedding"], first, rtol=1e-4, atol=1e-5)


def test_the_example_runs_and_normalises_each_head_as_a_whole(capsys, monkeypatch):
    lengths, forward = [], DDML.forward

    def recording(self, *heads_and_labels):
        lengths.extend(head.norm(dim=1) for head in heads_and_labels[:2])
        return forward(self, *heads_and_labels)

    monkeypatch.setattr(DDML, "forward", recording)
    runpy.run_module("examples.own_loop", run_name="__main__")
    assert capsys.readouterr().out.count("agnostic") == 3
    torch.testing.assert_close(torch.stack(lengths), torch.ones(6, 8))


def commands_of(page):
    """[[word]] of the fenced blocks, without pip and what says in its comment what it needs."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match("python|torchrun|make|pip|wandb", line)]
    return [shlex.split(line, comments=True)
            for line in commands if not re.search("^pip |# needs ", line)]


def run_as_shown(program, *flags):
    """Run it in this process with a tiny network, without training what sweep.py would."""
    if program == "make":
        assert re.search(f"^{flags[0]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    assert program == "python"
    name, *flags = flags if flags[0] != "-m" else flags[1:]
    if name.startswith("benchmarks."):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists()
        return
    extra = {"train.py": TINY_TRAINING, "evaluate.py": NO_WORKERS, "search.py": NO_WORKERS}
    if name == "sweep.py":
        flags.insert(0, "--dry-run")
    flags = [*flags, *extra.get(name, "").split()]
    assert not import_module(name.removesuffix(".py")).main(flags)


def test_every_command_shown_runs_as_it_stands_or_says_what_it_needs(here, capsys):
    make_folder(here / "photos", per_class=40)
    shutil.copy(next((here / "photos").glob("*/*.jpg")), "A.jpg")
    make_cub(here / "data", classes=16)
    make_cars(here / "data")
    make_sop(here / "data")
    for page in PAGES:
        for command in commands_of(page):
            print(*command)
            run_as_shown(*command)
    said = capsys.readouterr().out
    assert said.count("python train.py") > 4 and "\nthreshold " in said
    assert (here / "found.html").stat().st_size > 10_000
    assert (here / "network.pt2").exists()
    made = {file.name + "/" * file.is_dir() for file in here.iterdir()} - {"A.jpg"}
    command = ["git", "check-ignore", *sorted(made)]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert made == set(ignored.split())


def test_the_export_is_loaded_twice_and_searched_in_a_vector_database(here):
    for package in ("pyarrow", "pymilvus", "milvus_lite"):
        pytest.importorskip(package)
    make_folder(here / "photos", per_class=9)
    flags = TINY.replace("--embedding-size 8", "") + "--dataset folder --data-root photos"
    train.main(shlex.split(flags + " --epochs 1"))
    search.main(shlex.split(f"{run_folder(here)} --workers 0 --gallery photos --part-size 20 "
                            "--export OUT.parquet"))  # fmt: skip
    parts = sorted(map(str, here.glob("OUT.part-*.parquet")))
    script = [sys.executable, ROOT / "examples/milvus.py"]
    assert len(parts) > 1
    for _ in range(2):
        subprocess.run([*script, *parts], check=True)
    command = [*script, "--query", parts[1], "--top", "4"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    from pyarrow.parquet import read_table

    tables = [read_table(part).to_pydict() for part in parts]
    paths = [path for table in tables for path in table["path"]]
    x = np.array([row for table in tables for row in table["embedding"]])
    query = x[len(tables[0]["path"])]
    nearest = np.argsort(-(x @ query))[:4]  # without any twin, which a second load would make
    expected = [f"  {x[i] @ query:.4f}  {paths[i]}" for i in nearest]
    assert said.splitlines()[:5] == [tables[1]["path"][0], *expected]


def test_make_alone_lists_what_there_is():
    command = ["make", "--no-print-directory"]  # else make within `make test` says where it is
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    targets = ("help", "demo", "paper", "test", "test-gpu", "install")
    assert names == [f"make {name}" for name in targets]


def test_every_file_that_the_documentation_names_is_there():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/*.md")]
    text = "".join(page.read_text() for page in pages)
    named = re.findall(r"`([\w/]+\.(?:py|md)|LICENSE)`", text)
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert [name for name in missing if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"],
                         ids=lambda page: page.stem)  # fmt: skip
def test_links_lead_to_a_file_and_to_a_heading(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else [anchor]
        assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_readme_is_read_in_one_sitting_and_links_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 170
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_the_flags_of_every_command_shown_are_known():
    text = "".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    shown = re.findall(r"^(?:python|torchrun .*?\d) (\w+)\.py(.*)$", text, re.M)
    inline = " ".join(text.split("\n"))
    shown += re.findall(r"`(?:python|torchrun .*?\d) (\w+)\.py([^`]*)`", inline)
    assert len(shown) > 15
    known = {script.__name__: script.build_parser()._option_string_actions for script in SCRIPTS}
    for script, flags in shown:
        own, _, of_train = flags.partition(" -- ")
        for part, actions in ((own, known[script]), (of_train, known["train"])):
            used = re.findall(r"(?<!\S)(--[\w-]+)", part)
            assert [flag for flag in used if flag not in actions] == [], f"{script}.py{flags}"
