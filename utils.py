"""What every script does: errors in one line, signals, progress, seeds, the device."""

import difflib
import errno
import os
import platform
import signal
import sys
import time
import traceback
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.distributed import is_torchelastic_launched
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; `run` prints it as one line and exits with status 2."""


class Interrupted(Exception):
    """A signal has come; `note` says how to continue."""

    def __init__(self, number, note=None):
        self.number, self.note = number, note


# the fault of the machine or of the user's paths; any other OSError is a bug of ours
NOT_OUR_BUGS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.EPERM,
                errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EROFS}  # fmt: skip


def run(main, name=None):
    """Call `main` as a script and exit; errors are one line, our own bugs keep their traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # files may be named in any encoding
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        explanation = explain(error)
        if not explanation and not is_torchelastic_launched():
            raise
        status, line = explanation or (1, traceback.format_exc())
        rank = f" (rank {os.environ['RANK']})" if is_torchelastic_launched() else ""
        if line:
            print(f"{name or Path(sys.argv[0]).name}{rank}: {line}", file=sys.stderr, flush=True)
        if isinstance(error, OSError) and error.filename is None:  # stdout cannot be written
            # at its end Python flushes it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if is_torchelastic_launched():  # a normal end may wait for other ranks, or abort in gloo
        sys.stdout.flush()
        os._exit(status or 0)
    sys.exit(status)


def explain(error):
    """(exit status, line to print or None) of an error that is not our bug, else None."""
    reason = str(error).partition("\n")[0]
    match error:
        case UserError():
            return 2, f"error: {' '.join(str(error).split())}"
        case torch.OutOfMemoryError():
            return 2, f"error: {out_of_memory(error)}"
        case RuntimeError() if "gloo" in str(error) or "NCCL" in str(error):
            time.sleep(1)  # torchrun names the process that ends first: let it be the other one
            return 1, f"another process of this run has ended ({reason.split('. ')[0]})"
        case RuntimeError() if "does not have a deterministic implementation" in reason:
            return 2, f"error: --deterministic: {reason.split(', but')[0]}; train without the flag"
        case RuntimeError() if type(error).__module__ == "torch._dynamo.exc":
            reason = " ".join(str(error).partition("\n\n")[0].split())
            return 2, f"error: --compile: torch cannot compile this network or loss: {reason}"
        case RuntimeError() if reason.startswith("DataLoader worker"):
            return 2, ("error: a process died, perhaps for lack of memory; use fewer --workers, in "
                       f"a container more --shm-size ({reason})")  # fmt: skip
        case BrokenPipeError():  # whoever read our output, as in `| head`, has gone
            return 1, None
        case OSError() if error.errno in NOT_OUR_BUGS:  # no filename: the output of a print
            return 2, f"error: {error.filename or 'the output'}: {error.strerror}"
        case Interrupted():  # rank 0 says how to go on
            line = f"{signal.Signals(error.number).name}: {error.note}"
            return 128 + error.number, line if is_rank_0() else None
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "stopped"


def out_of_memory(error, first=""):
    """What to do, `first` before the rest."""
    return (f"the GPU's memory is full, use {first}a smaller --batch-size or --image-size, or "
            f"--precision bf16 ({str(error).split('. ')[0]})")  # fmt: skip


class Stop:
    """In a `with`, SIGTERM and Ctrl-C set `signal`. A second one, after half a second, ends the
    process; not under torchrun, which passes signals on and kills after 30 s."""

    def __enter__(self):
        self.signal = None
        self.former = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() > self.since + 0.5 and not is_torchelastic_launched():
            os._exit(128 + number)

    def between(self, items):
        """`items`; after a signal Interrupted."""
        for item in items:
            if self.signal:
                raise Interrupted(self.signal)
            yield item


_quiet = False  # global, or every function that shows progress would take it


def set_quiet(quiet):
    """--quiet: print only errors, warnings and results."""
    global _quiet
    _quiet = quiet


def is_rank_0():
    """Whether this process prints; known before init_processes too."""
    return not is_torchelastic_launched() or os.environ["RANK"] == "0"


def shows():
    """Whether this process prints what --quiet leaves out."""
    return is_rank_0() and not _quiet


def say(message):
    if shows():
        print(message, flush=True)


def warn(message):
    if is_rank_0():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def plural(count, word):
    """`1 class`, `2,000 images`."""
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}{'es' if word[-1] == 's' else 's'}"
    return f"{count:,} {word if count == 1 else many}"


def did_you_mean(word, known):
    """`; did you mean X?` for the end of an error, or "" if no word in `known` is similar."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def progress(iterable, total, label, images=None, note=str):
    """A tqdm bar on a terminal, with `images` per step and `note()`; else a line every 30 s."""
    shown = shows()
    if shown and sys.stderr.isatty():
        unit = {"unit": " images", "unit_scale": images} if images else {}
        with tqdm(iterable, label, total, leave=False, dynamic_ncols=True, **unit) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        if shown and time.monotonic() > last + 30:
            last = time.monotonic()
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)


ORDER, AUGMENTATION, STEP = range(3)  # streams of random numbers: seed_of(seed, STREAM, ...)


def seed_of(*key):
    """A seed that depends only on `key`, non-negative integers such as (seed, epoch, index)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))


def device_name(device):
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})"


def choose_device(gpu_id=None):
    """The torch.device of --gpu-id; -1 is the only GPU, None the first one or else the CPU."""
    count = torch.cuda.device_count()
    if count == 0 and gpu_id in (None, 0, -1):
        if gpu_id is not None:
            warn(f"--gpu-id {gpu_id}: no CUDA device here, running on the CPU")
        return torch.device("cpu")
    gpu_id = gpu_id or 0
    if gpu_id == -1 and count > 1:
        raise UserError(f"--gpu-id -1: torchrun has replaced DataParallel: for all {count} GPUs, "
                        f"torchrun --nproc-per-node {count} train.py ... with the same flags")
    if gpu_id >= count:
        there = f"GPUs 0 to {count - 1}" if count else "no CUDA device"
        raise UserError(f"--gpu-id {gpu_id}: this machine has {there}")
    device = torch.device("cuda", max(gpu_id, 0))
    torch.cuda.set_device(device)  # pinned memory belongs to the current device
    return device


@cache  # one stream: each would allocate its own memory
def stream_of_copies(device):
    """The stream in which a GPU copies while it computes; None on the CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def set_precision(precision, deterministic=False):
    """Apply --precision (to float32 on CUDA) and --deterministic to the whole process."""
    # differs: the script has PyTorch's default, TF32 in convolutions but not in matrix products
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # all steps have the same shapes
