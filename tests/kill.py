"""Kill real training runs and compare what they end in with a run that was left alone.

python -m tests.kill --kills 100    (takes minutes)

Runs of train.py are ended with SIGKILL at random instants, each continued with --resume and killed
again until it finishes; then one run is killed at each fsync and rename of its saves in
turn. Weights, proxies, optimiser state and metrics.jsonl (times aside) have to come out the same,
bit for bit. Prints the tally as it goes; exit status 1 if anything differs. Not part of the test
suite, which has a short version.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

from storage import read_checkpoint
from tests import forked
from tests.conftest import TINY, checkpoint_of, make_cub

FLAGS = TINY + "--bn-freeze 0 --checkpoint-every 1 "
TIMES = {"seconds", "seconds_data", "seconds_step", "seconds_eval", "images_per_second"}


def at_call(patch, names, n, action):
    """Do `action` at the n-th call, from 0, of the os functions `names`; `patch` is setattr."""
    count = iter(range(10**9))

    def watched(function):
        def call(*args, **kwargs):
            if next(count) == n:
                action()
            return function(*args, **kwargs)

        return call

    for name in names:
        patch(os, name, watched(getattr(os, name)))


def bits(tensor):
    values = tensor.contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tensor.shape, values.numpy().tobytes()


def same(first, second):
    """Equal, tensors bit for bit, leaving aside what was measured with a clock."""
    if torch.is_tensor(first):
        return torch.is_tensor(second) and bits(first) == bits(second)
    if isinstance(first, dict):
        keys = first.keys() - TIMES
        return keys == second.keys() - TIMES and all(same(first[key], second[key]) for key in keys)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same_run(folder, other, kinds=("best", "last")):
    """The checkpoints, all of their parts but the flags, and metrics.jsonl, times aside."""
    for which in kinds:
        first, second = (read_checkpoint(checkpoint_of(side, which)) for side in (folder, other))
        for part in first.keys() - {"args"}:
            assert same(first[part], second[part]), f"{folder}, {which}: {part} differs"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == first["history"], f"{folder}: metrics differ"


def run_train(here, flags, seconds=None, inject=None):
    """Run train.py; SIGKILL it after `seconds`, or at the n-th call of a save. Its exit status."""
    os.chdir(here)
    process = forked.start(injected, inject, FLAGS + flags)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), Path("err").read_text()
    return process.exitcode


def injected(n, flags):
    """In the child: train.py, with SIGKILL at the n-th fsync or rename if `n` is given."""
    if n is not None:
        names = ["fsync", "replace"]
        at_call(setattr, names, n, lambda: os.kill(os.getpid(), signal.SIGKILL))
    forked.train_py(flags)


def resume_flag(here, name):
    """--resume, once there is something to resume."""
    return "--resume" if list(Path(here, name).glob("*/*/args.json")) else ""


def whole_run(here, epochs, model):
    if not Path(here, "data").exists():
        make_cub(Path(here, "data"))
    forked.start(int).join()  # the first one waits until torch is imported
    started = time.monotonic()
    flags = f"--LOG_DIR whole{epochs} --workers 0 --epochs {epochs} --overwrite {model}"
    run_train(here, flags)
    return next(Path(here).glob(f"whole{epochs}/*/*")), time.monotonic() - started


def kill_at_random(here, kills, seed, epochs=3, model="--model bn_inception"):
    """Kill runs at random instants until `kills` were; every run has to end as the whole one."""
    rng = random.Random(seed)
    tally = {"runs": 0, "killed": 0, "identical": 0}
    while tally["killed"] < kills:
        if tally["runs"] % 8 == 0:  # the machine's speed may change
            whole, duration = whole_run(here, epochs, model)
        name = f"killed{tally['runs']}"
        tally["runs"] += 1
        status = -signal.SIGKILL
        while status:
            left = kills - tally["killed"]
            instant = rng.uniform(0, duration) if left else None
            flags = f"--LOG_DIR {name} --epochs {epochs} --workers {rng.choice([0, 1, 2])} {model} "
            status = run_train(here, flags + resume_flag(here, name), instant)
            tally["killed"] += status != 0
        assert_same_run(next(Path(here).glob(f"{name}/*/*")), whole)
        tally["identical"] += 1
        shutil.rmtree(Path(here, name))
        print("random instants:", tally, flush=True)
    return tally


def kill_at_calls(here, step, epochs=1, model="--model bn_inception"):
    """Kill a run at each fsync and rename in turn, and continue it."""
    whole, _ = whole_run(here, epochs, model)
    tally = {"calls": 0, "identical": 0}
    for n in range(0, 10**6, step):
        name = f"call{n}"
        flags = f"--LOG_DIR {name} --workers 0 --epochs {epochs} {model} "
        if run_train(here, flags, inject=n) == 0:
            return tally
        tally["calls"] += 1
        run_train(here, flags + resume_flag(here, name))
        assert_same_run(next(Path(here).glob(f"{name}/*/*")), whole)
        tally["identical"] += 1
        shutil.rmtree(Path(here, name))  # half a gigabyte
        print("calls of a save:", tally, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="at random instants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="inject at every n-th call only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as here:
        kill_at_random(here, args.kills, args.seed)
        kill_at_calls(here, args.every)


if __name__ == "__main__":
    main()
