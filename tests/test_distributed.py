"""Several processes, started by torchrun, on the CPU."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distributed
import evaluate
import recipe
import sharded
import train
import utils
from benchmarks.launches import counted
from loading import loader
from net import batch_norm
from net.batch_norm import SharedBatchNorm
from runs import checks, safety
from runs.folder import NoFolder
from runs.results import Epoch
from storage import read_checkpoint
from tests import processes
from tests.conftest import ROOT, TINY, checkpoint_of, fails, make_cub, metrics, run_folder

COMMAND = TINY.replace("--batch-size 8", "--batch-size 7")  # shares of unequal size

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


@pytest.mark.parametrize("count", [2, 4])
def test_steps_and_recalls_of_several_processes_are_those_of_one(here, monkeypatch, count):
    monkeypatch.setattr(processes.recipe, "CLIP_VALUE", None)  # puts it back afterwards
    finished(torchrun(count, "tests.processes out"))
    theirs, ours = torch.load("out"), processes.everything()
    assert all(torch.equal(ours["sharded"][name], x) for name, x in ours["frozen"].items())
    for part in ours.keys() - {"recalls"}:
        assert theirs[part].keys() == ours[part].keys()
        for name, value in ours[part].items():
            if part == "trained" and (name in FOLLOWS or name.endswith(" of 1")):
                continue
            assert torch.allclose(theirs[part][name], value, rtol=0, atol=1e-10), (part, name)
    assert all(torch.equal(theirs["recalls"][name], hit) for name, hit in ours["recalls"].items())


def assert_close(ours, theirs):
    """The losses of two runs agree as float32 does, and recalls exactly."""
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "metric", "agnostic", "specific", "split"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert {k: v for k, v in a.items() if "@" in k} == {k: v for k, v in b.items() if "@" in k}


def test_a_run_of_two_processes_is_continued_by_three_and_by_one_and_evaluated_by_two(here):
    make_cub(here / "data", classes=6)
    train.main(shlex.split(COMMAND + "--LOG_DIR alone --epochs 3"))
    (alone,) = here.glob("alone/*/*")
    parts = "--cache gpu --shard-proxies"
    finished(torchrun(2, f"tests.toy train.py {COMMAND} --workers 1 --epochs 1 {parts}"))
    said = Path("log").read_text()
    assert said.count("epoch 0  loss") == said.count("\nabout ") == 1 and "2 processes" in said
    shared = "--cache ram --workers 1"
    finished(torchrun(3, f"tests.toy train.py {COMMAND} --epochs 2 --resume {shared}"))
    assert Path("log").read_text().count("decoded") == 1
    train.main(shlex.split(COMMAND + "--epochs 3 --resume --shard-proxies False"))
    assert_close(metrics(alone), metrics(run_folder(here)))
    assert json.loads((run_folder(here) / "args.json").read_text())["processes"] == 2
    assert (run_folder(here) / "page.html").exists()
    last = checkpoint_of(run_folder(here))
    best = checkpoint_of(run_folder(here), "best")
    assert read_checkpoint(last)["trained_on"]["files"].shape == (30,)
    for paths, count in ((f"'{last}'", 1), (f"'{last}' '{best}'", 4)):
        flags = f"{paths} --workers 0 --metrics --json"
        finished(torchrun(2, f"tests.toy evaluate.py {flags} two.json"))
        assert Path("log").read_text().count("R@1 : ") == count
        evaluate.main(shlex.split(f"{flags} one.json"))
        assert Path("one.json").read_text() == Path("two.json").read_text()


def workers_of(job):
    """Ids of the processes that torchrun has started last."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children
            if "tests.toy" in Path(f"/proc/{pid}/cmdline").read_text()]  # fmt: skip


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, Path("log").read_text()
        time.sleep(0.02)


def test_a_killed_process_ends_the_job_a_restart_continues_it_and_a_signal_stops_all(here):
    make_cub(here / "data", classes=6)
    train.main(shlex.split(COMMAND + "--epochs 1"))  # which is not what the restart goes on with
    checkpoint_of(run_folder(here)).unlink()
    endless = f"tests.toy train.py {COMMAND} --epochs 10000 --overwrite"
    job = torchrun(2, endless, "--max-restarts=1")
    wait_for(lambda: list(here.glob("logs/*/*/*_last.pth")))
    first = workers_of(job)
    os.kill(first[1], signal.SIGKILL)  # the other one ends by itself
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first))
    before = len(metrics(run_folder(here)))
    wait_for(lambda: len(metrics(run_folder(here))) > before)
    second = workers_of(job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) != 0
    said = Path("log").read_text()
    assert "exitcode: -9" in said and "SIGTERM: continue with: python train.py --resume" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in second)
    done = len(metrics(run_folder(here)))
    train.main(shlex.split(COMMAND + f"--epochs {done + 1} --resume"))
    train.main(shlex.split(COMMAND + f"--LOG_DIR alone --epochs {done + 1}"))
    assert_close(metrics(next(here.glob("alone/*/*"))), metrics(run_folder(here)))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_norm_over_processes_is_batch_norm_and_gives_maps_of_the_same_type(kind):
    ours, theirs = (made(4).to(torch.promote_types(kind, torch.float32))
                    for made in (SharedBatchNorm, torch.nn.BatchNorm2d))  # fmt: skip
    x = (3 + torch.randn(5, 4, 3, 3)).to(kind)
    torch.testing.assert_close(ours(x), theirs(x.to(ours.weight.dtype)).to(kind))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.fixture
