"""make paper: the published commands, and the measured rows of the documentation."""

import re
import shlex
import shutil
import sys
from statistics import mean

import pytest

import dataset
import sweep
import train
from benchmarks import paper
from runs import jobs
from runs.gather import by_seed, gather
from tests.conftest import ROOT, fails, make_cars, make_cub, make_sop, write_image
from utils import UserError

PAGE = ROOT / "docs/reproduction.md"
TINY = ("--model toy --weights none --image-size 32 --batch-size 8 --embedding-size 8 --epochs 1 "
        "--workers 0 --wandb disabled --quiet")  # fmt: skip


def copy_pages(here):
    (here / "docs").mkdir()
    shutil.copy(PAGE, here / "docs")
    shutil.copy(ROOT / "README.md", here)


@pytest.fixture
def copy(here, monkeypatch):
    """A copy of the two pages and of the data sets; sweeps train in this process."""
    copy_pages(here)
    for make in (make_cub, make_cars, make_sop):
        make(here / "data")

    def trained(runs, places, head):
        for each in runs:
            train.main(each.flags)
        return []

    monkeypatch.setattr(sweep, "complete", trained)
    return here


def rows_in(text, name):
    """The rows of the page's table of a data set, below its header, and the line after it."""
    table, after = re.search(rf"^\| {name} \|.*\n\|[-|]*\n((?:\|.*\n)+)\n(.*)", text, re.M).groups()
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()], after


def test_the_measured_rows_are_written_from_the_runs_and_again_are_the_same(copy, capsys):
    command = shlex.split(f"--seeds 2 --docs . -- {TINY}")
    assert paper.main(command) == 0
    text, readme = (copy / "docs/reproduction.md").read_text(), (copy / "README.md").read_text()
    for name, folder in (("CUB", "cub"), ("Cars", "cars"), ("SOP", "SOP")):
        rows, after = rows_in(text, name)
        settings, _ = gather([f"logs/logs_{folder}"])
        ddml = next(setting for setting in settings if setting.flags["disent"])
        last = mean(by_seed(ddml, "last", "R@1").values())
        assert rows[0][0] == "the paper's" and len(rows) == 6
        assert rows[2][0] == "measured here: DDML, last epoch"
        assert rows[2][1].startswith(f"{last:.1f} ± ")
        summary = re.search(rf"^\| {name} \|(.*)\|$", readme, re.M)[1].split(" | ")
        best = mean(by_seed(ddml, "best", "R@1").values())
        assert summary[1].startswith(f"{best:.1f} ± ") and len(summary) == 4
        assert float(summary[0]) == dataset.module_of(folder).PAPER["R@1"]
        assert re.match(r"Measured here: seeds 1, 2; commit \w{7}.*cpu .*Not the published", after)
    untouched = [line for line in text.splitlines() if "easured here" not in line]
    before = PAGE.read_text().splitlines()
    assert [line for line in untouched if line] == [
        line for line in before if line and "easured here" not in line
    ]
    for folder in copy.glob("logs/*/*"):
        shutil.rmtree(folder)
    assert paper.main(command) == 0
    assert (copy / "docs/reproduction.md").read_text() == text
    assert (copy / "README.md").read_text() == readme


def test_what_is_missing_is_named_with_how_to_get_it_and_the_rest_is_to_be_run(copy, capsys):
    shutil.rmtree(copy / "data/CUB_200_2011")
    assert paper.main(shlex.split(f"--dry-run -- {TINY}")) == 0
    out = capsys.readouterr().out
    assert "  not now: no cub data set under" in out
    assert "get it: python -m dataset.download cub --data-root ./data" in out
    assert all(f"{name}: 6 runs: python sweep.py --grid" in out for name in paper.PUBLISHED)
    shutil.rmtree(copy / "data")
    (copy / "data").mkdir()
    assert "nothing to run: get what is missing" in fails(f"-- {TINY}", capsys, paper.main)
    make_cub(copy / "data")
    assert "nothing to run" in fails("--dry-run", capsys, paper.main)
    capsys.readouterr()
    with pytest.raises(UserError):
        paper.main(["--dry-run"])
    assert "with the file: python -m benchmarks.paper -- --weights PATH" in capsys.readouterr().out


def test_real_runs_become_rows_and_runs_of_other_images_do_not(here, monkeypatch, capsys):
    copy_pages(here)
    make_cub(here / "data")
    monkeypatch.setattr(jobs, "TRAIN", [sys.executable, "-m", "tests.toy", "train.py"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = shlex.split(f"--seeds 1 --docs . -- {TINY}")
    assert paper.main(command) == 0
    rows, _ = rows_in((here / "docs/reproduction.md").read_text(), "CUB")
    assert len(rows) == 5 and rows[4][0] == "measured here: Proxy-Anchor alone, last epoch"
    write_image(here / "data/CUB_200_2011/images/101.Bird_2/Bird_0000.jpg", seed=7)
    assert "holds a run of other images than" in fails(shlex.join(command), capsys, paper.main)


def test_its_commands_are_those_of_the_documentation():
    text = "".join(page.read_text() for page in (ROOT / "README.md", PAGE)).replace("\\\n", " ")
    parser = train.build_parser()
    published = re.findall(r"^python train.py (.*--dataset (?:cub|car|SOP) .*--disent True.*)$",
                           text, re.M)  # fmt: skip
    ours = [paper.training_flags(name, "./data", ["--disent=True"]) for name in paper.PUBLISHED]
    assert [parser.parse_args(flags) for flags in ours] == [
        parser.parse_args(shlex.split(command)) for command in published
    ]
