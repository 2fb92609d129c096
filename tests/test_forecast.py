"""How long a run will take, as train.py says it after a few steps."""

import re
import shlex
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import train
from net.backbones import BACKBONES, Backbone
from runs import forecast
from runs.forecast import Forecast
from runs.results import Epoch
from tests import kill, toy
from tests.conftest import TINY, make_cub, metrics, run_folder
from utils import Interrupted, set_quiet


@pytest.fixture
def clock(here, monkeypatch):
    """By a run's clock a step takes `step` seconds, after warm-up `backward` more, and an
    evaluation 60."""

    def set_clock(step, backward):
        def tick(epoch, what=None):
            full = step + (backward if epoch.number else 0)
            took = {"data": full / 4, "step": full * 3 / 4, "eval": 60}
            if what:
                epoch.seconds[what] = epoch.seconds.get(what, 0) + took[what]

        minutes = iter(range(0, 6000, 60))
        monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: next(minutes)))
        monkeypatch.setattr(Epoch, "tick", tick)
        monkeypatch.setattr(forecast, "seconds_of_backward", lambda *_: backward)

    make_cub(here / "data")
    return set_clock


def said(capsys, flags):
    """The lines about the time, which come before that of the first epoch."""
    capsys.readouterr()
    train.main(shlex.split(TINY + flags))
    before, _, after = capsys.readouterr().out.partition("\nepoch ")
    assert not re.search("^about ", after, re.M)
    return re.findall(r"^(?:about|  faster) .*", before, re.M)


AFTER = "6 s a step after warm-up"


@pytest.mark.parametrize("flags, line", [  # 2 steps an epoch; of all classes 5, or 1
    ("--epochs 3", f"about 3 min for 3 epochs: {AFTER}, 60 s an evaluation"),
    ("--epochs 3 --warm 0", "about 3 min for 3 epochs: 1.5 s a step, 60 s an evaluation"),
    ("--epochs 3 --warm 3", "about 3 min for 3 epochs: 1.5 s a step, 60 s an evaluation"),
    ("--epochs 1 --train-on all", "about 8 s for 1 epoch: 1.5 s a step"),
    ("--epochs 3 --train-on all", f"about 68 s for 3 epochs: {AFTER}"),
    ("--epochs 9 --train-on all --batch-size 40", f"about 50 s for 9 epochs: {AFTER}"),
])
def test_it_counts_warm_up_the_other_epochs_and_evaluations(clock, capsys, flags, line):
    clock(1.5, 4.5)
    assert said(capsys, flags) == [line]


def test_a_run_that_is_continued_counts_what_is_left(clock, capsys, monkeypatch):
    clock(1.5, 4.5)

    def interrupted(*_):
        raise Interrupted(signal.SIGTERM)

    flags = "--batch-size 6 --epochs 3 "  # 3 steps an epoch
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train, "after_step", interrupted)
        train.main(shlex.split(TINY + flags))
    (line,) = said(capsys, flags + "--resume")
    assert line == ("about 40 s for 3 epochs: 6 s a step after warm-up; evaluations are not "
                    "counted")  # fmt: skip
    (line,) = said(capsys, flags + "--resume --epochs 9")
    assert line == "about 8 min for 6 epochs: 6 s a step, 60 s an evaluation"


def test_where_it_is_hours_on_a_cpu_it_names_what_would_be_faster(clock, capsys, monkeypatch):
    clock(300, 600)
    first, second = said(capsys, "--epochs 5")
    assert first == "about 2.2 h for 5 epochs: 900 s a step after warm-up, 60 s an evaluation"
    assert second == ("  faster on a CPU: --model timm/mobilenetv3_large_100, --image-size below "
                      "32, --cache ram (docs/speed.md)")  # fmt: skip
    monkeypatch.setitem(BACKBONES, forecast.SMALL, BACKBONES["toy"])
    monkeypatch.setattr(forecast, "SMALL", "toy")
    _, second = said(capsys, "--epochs 5 --cache ram --remark again")
    assert second == "  faster on a CPU: --image-size below 32 (docs/speed.md)"
    assert len(said(capsys, "--epochs 10 --resume")) == 1  # a run cannot change these


def test_a_quiet_run_neither_says_nor_measures_it(clock, capsys, monkeypatch):
    clock(300, 600)
    monkeypatch.setattr(forecast, "seconds_of_backward", None)
    assert said(capsys, "--epochs 2 --quiet") == []


class Slow(torch.autograd.Function):
    """Takes 0.1 s forward and 0.3 s backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.1)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.3)
        return gradient


def test_the_pace_of_full_steps_is_known_before_there_are_any(here, capsys, monkeypatch):
    def pool(network, x):
        return Slow.apply(toy.pool(network, x))

    monkeypatch.setitem(BACKBONES, "toy", lambda: Backbone(toy.Toy(), pool))
    make_cub(here / "data")
    (line,) = said(capsys, "--epochs 2")
    pace = float(re.search(r": (\S+) s a step after warm-up", line)[1])
    warm, full = ((epoch["seconds_data"] + epoch["seconds_step"]) / 2
                  for epoch in metrics(run_folder(here)))  # fmt: skip
    assert pace == pytest.approx(full, rel=0.3) and pace > 1.5 * warm


def test_saying_it_changes_nothing_of_the_run(here, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "SECONDS", 0)  # after the second of five steps
    make_cub(here / "data")
    flags = "--model toy_with_dropout --bn-freeze 0 --batch-size 4 "
    assert len(said(capsys, flags)) == 1
    assert said(capsys, flags + "--quiet --LOG_DIR quiet") == []
    kill.assert_same_run(run_folder(here), next(here.glob("quiet/*/*")))


def test_on_a_gpu_it_is_said_when_no_step_is_pending_in_the_first_full_epoch(capsys):
    args = SimpleNamespace(epochs=4, warm=1, compile=False, resume=None)
    training = SimpleNamespace(args=args, device=torch.device("cuda"), history=[])
    set_quiet(False)
    looks = Forecast(10, 2.0)
    for number in range(3):
        training.epoch = epoch = Epoch(number, None)
        for epoch.step in range(1, 11):
            epoch.seconds["step"] += 3
            epoch.pending = [None] * (epoch.step != 6)  # the losses are read at times
            looks.look(training, None)
            if capsys.readouterr().out:
                said_at = number, epoch.step
        training.history.append({"seconds_eval": 2.0})
    assert said_at == (1, 6)
