"""Nothing is lost: torn saves, full disks, signals, kills."""

import copy
import errno
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

import retrieval.evaluate
import train
from runs import checkpoint as checkpoints
from runs import folder as run_folders
from runs import safety
from runs.folder import RunFolder
from storage import COMMENT_LENGTH, read_checkpoint, write_checkpoint
from tests import forked, kill
from tests.conftest import ROOT, TINY, checkpoint_of, fails, make_cub, metrics, run_folder
from utils import Interrupted, UserError


def small_checkpoint(epoch, r1):
    history = [{"epoch": i, "R@1": 50.0} for i in range(epoch)] + [{"epoch": epoch, "R@1": r1}]
    state = {"weight": torch.full((1000,), float(epoch))}
    parts = {"args": {}, "images": "", "epoch": epoch, "history": history, "partial": None,
             "start": None, "trained_on": None}  # fmt: skip
    return {"model_state_dict": state, **parts}


def save(folder, checkpoint):
    folder.save(checkpoint)
    folder.wait()


def best_epoch(folder):
    return read_checkpoint(folder.best)["history"][-1]["epoch"]


@pytest.fixture
def saved(tmp_path):
    """A folder with two finished epochs, and the state of a third that would be the best."""
    folder = RunFolder(tmp_path, "cub_net")
    save(folder, small_checkpoint(0, 60.0))
    save(folder, small_checkpoint(1, 50.0))
    return folder, small_checkpoint(2, 70.0)


CALLS = ["open", "fsync", "replace", "close"]


def disk_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nothing_is_lost(folder):
    assert folder.newest_checkpoint()[1]["epoch"] in (1, 2)
    assert best_epoch(folder) in (0, 2)
    assert [record["epoch"] for record in metrics(folder.folder)] in ([0, 1], [0, 1, 2])


@pytest.mark.parametrize("call, least", [("open", 8), ("fsync", 8), ("replace", 5), ("close", 8)])
def test_an_error_at_any_call_of_a_save_is_one_line_and_loses_nothing(
    saved, monkeypatch, call, least
):
    """best, results, metrics and last are written and synced, and so are their names."""
    folder, checkpoint = saved
    for n in range(1000):
        with monkeypatch.context() as patch:
            kill.at_call(patch.setattr, [call], n, disk_full)
            try:
                save(folder, checkpoint)
                break
            except UserError as error:
                assert "bytes needed" in str(error) and str(folder.folder) in str(error)
        nothing_is_lost(folder)
        assert not list(folder.folder.glob(".*.tmp"))
    assert n >= least and folder.newest_checkpoint()[1]["epoch"] == 2


def test_a_disk_that_is_full_within_a_file_is_one_line_and_loses_nothing(saved):
    folder, checkpoint = saved
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 50, 500, 4000, 5000):  # bytes that a file may have
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            with pytest.raises(UserError, match="bytes needed"):
                save(folder, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        nothing_is_lost(folder)
        assert not list(folder.folder.glob(".*.tmp"))


def test_a_kill_at_any_call_of_a_save_leaves_a_loadable_checkpoint_and_whole_metrics(saved):
    folder, checkpoint = saved
    for n in range(1000):
        child = os.fork()
        if not child:
            kill.at_call(setattr, CALLS, n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(folder, checkpoint)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        nothing_is_lost(folder)
        if status == 0:
            break
    assert n > 15 and folder.newest_checkpoint()[1]["epoch"] == 2


@pytest.mark.parametrize("at", [0, 40, 0.3, 0.5, 0.9, -200, -3])
def test_a_flipped_bit_anywhere_is_found_and_the_checkpoint_before_is_used(saved, capsys, at):
    folder, _ = saved
    data = bytearray(folder.last.read_bytes())
    data[int(at * len(data)) if isinstance(at, float) else at] ^= 1
    folder.last.write_bytes(data)
    path, checkpoint = folder.newest_checkpoint()
    assert path == folder.previous and checkpoint["epoch"] == 0
    assert f"{folder.last}: not a checkpoint that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("n", range(12))
def test_the_good_checkpoint_outlives_a_failed_save_after_a_damaged_one(saved, monkeypatch, n):
    folder, checkpoint = saved
    folder.last.write_bytes(b"damaged")
    path, good = folder.newest_checkpoint()
    assert path == folder.previous

    with monkeypatch.context() as patch:
        kill.at_call(patch.setattr, CALLS, n, disk_full)
        try:
            save(folder, checkpoint | {"partial": {"step": 1}})
        except UserError:
            pass
    assert folder.newest_checkpoint()[1]["epoch"] in (good["epoch"], checkpoint["epoch"])


def test_a_truncated_checkpoint_is_found_at_any_length(saved):
    folder, _ = saved
    data = folder.last.read_bytes()
    for length in range(0, len(data) - COMMENT_LENGTH, 97):  # all but its own SHA-256
        folder.last.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_checkpoint(folder.last)


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path):
    write_checkpoint(tmp_path / "a.pth", {"x": torch.arange(3)})
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["x"], torch.arange(3))


