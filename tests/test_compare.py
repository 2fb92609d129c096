"""compare.py: settings side by side, from the folders that runs leave."""

import csv
import json
import shlex
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
from PIL import Image

import compare
import train
from tests.conftest import TINY, fails, made_once, make_cub, make_folder, metrics


@pytest.fixture(scope="module")
def runs_once(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_runs(folder)
    return folder


@pytest.fixture
def runs(here, runs_once):
    shutil.copytree(runs_once, here, dirs_exist_ok=True)
    return here


def make_runs(here):
    """Three seeds with DDML and three without, one unfinished, one damaged."""
    make_cub(here / "data")
    for seed in (1, 2, 3):
        train.main(shlex.split(TINY + f"--seed {seed} --lr 1e-2"))
        train.main(shlex.split(TINY + f"--seed {seed} --lr 1e-2 --disent False"))
    train.main(shlex.split(TINY + "--epochs 1 --remark _short"))
    (short,) = here.glob("logs/*/*_short")
    (short / "results.json").unlink()  # as --resume does
    text = (short / "args.json").read_text()
    (short / "args.json").write_text(text.replace('"epochs": 1', '"epochs": 5'))
    bad = here / "logs/logs_cub/bad"
    bad.mkdir()
    (bad / "args.json").write_text("{")


def last_r1(runs, pattern):
    return [metrics(folder)[-1]["R@1"] for folder in sorted(runs.glob(f"logs/*/*{pattern}*"))
            if not folder.name.endswith("_short")]  # fmt: skip


def test_seeds_are_gathered_beside_the_papers_row_and_what_is_left_out_is_listed(runs, capsys):
    compare.main(["logs", "--csv", "t.csv", "--markdown", "t.md", "--plot", "t.png"])
    out = capsys.readouterr().out
    with open("t.csv") as file:
        ddml, plain = sorted(csv.DictReader(file), key=lambda row: row["--disent"])[1:][::-1]
    for row, pattern in ((ddml, "al1.0"), (plain, "al0.0")):
        values = last_r1(runs, pattern)
        assert row["last R@1"] == f"{mean(values):.2f} ± {stdev(values):.2f} (3)"
        assert row["epochs"] == "2" and row["last R@1"] in out
    folders = [path for path in runs.glob("logs/*/*al1.0*") if not path.name.endswith("_short")]
    best = [max(record["R@1"] for record in metrics(folder)) for folder in folders]
    assert ddml["best R@1 - paper's"] == f"{mean(best) - 70.0:+.2f}"
    assert plain["best R@1 - paper's"] == ""
    assert "the paper's: Proxy_Anchor, DDML" in out and "70.0" in out
    assert "_short: 1 of 5 epochs" in out and "left out: logs/logs_cub/bad: damaged" in out
    lines = (runs / "t.md").read_text().splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {lines[0].count("|")}
    assert Image.open("t.png").size[0] > 1000


def test_the_difference_to_a_baseline_is_paired_by_seed(runs, capsys):
    compare.main(["logs", "--baseline", "disent=False", "--csv", "t.csv"])
    with open("t.csv") as file:
        rows = {row["--disent"]: row["last R@1 - baseline's"] for row in csv.DictReader(file)}
    by_seed = {}
    for folder in runs.glob("logs/*/*"):
        if (folder / "metrics.jsonl").exists() and not folder.name.endswith("_short"):
            flags = json.loads((folder / "args.json").read_text())["flags"]
            by_seed[flags["seed"], flags["disent"]] = metrics(folder)[-1]["R@1"]
    differences = [by_seed[seed, True] - by_seed[seed, False] for seed in (1, 2, 3)]
    half = 4.302652729911275 * stdev(differences) / 3**0.5  # t of 2 degrees of freedom
    assert rows["True"] == f"{mean(differences):+.2f} ± {half:.2f} (3)"
    assert rows["False"] == "baseline"


def test_runs_are_compared_by_the_least_of_their_ks(runs, capsys):
    for seed in (1, 2):
        for method in ("", "--disent False"):
            flags = f"--epochs 1 --seed {seed} --lr 1e-2 --ks 4 2 {method}"
            train.main(shlex.split(f"{TINY} {flags} --LOG_DIR ks --remark _ks"))
    folders = {method: sorted(runs.glob(f"ks/*/*{method}*_ks")) for method in ("al1.0", "al0.0")}
    ddml, plain = ([metrics(folder)[-1]["R@2"] for folder in each] for each in folders.values())
    difference = f"{mean(ours - theirs for ours, theirs in zip(ddml, plain)):+.2f} ± "
    for logs in ("ks", "logs ks"):  # alone, and beside runs with R@1
        compare.main([*logs.split(), "--baseline", "disent=False", "--csv", "t.csv",
                      "--plot", "t.png"])  # fmt: skip
        with open("t.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["last R@2 - baseline's"]]
        ours, theirs = sorted(rows, key=lambda row: row["--disent"])[::-1]
        assert ours["last R@2 - baseline's"].startswith(difference)
        assert theirs["last R@2 - baseline's"] == "baseline"
        assert ours["best R@2 - paper's"] == f"{mean(ddml) - 79.6:+.2f}"
        assert not ours.get("last R@1") and ours["last R@4"].endswith("(2)")
        assert Image.open("t.png").size[0] > 1000
    compare.main(["logs", "ks", "--baseline", "ks=None", "--csv", "t.csv"])
    with open("t.csv") as file:
        assert {row["--ks"] for row in csv.DictReader(file)} == {"None", "[4, 2]", ""}


@pytest.mark.parametrize("flags, line", [
    ("nowhere", "nowhere: no such folder"),
    ("", "required: FOLDER"),
    (". --baseline disent", "--baseline disent: no finished run has it"),
    (". --baseline lr=7", "--baseline lr=7: no finished run has it"),
    (". --plot nowhere/t.png", "--plot nowhere/t.png: not a file's path"),
    (". --basline lr=7", "did you mean --baseline?"),
])  # fmt: skip
def test_a_bad_comparison_ends_in_one_line(here, capsys, flags, line):
    assert line in fails(flags, capsys, compare.main)


def test_without_a_finished_run_it_says_so(here, capsys):
    compare.main(["."])
    assert capsys.readouterr().out == "no finished run\n"


def test_other_images_or_epochs_are_another_setting_and_nothing_is_left_out_in_silence(
    here, capsys
):
    for root in ("A", "B"):
        make_folder(here / root)
        train.main(shlex.split(TINY + f"--dataset folder --data-root {root} --lr 1e-3"))
    again = TINY + "--dataset folder --data-root A --lr 1e-3 --epochs"
    train.main(shlex.split(again + " 1 --remark _short"))
    train.main(shlex.split(again + " 2 --remark _twin"))
    (lost,) = here.glob("logs/*/*_short")
    (lost / "args.json").unlink()
    compare.main(["logs", "--baseline", "lr=1e-3", "--csv", "t.csv"])
    out = capsys.readouterr().out
    with open("t.csv") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["--data-root"]).name: row["last R@1"][-3:] for row in rows} == {
        "A": "(1)", "B": "(1)"
    }  # fmt: skip
    assert "_short: damaged (" in out and "_twin: of the setting and seed of a run before it" in out
    assert {row["last R@1 - baseline's"] for row in rows} == {"baseline"}
    (twin,) = here.glob("logs/*/*_twin/args.json")
    (lost / "args.json").write_text(twin.read_text().replace('"epochs": 2', '"epochs": 1'))
    compare.main(["logs", "--csv", "t.csv"])
    with open("t.csv") as file:
        assert sorted(row["epochs"] for row in csv.DictReader(file)) == ["1", "2", "2"]
