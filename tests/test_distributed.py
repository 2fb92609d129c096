"""Several processes, started by torchrun, on the CPU."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import utils
from tests import processes
from tests.conftest import ROOT, TINY, fails, make_cub, metrics, run_folder

by_torchrun = pytest.mark.skipif(
    "DDML_TORCHRUN" not in os.environ, reason="takes minutes; set DDML_TORCHRUN=1"
)
COMMAND = TINY.replace("--batch-size 8", "--batch-size 6")

# a convolution's bias (parameter 1) before trained BatchNorm has no gradient but rounding
FOLLOWS = ("model.conv.bias", "model.bn.running_mean")


def torchrun(count, command, *flags):
    """A job of `count` processes; its output goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={count}", *flags, "-m", *shlex.split(command)]  # fmt: skip
    with open("log", "w") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finished(job):
    assert job.wait(120) == 0, Path("log").read_text()


@by_torchrun
@pytest.mark.parametrize("count", [2, 4])
def test_steps_and_recalls_of_several_processes_are_those_of_one(here, monkeypatch, count):
    monkeypatch.setattr(processes.recipe, "CLIP_VALUE", None)  # puts it back afterwards
    finished(torchrun(count, "tests.processes out"))
    theirs, ours = torch.load("out"), processes.everything()
    for part in ("frozen", "trained"):
        assert theirs[part].keys() == ours[part].keys()
        for name, value in ours[part].items():
            if part == "trained" and (name in FOLLOWS or name.endswith(" of 1")):
                continue
            assert torch.allclose(theirs[part][name], value, rtol=0, atol=1e-10), (part, name)
    assert all(torch.equal(theirs["recalls"][name], hit) for name, hit in ours["recalls"].items())


def close(ours, theirs):
    """Whether the losses of two runs agree as float32 does, and recalls exactly."""
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "metric", "agnostic", "specific", "split"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert {k: v for k, v in a.items() if "@" in k} == {k: v for k, v in b.items() if "@" in k}


@by_torchrun
def test_a_run_of_two_processes_is_continued_by_three_and_by_one(here, capsys):
    make_cub(here / "data", classes=6)
    train.main(shlex.split(COMMAND + "--LOG_DIR alone --epochs 3"))
    (alone,) = here.glob("alone/*/*")
    finished(torchrun(2, f"tests.toy {COMMAND} --workers 1 --epochs 1"))
    said = Path("log").read_text()
    assert said.count("epoch 0  loss") == 1 and "2 processes" in said
    finished(torchrun(3, f"tests.toy {COMMAND} --epochs 2 --resume"))
    train.main(shlex.split(COMMAND + "--epochs 3 --resume"))
    close(metrics(alone), metrics(run_folder(here)))
    assert json.loads((run_folder(here) / "args.json").read_text())["processes"] == 2
    assert (run_folder(here) / "page.html").exists()


@by_torchrun
def test_a_killed_process_ends_the_job_and_a_restart_continues_it(here):
    make_cub(here / "data", classes=6)
    train.main(shlex.split(COMMAND + "--LOG_DIR alone --epochs 30"))
    (alone,) = here.glob("alone/*/*")
    job = torchrun(2, f"tests.toy {COMMAND} --epochs 30", "--max-restarts=1")
    end = time.monotonic() + 60
    while not list(here.glob("logs/*/*/*_last.pth")) and time.monotonic() < end:
        time.sleep(0.02)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    workers = [int(pid) for pid in children
               if "tests.toy" in Path(f"/proc/{pid}/cmdline").read_text()]  # fmt: skip
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    finished(job)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    close(metrics(alone), metrics(run_folder(here)))
    assert json.loads((run_folder(here) / "args.json").read_text())["resumed"]


@by_torchrun
def test_a_signal_stops_all_processes_at_one_step_and_saves_it(here):
    make_cub(here / "data", classes=6)
    job = torchrun(2, f"tests.toy {COMMAND} --epochs 10000")
    end = time.monotonic() + 60
    while not list(here.glob("logs/*/*/*_last.pth")) and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) != 0
    assert "SIGTERM: continue with: python train.py --resume" in Path("log").read_text()
    done = len(metrics(run_folder(here)))
    train.main(shlex.split(COMMAND + f"--epochs {done + 1} --resume"))
    assert len(metrics(run_folder(here))) == done + 1


def test_what_cannot_be_shared_is_refused_in_one_line(here, capsys, monkeypatch):
    make_cub(here / "data")
    monkeypatch.setattr(train, "world", lambda: 3)
    line = fails(TINY, capsys)
    assert "--batch-size 8: not a multiple of the 3 processes" in line
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(utils.UserError, match="torchrun --nproc-per-node 4 train.py"):
        utils.choose_device(-1)
