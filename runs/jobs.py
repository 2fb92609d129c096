"""Runs of train.py as subprocesses, several at a time."""

import sys
import time
from argparse import Namespace
from os import environ
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import torch
from filelock import Timeout
from tqdm import tqdm

from runs.folder import RunFolder
from runs.start import stored
from utils import plural, say

TRAIN = [sys.executable, str(Path(__file__).resolve().parent.parent / "train.py")]
LOG = "sweep.log"  # in a run's folder: what the run printed
POLL_SECONDS = 0.2


class Run(NamedTuple):
    folder: Path
    flags: list  # of train.py
    args: Namespace  # the same, parsed


def state_of(run):
    """`done`, `in use`, `begun` or `new`, as the run's folder says."""
    files = RunFolder(run.folder, "")
    epochs = stored(run.folder).get("flags", {}).get("epochs", 0)
    if epochs >= run.args.epochs and files.summary.exists() and files.curves.exists():
        return "done"
    try:
        if Path(files.file_lock.lock_file).exists():
            files.file_lock.acquire(timeout=0)
            files.file_lock.release()
    except Timeout:
        return "in use"
    return "begun" if files.args.exists() else "new"


def command_of(run, state):
    return [*TRAIN, *run.flags, *(["--resume"] if state == "begun" else [])]


def environments(jobs):
    """An environment for each of `jobs` runs at a time: a GPU, or a share of the CPU's threads."""
    count = torch.cuda.device_count()
    if not count:
        threads = max(1, torch.get_num_threads() // (jobs or 1))
        return [{**environ, "OMP_NUM_THREADS": str(threads)}] * (jobs or 1)
    visible = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = visible.split(",")[:count]
    return [{**environ, "CUDA_VISIBLE_DEVICES": gpus[i % count]} for i in range(jobs or count)]


def work(runs, free, stop):
    """Run what is missing, each in one of the `free` environments. A signal is passed on to the
    running ones, and no others start. Yields (run, how it ended, whether it failed) as runs end,
    and None meanwhile."""
    pending, working, told, passed_on = list(runs), {}, False, False
    while working or pending and not stop.signal:
        if stop.signal and not passed_on:
            passed_on = True
            for process in working:  # a terminal signals them too; train.py counts both as one
                process.send_signal(stop.signal)
        for run in list(pending):
            if stop.signal or not free:
                break
            state = state_of(run)
            if state == "in use":  # by another process; asked again in the next round
                continue
            pending.remove(run)
            if state == "done":
                yield run, "finished by another process", False
                continue
            with open(run.folder / LOG, "ab") as log:
                job = run, state, free.pop(0), log.tell(), time.monotonic()
                process = Popen(command_of(run, state), stdout=log, stderr=log, env=job[2])
            working[process] = job
        if pending and not (working or stop.signal or told):
            say(f"waiting for {plural(len(pending), 'run')} of other processes, such as "
                f"{pending[0].folder}")  # fmt: skip
            told = True
        yield None
        time.sleep(POLL_SECONDS)
        for process in [process for process in working if process.poll() is not None]:
            run, before, environment, size, since = working.pop(process)
            free.append(environment)
            state = state_of(run)
            if process.returncode == 0 or state == "done":
                took = tqdm.format_interval(time.monotonic() - since)
                yield run, f"finished in {took}", False
            elif state == "in use" or (before, state) == ("new", "begun"):
                pending.append(run)  # another process was faster
            elif not stop.signal:
                status, line = process.returncode, last_line(run.folder / LOG, size)
                yield run, f"failed with status {status}: {line}", True


def last_line(path, start):
    """The file's last line with text in it, after the first `start` bytes."""
    lines = path.read_bytes()[start:].decode(errors="replace").splitlines()
    return next(filter(str.strip, reversed(lines)), "it printed nothing")


def show(ends, total):
    """Print how each run of `work` ended, with a bar on a terminal. Returns a line a failed run."""
    failed, since, count = [], time.monotonic(), 0
    with tqdm(total=total, desc="runs", leave=False, dynamic_ncols=True, disable=None) as bar:
        for end in ends:
            if not end:
                bar.refresh()
                continue
            run, how, has_failed = end
            count += 1
            bar.update()
            left = tqdm.format_interval((total - count) * (time.monotonic() - since) / count)
            with tqdm.external_write_mode():
                say(f"{count}/{total} {run.folder}: {how}; {left} left")
            if has_failed:
                failed.append(f"{run.folder}: {how}")
    return failed