def one_of_two(monkeypatch):
    """As the first of two processes, whose all-reduces end at once; the arguments of each."""
    calls = []

    def all_reduce(x, *op, **how):
        calls.append((tuple(x.shape), how))
        return SimpleNamespace(wait=lambda: calls.append("wait"))

    for module in (distributed, batch_norm, safety):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    return calls


def test_batch_norm_over_processes_takes_an_all_reduce_forward_and_one_backward(one_of_two):
    SharedBatchNorm(4)(torch.randn(5, 4, 3, 3).requires_grad_()).sum().backward()
    assert one_of_two == 2 * [((9,), {})]  # two moments of each channel, and how many pixels


def test_gradients_of_any_layout_are_summed_by_three_launches_and_where_they_are(one_of_two):
    shapes = ((4, 3, 2, 2), (4,), (5, 4))
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters[0].data = parameters[0].contiguous(memory_format=torch.channels_last)
    parameters.append(torch.nn.Parameter(torch.ones(1)))  # has no gradient
    sum(p.square().sum() for p in parameters[:3]).backward()
    before = [(p.grad, p.grad.clone(), p.grad.stride()) for p in parameters[:3]]
    launches = counted(lambda: distributed.all_reduce_gradients(parameters)).names
    assert one_of_two == [((4 * 3 * 4 + 4 + 20,), {})]
    assert launches == {"cat": 1, "_foreach_copy_": 1}
    for p, (same, values, stride) in zip(parameters, before):
        assert p.grad is same and torch.equal(p.grad, values) and p.grad.stride() == stride


def test_a_step_of_several_processes_waits_for_what_was_asked_a_step_before(one_of_two):
    training = SimpleNamespace(epoch=Epoch(0, None), args=SimpleNamespace(checkpoint_every=None))

    def after_step(number):
        one_of_two.clear()
        safety.after_step(training, NoFolder(False), SimpleNamespace(signal=number))
        return list(one_of_two)

    asked = ((2,), {"async_op": True})
    assert after_step(None) == [asked]
    assert after_step(signal.SIGTERM) == [asked, "wait"]
    with pytest.raises(utils.Interrupted):
        after_step(signal.SIGTERM)


def test_a_network_with_batch_norm_over_processes_is_on_its_device(monkeypatch):
    args = train.build_parser().parse_args(shlex.split(TINY + "--bn-freeze 0"))
    recipe.settle_loss(args)
    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    model = recipe.build_training(args, 2, torch.device("meta"), None).model
    assert type(model.model.bn) is SharedBatchNorm
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


def test_every_process_says_its_error_with_its_rank(here):
    make_cub(here / "data")
    job = torchrun(2, "tests.toy train.py " + TINY.replace("--batch-size 8", "--batch-size 99"))
    assert job.wait(60) != 0
    said = Path("log").read_text()
    assert any(f"(rank {rank}): error: --batch-size 99: larger than" in said for rank in (0, 1))


def test_an_error_of_a_later_process_alone_is_said_at_once(here):
    """Data that the second machine lacks, say."""
    make_cub(here / "data")
    start = time.monotonic()
    job = torchrun(2, f"tests.processes lacking {TINY}")
    assert job.wait(60) != 0 and time.monotonic() - start < 30
    assert "processes.py (rank 1): error: no cub data set under" in Path("log").read_text()


def test_what_cannot_be_shared_is_refused_in_one_line(here, capsys, monkeypatch):
    make_cub(here / "data")
    monkeypatch.setattr(checks, "world_size", lambda: 9)
    assert "--batch-size 8: fewer than the 9 processes" in fails(TINY, capsys)
    monkeypatch.setattr(checks, "world_size", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "world_size", lambda: 21)
        assert "20 test images: fewer than the 21 processes" in fails(TINY, capsys)
    line = fails(TINY + "--shard-proxies --loss CosFace", capsys)
    assert "--shard-proxies: --loss CosFace" in line and "--loss Proxy_Anchor" in line
    monkeypatch.setattr(sharded, "world_size", lambda: 3)
    assert "2 classes are fewer than the 3 processes" in fails(TINY + "--shard-proxies", capsys)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(utils.UserError, match="torchrun --nproc-per-node 4 train.py"):
        utils.choose_device(-1)