# --- signals and kills, on a real train.py --------------------------------------------------


def test_a_full_disk_under_the_output_is_one_line(here):
    make_cub(here / "data")
    command = [sys.executable, "-m", "tests.toy", "train.py", *shlex.split(TINY)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=full,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2
    assert errors == ["train.py: error: the output: No space left on device"]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.is_alive(), Path("err").read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_a_step_and_the_run_continues_to_the_same_bits(here, number, status):
    make_cub(here / "data", classes=12)
    flags = "--workers 2 --bn-freeze 0 "
    process = forked.start(forked.train_py, TINY + flags + "--epochs 1000000")
    wait_for(lambda: list(here.glob("logs/*/*/*_best.pth")), process)  # workers are all there
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 4  # of the loaders of training and of the test images
    if number == signal.SIGTERM:  # as a cluster does, to every process
        for child in children:
            os.kill(int(child), number)
    os.killpg(process.pid, number)  # as a terminal does
    process.join(60)
    errors = (here / "err").read_text()
    assert process.exitcode == status, errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"train.py: {number.name}: continue with: python train.py --resume logs")
    assert "Traceback" not in errors
    epochs = f" --workers 0 --epochs {len(metrics(run_folder(here))) + 2} "
    train.main(shlex.split(last.split("train.py ")[-1] + epochs))
    train.main(shlex.split(TINY + flags + epochs + "--LOG_DIR whole"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


@pytest.mark.parametrize("where", ["embed", "hits_at_k", "write"])
def test_a_signal_while_an_epoch_is_evaluated_and_saved_loses_nothing_of_it(
    here, monkeypatch, where
):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--LOG_DIR whole"))
    owner = RunFolder if where == "write" else retrieval.evaluate
    original, calls = getattr(owner, where), []

    def interrupted(*args):
        calls.append(where)  # not args: they hold the run's lock
        if len(calls) == 1 + (where != "write"):  # the first evaluation is before the first epoch
            os.kill(os.getpid(), signal.SIGTERM)
        if where == "write":
            time.sleep(0.5)  # in which the run comes to its end
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(Interrupted) as stop:
            train.main(shlex.split(TINY))
    assert "continue with: python train.py --resume" in stop.value.note
    del stop  # and with it the frames that hold the run's lock
    saved = read_checkpoint(checkpoint_of(run_folder(here)))
    assert len(saved["history"]) == 1 or saved["partial"]["step"] == 2
    train.main(shlex.split(TINY + "--resume"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


def test_a_save_is_of_its_step_though_training_goes_on_while_it_is_written(here, monkeypatch):
    make_cub(here / "data")
    taken, stepped, compared = [], threading.Event(), []
    capture, train_step, write = checkpoints.capture, train.train_step, RunFolder.write

    def captured(*args):
        stepped.clear()
        taken.append(copy.deepcopy(capture(*args)))
        return capture(*args)

    def step(*args):
        values = train_step(*args)
        stepped.set()
        return values

    def write_later(folder, checkpoint):
        followed = checkpoint["partial"] == taken[0]["partial"] or not checkpoint["partial"]
        if followed and len(checkpoint["history"]) < 2:
            assert stepped.wait(60)
            compared.append(len(taken))
        write(folder, checkpoint)
        assert kill.same(read_checkpoint(folder.last), taken[-1])

    monkeypatch.setattr(checkpoints, "capture", captured)
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(RunFolder, "write", write_later)
    train.main(shlex.split(TINY + "--checkpoint-every 1"))
    assert compared == [1, 3] and len(taken) == 6  # 2 steps, and after the evaluation


@pytest.mark.parametrize("seconds, steps", [(5, [2, None, None, None]), (0, 3 * [2, None])])
def test_a_kill_costs_the_steps_since_a_save_and_an_evaluation_of_five_seconds_at_most(
    here, monkeypatch, seconds, steps
):
    make_cub(here / "data")
    assert safety.EVALUATION_SECONDS <= 5
    monkeypatch.setattr(safety, "EVALUATION_SECONDS", seconds)
    capture, saved = checkpoints.capture, []

    def captured(training, partial):
        saved.append(partial and partial["step"])
        return capture(training, partial)

    monkeypatch.setattr(checkpoints, "capture", captured)
    train.main(shlex.split(TINY + "--epochs 3"))
    assert saved == steps


def test_a_save_lets_go_of_the_devices_copy_before_it_writes(tmp_path, monkeypatch):
    checkpoint, seen = small_checkpoint(0, 60.0), []
    on_device = weakref.ref(checkpoint["model_state_dict"]["weight"])
    monkeypatch.setattr(run_folders, "on_host", copy.deepcopy)  # as from a GPU: other tensors
    monkeypatch.setattr(run_folders, "write_checkpoint", lambda *_, **__: seen.append(on_device()))
    folder = RunFolder(tmp_path, "cub_net")
    folder.save(checkpoint)
    del checkpoint
    folder.wait()
    assert seen == [None, None]


@pytest.mark.parametrize("n", [0, 2, 3])  # before an evaluation; after one; at the end
def test_a_save_that_fails_in_its_thread_ends_the_run_in_the_one_line(
    here, capsys, monkeypatch, n
):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--LOG_DIR whole --epochs 3"))
    write, saves = RunFolder.write, []

    def failing(folder, checkpoint):
        saves.append(checkpoint)
        with monkeypatch.context() as patch:
            if len(saves) == n + 1:
                patch.setattr(os, "fsync", disk_full)
            write(folder, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", failing)
        line = fails(TINY + "--epochs 3", capsys)
    assert "bytes needed (No space left on device)" in line and len(saves) == n + 1
    train.main(shlex.split(TINY + "--epochs 3 --resume"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


def test_a_save_that_fails_in_its_thread_is_noticed_at_the_next_step(here, monkeypatch):
    make_cub(here / "data")
    steps, train_step = [], train.train_step

    def step(*args):
        steps.append(args)
        time.sleep(0.2 * (len(steps) == 3))  # the first one after a save, the second of ten
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(RunFolder, "write", lambda *args: train_step())
    with pytest.raises(TypeError):  # a bug in there keeps its traceback
        train.main(shlex.split(TINY + "--batch-size 2 --checkpoint-every 2"))
    assert len(steps) == 3


def signalled_twice(pause):
    train_step = train.train_step

    def twice(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    train.train_step = twice
    forked.train_py(TINY)


@pytest.mark.parametrize("pause, saves", [(0.6, False), (0, True)])
def test_a_second_signal_ends_at_once_but_one_passed_on_is_none(here, pause, saves):
    make_cub(here / "data")
    process = forked.start(signalled_twice, pause)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert ("SIGTERM: continue with" in (here / "err").read_text()) == saves


def test_a_run_continued_by_other_means_says_that_its_bits_may_differ(here, run, capsys):
    path = run_folder(here) / "args.json"
    described = json.loads(path.read_text())
    assert described["uncommitted_changes"] in (True, False)
    others = {"threads": 99, "commit": "abc", "uncommitted_changes": "perhaps"}
    path.write_text(json.dumps(described | others))
    train.main(shlex.split(TINY + "--resume"))
    said = capsys.readouterr().err
    assert "started with threads 99 and continues with 1" in said
    assert "started with commit abc and" in said and "uncommitted_changes perhaps and" in said


def test_a_second_process_on_the_same_run_folder_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(run_folders, "LOCK_SECONDS", 0)
    make_cub(here / "data")
    process = forked.start(forked.train_py, TINY + "--epochs 100000")
    try:
        wait_for(lambda: list(here.glob("logs/*/*/*_last.pth")), process)
        assert "is in use by another process" in fails(TINY + "--epochs 100000 --resume", capsys)
        assert "is in use by another process" in fails(TINY + "--overwrite", capsys)
    finally:
        process.kill()
        process.join()


def test_killed_runs_continue_to_the_same_bits(here):
    """The short version of `python -m tests.kill`."""
    tally = kill.kill_at_random(here, kills=2, seed=0, epochs=9, model="--model toy")
    assert tally["killed"] == 2 and tally["identical"] >= 1


@pytest.mark.parametrize("step, flags", [
    (1, ""), (3, "--IPC 4 --optimizer sgd"), (3, "--model toy_with_dropout"), (3, "--cache gpu"),
])
def test_a_run_interrupted_in_mid_epoch_continues_to_the_same_bits(here, monkeypatch, step, flags):
    make_cub(here / "data")
    command = TINY + f"{flags} --checkpoint-every 1 "
    train.main(shlex.split(command + "--LOG_DIR whole"))

    class Killed(BaseException):
        """As SIGKILL: nothing of ours handles it."""

    steps = []
    with monkeypatch.context() as patch:
        original = train.train_step

        def train_step(*args):
            if len(steps) == step:
                raise Killed
            steps.append(None)
            return original(*args)

        patch.setattr(train, "train_step", train_step)
        with pytest.raises(Killed):
            train.main(shlex.split(command))
    train.main(shlex.split(command + "--resume"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


def test_an_overwritten_run_is_kept_until_the_new_one_has_saved_something(here, run, capsys):
    old = (checkpoint_of(run_folder(here))).read_bytes()
    images = {path: path.read_bytes() for path in (here / "data").rglob("Bird_*.jpg")}
    for path in images:
        path.write_bytes(b"")
    assert "not an image" in fails(TINY + "--overwrite", capsys)
    kept = run_folder(here) / "cub_toy_last.pth.replaced"
    assert kept.read_bytes() == old
    aside = {path: path.read_bytes() for path in run_folder(here).glob("*.replaced")}
    assert "not an image" in fails(TINY, capsys)
    assert len(aside) == 8 and all(path.read_bytes() == aside[path] for path in aside)
    for path, data in images.items():
        path.write_bytes(data)
    train.main(shlex.split(TINY + "--overwrite --epochs 1"))
    assert not kept.exists()


def test_results_whose_weights_were_deleted_are_not_overwritten(here, run, capsys):
    for path in run_folder(here).glob("*.pth"):
        path.unlink()
    assert "already holds a run" in fails(TINY, capsys)
    assert "no checkpoint in" in fails(TINY + "--resume", capsys)
    assert len(metrics(run_folder(here))) == 1


def test_files_of_the_users_beside_a_resumed_checkpoint_are_left_alone(here, run, capsys):
    (here / "papers").mkdir()
    last = (checkpoint_of(run_folder(here))).rename(here / "papers/model_last.pth")
    for name in (".notes.tmp", "thesis.replaced"):
        (here / "papers" / name).write_text("mine")
    train.main(shlex.split(TINY + f"--epochs 2 --resume {last}"))
    for name in (".notes.tmp", "thesis.replaced"):
        assert (here / "papers" / name).read_text() == "mine"
