"""sweep.py: which runs it makes, and that each is trained once, whatever is killed."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import sweep
import train
from runs import jobs
from runs.folder import RunFolder
from tests import forked, kill_sweep
from tests.conftest import ROOT, fails, make_cub, metrics, snapshot
from tests.kill_sweep import BASE, GRID, finish, sweep_py
from utils import Stop

UNUSED = "--wandb disabled"  # a flag after -- that changes nothing


def commands(capsys, flags, after=UNUSED):
    """[(the flags of train.py that the sweep adds)] of each run, by --dry-run."""
    capsys.readouterr()
    assert sweep.main(shlex.split(f"{flags} --dry-run -- {after}")) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    first = [*jobs.TRAIN, *shlex.split(after)]
    assert all(line[: len(first)] == first for line in lines)
    return [tuple(line[len(first) :]) for line in lines]


def test_every_combination_of_grid_seeds_and_folds_is_a_run(here, capsys):
    found = commands(capsys, "--grid lr=1e-4,1e-3 batch_size=8 --seeds 1-2,5 --folds 2")
    assert found == [
        (f"--lr={lr}", "--batch-size=8", f"--seed={seed}", f"--fold={fold}", "--val-classes=0.5")
        for lr in ("1e-4", "1e-3") for seed in (1, 2, 5) for fold in (0, 1)
    ]  # fmt: skip
    assert commands(capsys, "--folds 3", "--val-classes 0.25") == [
        (f"--fold={fold}",) for fold in range(3)
    ]
    assert list(here.iterdir()) == []  # a dry run writes nothing


def test_combinations_that_train_the_same_are_one_run_without_its_unused_flags(capsys):
    found = commands(capsys, "--grid disent=False,True gam=1e-5,1e-3 IPC=2", "--al 1")
    assert found == [
        ("--disent=False", "--IPC=2"),
        ("--disent=True", "--gam=1e-5", "--IPC=2"),
        ("--disent=True", "--gam=1e-3", "--IPC=2"),
    ]
    assert commands(capsys, "--grid disent=False --sample 9 --range al=0.1:1") == [
        ("--disent=False",)
    ]


def test_draws_lie_in_their_ranges_and_depend_on_sample_seed_and_number_alone(capsys):
    ranges = "--grid disent=True --range al=0.1:10:log be=0:2 batch-size=8:64:log"
    found = commands(capsys, f"{ranges} --sample 40")
    assert len(set(found)) == 40
    assert commands(capsys, f"{ranges} --sample 20") == found[:20]
    assert commands(capsys, f"{ranges} --sample 20 --sample-seed 1") != found[:20]
    fewer = commands(capsys, "--grid disent=True --sample 40 --range be=0:2")
    assert [draw[1] for draw in fewer] == list(dict.fromkeys(draw[2] for draw in found))
    values = [[text.split("=")[1] for text in draw[1:]] for draw in found]
    al, be, size = ([float(text) for text in column] for column in zip(*values))
    assert 0.1 <= min(al) < 0.2 and 5 < max(al) <= 10 and 10 < sum(x < 1 for x in al) < 30
    assert 0 <= min(be) < 0.2 and 1.8 < max(be) <= 2
    assert 8 <= min(size) and max(size) <= 64 and all(x.is_integer() for x in size)
    assert all(text == f"{float(text):.3g}" for text, _, _ in values)


def test_shards_together_have_every_run_once(capsys):
    flags = "--grid disent=False,True gam=1e-5,1e-3 --seeds 1-3"
    shards = [commands(capsys, f"{flags} --shard {i}/4") for i in (1, 2, 3, 4)]
    assert sorted(sum(shards, [])) == sorted(commands(capsys, flags)) and len(shards[3]) == 2


BAD = [
    # flags                                   the line has
    ("--grid gamm=1",                         "no flag --gamm; did you mean --gam?"),
    ("--grid gam=1,,2",                       "--grid gam=1,,2: a value is empty"),
    ("--grid gam",                            "--grid gam: a value is empty"),
    ("--grid gam=x",                          "--gam: invalid number"),
    ("--grid gam=1 gam=2",                    "--grid gam=2: --gam is given twice"),
    ("--grid epochs=1,2",                     "--epochs does not make another run"),
    ("--grid remark=a,b",                     "--remark does not make another run"),
    ("--grid gam=1 -- --gam 2",               "--gam: given in --grid and after --"),
    ("--grid al=1 --range al=1:2 --sample 2", "--al: given in --grid and in --range"),
    ("--seeds 1-3 -- --seed 2",               "--seed: given after -- and by --seeds"),
    ("--seeds 3-1",                           "--seeds: invalid seeds"),
    ("--folds 4 --grid val-classes=0.5",      "--val-classes: given in --grid and by --folds"),
    ("--folds 5 -- --val-classes 0.25",       "--folds 5: --val-classes 0.25 makes 4"),
    ("--range al=1:2",                        "--sample N and --range: each needs the other"),
    ("--sample 3",                            "--sample N and --range: each needs the other"),
    ("--sample 3 --range al=2:1",             "--range al=2:1: LOW has to be below HIGH"),
    ("--sample 3 --range al=1:inf",           "--range al=1:inf: LOW has to be below HIGH"),
    ("--sample 3 --range al=0:1:log",         "--range al=0:1:log: with :log both ends"),
    ("--sample 3 --range al=1",               "--range al=1: LOW:HIGH or LOW:HIGH:log"),
    ("--sample 3 --range al=1:2:lin",         "--range al=1:2:lin: LOW:HIGH or LOW:HIGH:log"),
    ("--sample 3 --range loss=a:b",           "--range loss=a:b: LOW:HIGH or LOW:HIGH:log"),
    ("--sample 3 --range lr=-2:-1",           "--lr: invalid number"),
    ("--sample 3 --range al=-0.4:0.1",        "--al: invalid number"),
    ("--shard 3/2",                           "--shard: invalid shard"),
    ("-- --resume",                           "--resume: a sweep continues what is not finished"),
    ("-- --gpu-id 1",                         "--gpu-id 1: each run gets a GPU of its own"),
    ("--grid weights=a/x.pth,b/x.pth",        "its run folder is that of --weights=a/x.pth"),
    (f"-- --remark {'x' * 250}",              "File name too long"),
]  # fmt: skip


@pytest.mark.parametrize("flags, line", BAD)
def test_a_bad_flag_of_a_sweep_ends_in_one_line_before_anything_starts(here, capsys, flags, line):
    assert line in fails(flags, capsys, sweep.main)
    assert not [path for path in here.rglob("*") if path.is_file()]


def test_each_run_gets_a_visible_gpu_or_a_share_of_the_threads(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [each["OMP_NUM_THREADS"] for each in jobs.environments(3)] == ["2"] * 3
    assert [each["OMP_NUM_THREADS"] for each in jobs.environments(None)] == ["8"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in jobs.environments(None)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in jobs.environments(3)] == ["5", "7", "5"]


def test_a_folder_that_holds_a_run_of_other_flags_is_refused(here, capsys):
    flags = f"--weights b/x.pth {UNUSED}"
    (one,) = sweep.runs_of([{}], train.build_parser(), shlex.split(flags))
    one.folder.mkdir(parents=True)
    (one.folder / "args.json").write_text('{"flags": {"weights": "a/x.pth", "al": 3.0}}')
    line = fails(f"-- {flags}", capsys, sweep.main)
    assert "holds a run of --weights b/x.pth, there a/x.pth; give this sweep a --LOG_DIR" in line


def test_a_sweep_ends_with_the_table_and_a_second_call_only_prints_it(
    here, capfd, monkeypatch
):
    monkeypatch.setattr(jobs, "TRAIN", [sys.executable, "-m", "tests.toy", "train.py"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make_cub(here / "data")
    argv = shlex.split(f"--grid disent=False gam=1e-5,1e-3 -- {BASE} --epochs 1")
    assert sweep.main(argv) == 0
    first, *table = capfd.readouterr().out.splitlines()
    assert first == "2 combinations, 1 run: 1 to run, 1 at a time"
    assert table[0].startswith("1/1 logs/logs_cub/toy_") and ": finished in " in table[0]
    before = snapshot(here)
    assert sweep.main(argv) == 0
    out = capfd.readouterr().out.splitlines()
    assert out == table[1:] and "cub: trained on 20 images of 2 classes" in "".join(out)
    assert snapshot(here) == before


def runs_in(folder):
    return sorted(path.parent for path in Path(folder).glob("logs*/*/*/args.json"))


def test_a_failed_run_is_named_stops_no_other_and_is_tried_again_by_the_next_call(here):
    make_cub(here / "data")
    flags = f"--grid batch-size=400,8 -- {BASE.replace('--batch-size 8', '')} --epochs 1"

    def call():
        process = forked.start(sweep_py, flags)
        process.join()
        assert process.exitcode == 1, (here / "err").read_text()
        return (here / "out").read_text().splitlines()

    head, first, second, last = call()
    (log,) = here.glob("logs/*/*batch400*/sweep.log")
    how = f"{log.parent.relative_to(here)}: failed with status 2: train.py: error: --batch-size 400"
    assert first.startswith(f"1/2 {how}") and last.startswith(f"failed: {how}")
    (done,) = runs_in(here)
    before = snapshot(done)
    assert "batch8_" in second and "1 to run" in call()[0]
    assert snapshot(done) == before and log.read_text().count("train.py: error") == 2


def test_a_run_that_another_process_began_in_the_meantime_is_resumed(here, monkeypatch):
    run, commands = jobs.Run(here, ["--lr=1"], argparse.Namespace(epochs=1)), []

    class Late:
        """As train.py that finds the run of a process that dies then."""

        def __init__(self, command, **_):
            commands.append(command[len(jobs.TRAIN) :])
            self.returncode = 0 if "--resume" in command else 2
            (here / "args.json").write_text("{}")

        def poll(self):
            return self.returncode

    monkeypatch.setattr(jobs, "Popen", Late)
    with Stop() as stop:
        (end,) = filter(None, jobs.work([run], [{}], stop))
    assert commands == [["--lr=1"], ["--lr=1", "--resume"]] and end[2] is False


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.is_alive(), Path("err").read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_every_run_and_the_same_command_continues_them(here, capsys, number, status):
    make_cub(here / "data")
    flags = f"--jobs 2 --seeds 1-3 -- {BASE} --epochs "
    process = forked.start(sweep_py, flags + "1000000")
    wait_for(lambda: len([*here.glob("logs/*/*/*_best.pth")]) == 2, process)
    # a terminal signals every process, a cluster perhaps the sweep alone
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    said = (here / "err").read_text().splitlines()[-1]
    assert said == f"sweep.py: {number.name}: 0 of 3 runs are finished; the same command goes on"
    begun = runs_in(here)
    assert len(begun) == 2
    for folder in begun:
        assert f"train.py: {number.name}: continue with" in (folder / "sweep.log").read_text()
    epochs = max(len(metrics(folder)) for folder in begun) + 2
    left = commands(capsys, "--seeds 1-3", f"{BASE} --epochs {epochs}")
    assert left == [("--seed=1", "--resume"), ("--seed=2", "--resume"), ("--seed=3",)]
    finish(flags + str(epochs))
    assert [len(metrics(folder)) for folder in runs_in(here)] == [epochs] * 3
    assert [len(json.loads((folder / "args.json").read_text())["resumed"])
            for folder in runs_in(here)] == [1, 1, 0]  # fmt: skip
    assert commands(capsys, "--seeds 1-3", f"{BASE} --epochs {epochs}") == []


def test_two_sweeps_at_once_train_every_run_once(here):
    make_cub(here / "data")
    flags = GRID.replace("--jobs 2", "--seeds 1-2") + f" --data-root {here / 'data'} --epochs 9 "
    both = []
    for name in ("a", "b"):
        (here / name).mkdir()
        os.chdir(here / name)
        both.append(forked.start(sweep_py, flags + f"--LOG_DIR {here / 'logs'}"))
    for name, process in zip("ab", both):
        process.join()
        assert process.exitcode == 0, (here / name / "err").read_text()
    assert len(runs_in(here)) == 6
    for folder in runs_in(here):
        assert json.loads((folder / "args.json").read_text())["resumed"] == []
        assert [record["epoch"] for record in metrics(folder)] == list(range(9))
        assert (folder / "sweep.log").read_text().count("epoch 0  loss") == 1


def hold(folder):
    files = RunFolder(folder, "")
    files.lock()
    time.sleep(600)


def test_a_run_in_use_is_waited_for_and_run_after_the_other_process_died(here):
    make_cub(here / "data")
    (here / "there").mkdir()
    flags = f"{BASE} --epochs 1"
    (run,) = sweep.runs_of([{}], train.build_parser(), shlex.split(flags))
    folder = here / run.folder
    os.chdir(here / "there")
    other = forked.start(hold, folder)
    try:
        wait_for(lambda: (folder / ".lock").exists(), other)
        os.chdir(here)
        process = forked.start(sweep_py, f"-- {flags}")
        said = here / "out"
        wait_for(lambda: said.exists() and "waiting for 1 run" in said.read_text(), process)
        assert not (folder / "sweep.log").exists()
    finally:
        other.kill()
        other.join()
    process.join()
    assert process.exitcode == 0 and len(metrics(folder)) == 1


def test_killed_sweeps_end_like_an_uninterrupted_one_after_one_more_call(here):
    """The short version of `python -m tests.kill_sweep`."""
    tally = kill_sweep.kill_at_random(here, kills=3, seed=1)
    assert tally["killed alone"] and tally["killed with their runs"]
