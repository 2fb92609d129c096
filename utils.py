"""What every script does: errors in one line, signals, progress, seeds, the device."""

import contextlib
import difflib
import errno
import io
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
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend; `run` prints it as one line and exits with status 2."""


class Interrupted(Exception):
    """Raised where a Stop is looked at, after a signal; `note` says how to go on."""

    def __init__(self, number, note=None):
        self.number, self.note = number, note


# what the machine or the user's paths are to blame for
NOT_OUR_BUGS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EMFILE,
                errno.ENAMETOOLONG, errno.ENFILE, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
                errno.EROFS}  # fmt: skip


def run(main, name=None):
    """Call `main` as a script and exit with its result; our own bugs keep their traceback."""
    try:
        run_alone(main, name)
    except BaseException as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        if status:  # NCCL's farewell at a process's end would wait for the others
            sys.stdout.flush()
            os._exit(status)


def run_alone(main, name):
    """As `run`, where no other process waits for this one."""

    def end(status, line):
        with contextlib.suppress(OSError):  # the disk under stderr may be full as well
            of = f" (rank {os.environ['RANK']})" if "TORCHELASTIC_RUN_ID" in os.environ else ""
            print(f"{name or Path(sys.argv[0]).name}{of}: {line}", file=sys.stderr, flush=True)
        sys.exit(status)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # files may be named in any encoding
    try:
        sys.exit(main())
    except UserError as error:
        end(2, f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError as error:
        end(2, f"error: {out_of_memory(error)}")
    except RuntimeError as error:
        if "gloo" in str(error) or "NCCL" in str(error):
            reason = str(error).splitlines()[0].split(". ")[0]
            time.sleep(1)  # torchrun is to see that one first, and names it
            end(1, f"another process of this run has ended ({reason})")
        reason = str(error).splitlines()[0]
        if "does not have a deterministic implementation" in reason:
            end(2, f"error: --deterministic: {reason.split(', but')[0]}; train without the flag")
        if not reason.startswith("DataLoader worker"):  # raised wherever the process then is
            raise
        end(2, "error: a process died, perhaps for lack of memory; use fewer --workers, in a "
               f"container more --shm-size ({reason})")  # fmt: skip
    except BrokenPipeError:  # whoever read our output, as in `| head`, has gone
        discard_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in NOT_OUR_BUGS:
            raise
        if error.filename is None:  # not a file that we open, so the one behind a print
            discard_output()
        end(2, f"error: {error.filename or 'the output'}: {error.strerror}")
    except Interrupted as stop:
        if not is_rank_0():  # which says how to go on
            sys.exit(128 + stop.number)
        end(128 + stop.number, f"{signal.Signals(stop.number).name}: {stop.note}")
    except KeyboardInterrupt:
        end(128 + signal.SIGINT, "stopped")


def out_of_memory(error):
    reason = str(error).split(". ")[0]
    return ("the GPU's memory is full, use a smaller --batch-size or --image-size, or --precision "
            f"bf16 ({reason})")  # fmt: skip


def discard_output():
    """Else Python complains at its end about what it cannot write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Stop:
    """In a `with`: SIGTERM and Ctrl-C set a flag, which the work looks at between its steps with
    `check`; a second signal ends the process at once. Of two within half a second, one was passed
    on: torchrun does so with a signal that a cluster sends to all."""

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
        elif time.monotonic() > self.since + 0.5:
            os._exit(128 + number)

    def check(self, agree=int):
        """Raise Interrupted after a signal; with all_reduce_max, after one to any rank."""
        signal = agree(self.signal or 0)
        if signal:
            raise Interrupted(signal)

    def between(self, items):
        """`items`, with a look at the flag before each."""
        for item in items:
            self.check()
            yield item


_quiet = False  # of this process: else every function that may show a progress bar had to be told


def set_quiet(quiet):
    """--quiet: from here on, print errors, warnings and results alone."""
    global _quiet
    _quiet = quiet


def is_rank_0():
    """Whether this process speaks for all that torchrun has started; before they are joined too."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def say(message):
    """What is good to know while a run is under way."""
    if is_rank_0() and not _quiet:
        print(message, flush=True)


def warn(message):
    if is_rank_0():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def plural(count, word):
    """`1 class`, `2,000 images`."""
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}{'es' if word[-1] == 's' else 's'}"
    return f"{count:,} {word if count == 1 else many}"


def did_you_mean(word, known):
    """`; did you mean X?` for the end of an error, or nothing where none of `known` is near."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def progress(iterable, total, label, images=None, note=str):
    """A tqdm bar on a terminal, of steps of `images` with `note()` at its end; elsewhere a plain
    line every half minute."""
    if _quiet or not is_rank_0():
        yield from iterable
        return
    if sys.stderr.isatty():
        unit = {"unit": " images", "unit_scale": images} if images else {}
        with tqdm(iterable, label, total, leave=False, dynamic_ncols=True, **unit) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)


def seed_of(*key):
    """A seed that depends on nothing but `key`, non-negative integers such as (seed, epoch, index):
    not on the worker, the process or what was drawn before."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key):
    """A torch generator with the seed of `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


def device_name(device):
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})"


def choose_device(gpu_id):
    """`--gpu-id` -> torch.device; -1 is the only one."""
    count = torch.cuda.device_count()
    if count == 0 and gpu_id > 0:
        raise UserError(f"--gpu-id {gpu_id}: this machine has no CUDA device")
    if count == 0:
        warn(f"--gpu-id {gpu_id}: no CUDA device here, running on the CPU")
        return torch.device("cpu")
    if gpu_id == -1 and count > 1:
        raise UserError(
            f"--gpu-id -1: torchrun has replaced DataParallel: for all {count} GPUs, "
            f"torchrun --nproc-per-node {count} train.py ... with the same flags"
        )
    if gpu_id >= count:
        raise UserError(f"--gpu-id {gpu_id}: this machine has GPUs 0 to {count - 1}")
    device = torch.device("cuda", max(gpu_id, 0))
    torch.cuda.set_device(device)  # pinned memory belongs to the current device
    return device


@cache  # one: each has memory of its own
def stream_of_copies(device):
    """In which a GPU copies while it computes; None, in a `with` no other one, on the CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def set_precision(precision, deterministic=False):
    """What --precision means for float32 on CUDA, and --deterministic, for the whole process.
    PyTorch's own default is neither fp32 nor tf32: it rounds the factors of convolutions, and not
    those of products. Shapes are the same in each step: cuDNN looks for its fastest way once."""
    # differs: the script has PyTorch's default
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
