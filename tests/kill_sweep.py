"""Kill real sweeps, and compare what one more call ends in with a sweep that was left alone.

python -m tests.kill_sweep --kills 100    (takes minutes)

A sweep is ended with SIGKILL at random instants, alone or with its runs, once or several times.
One more call of the same command has to finish every run with the same bits. Prints the tally as it
goes. Not part of the test suite, which has a short version.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import sweep
from runs import jobs
from tests import forked
from tests.conftest import DISENT, TINY, make_cub
from tests.kill import assert_same_run
from utils import run

BASE = TINY.replace(DISENT, "") + "--al 1 --be 0.1 "
GRID = f"--jobs 2 --grid disent=False,True gam=1e-5,1e-3 -- {BASE}"


class Fork:
    """What subprocess.Popen is to runs.jobs, without torch being imported anew for each run."""

    def __init__(self, command, stdout, stderr, env):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            for number, handler in ((signal.SIGINT, signal.default_int_handler),
                                    (signal.SIGTERM, signal.SIG_DFL)):  # fmt: skip
                signal.signal(number, handler)
            os.dup2(stdout.fileno(), 1), os.dup2(stderr.fileno(), 2)
            try:
                forked.train_py(shlex.join(command))
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code or 0)
            finally:
                os._exit(1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def sweep_py(flags):
    """python sweep.py FLAGS, with the toy network, and without the table"""
    jobs.Popen, jobs.TRAIN, sweep.COMPARE = Fork, [], ["true"]
    sys.argv = ["sweep.py", *shlex.split(flags)]
    run(sweep.main)


def finish(flags):
    """One call, to the end."""
    process = forked.start(sweep_py, flags)
    process.join()
    assert process.exitcode == 0, Path("err").read_text()


def folders(log_dir):
    return sorted(path.parent for path in Path(log_dir).glob("*/*/results.json"))


def kill_at_random(here, kills, seed):
    """Kill sweeps at random instants until `kills` were; then each has to end as the whole one."""
    os.chdir(here)
    make_cub(Path("data"))
    flags, rng = f"{GRID} --epochs 9 --LOG_DIR ", random.Random(seed)
    forked.start(int).join()  # the first one waits until torch is imported
    started = time.monotonic()
    finish(flags + "whole")
    duration = time.monotonic() - started
    tally = {"sweeps": 0, "killed alone": 0, "killed with their runs": 0, "identical": 0}
    while tally["killed alone"] + tally["killed with their runs"] < kills:
        tally["sweeps"] += 1
        for _ in range(rng.randint(1, 3)):
            process, alone = forked.start(sweep_py, flags + "killed"), rng.random() < 0.5
            process.join(rng.uniform(0, duration))
            if process.is_alive():
                alone = alone or os.getpgid(process.pid) != process.pid  # has just been forked
                (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
                tally["killed alone" if alone else "killed with their runs"] += 1
            process.join()
        finish(flags + "killed")
        assert [path.name for path in folders("killed")] == [path.name for path in folders("whole")]
        for folder, whole in zip(folders("killed"), folders("whole")):
            assert_same_run(folder, whole)
        tally["identical"] += 1
        shutil.rmtree("killed")
        print(tally, flush=True)
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as here:
        kill_at_random(here, args.kills, args.seed)


if __name__ == "__main__":
    main()
