"""What every script does on a command line: flags, errors in one line, signals, progress.

Torch takes seconds to import, and a mistake in a flag is answered before it is: nothing in here
needs it.
"""

import argparse
import contextlib
import ctypes
import errno
import io
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

MODELS = ["bn_inception"]  # the names of net.MODELS


class UserError(Exception):
    """Something the user can mend; `run` prints it as one line and exits with status 2."""


class Interrupted(BaseException):
    """A signal arrived; like KeyboardInterrupt it is no error, and no `except Exception` takes it.
    `note` says what became of the work."""

    def __init__(self, number, note="nothing new was saved"):
        self.number, self.note = number, note


@contextlib.contextmanager
def errors_in_one_line():
    """End the process for user errors and signals; our own bugs keep their traceback."""

    def end(status, line):
        with contextlib.suppress(OSError):  # the disk under stderr may be full as well
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(status)

    try:
        yield
    except UserError as error:
        end(2, f"error: {' '.join(str(error).split())}")
    except BrokenPipeError:  # whoever read our output, as in `| head`, has gone
        discard_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in NOT_OUR_BUGS:
            raise
        if error.filename is None:  # not a file that we open, so the one behind a print
            discard_output()
        end(2, f"error: {error.filename or 'the output, or a process'}: {error.strerror}")
    except Interrupted as stop:
        end(128 + stop.number, f"{signal.Signals(stop.number).name}: {stop.note}")


# what the machine or the user's paths are to blame for
NOT_OUR_BUGS = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EMFILE,
                errno.ENAMETOOLONG, errno.ENFILE, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
                errno.EROFS}  # fmt: skip


def discard_output():
    """Else Python complains at its end about what it cannot write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Call `main` as a script; its result is the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # files may be named in any encoding
    with errors_in_one_line(), Stop():
        status = main()
    sys.exit(status)


def check_flags(build_parser):
    """Answer --help and mistakes in flags, and let signals end the process in one line: to be
    called before a script's slow imports."""

    def end(number, frame):
        line = f"{Path(sys.argv[0]).name}: {signal.Signals(number).name}: stopped\n"
        os.write(sys.stderr.fileno(), line.encode())
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with errors_in_one_line():
        build_parser().parse_args()


class Stop:
    """SIGTERM and Ctrl-C, in a `with`: raise Interrupted, or while `deferred` leave it to `check`
    to do so; a second signal ends the process at once."""

    def __init__(self):
        self.signal, self.wait, self.former, self.process = None, False, {}, os.getpid()

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.former[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if os.getpid() != self.process:
            return  # a worker that has just been forked, and has not set its own handlers yet
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if not self.wait:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self):
        """In here a signal takes effect only where `check` is called, and at the end."""
        self.wait = True
        try:
            yield
        finally:
            self.wait = False
        self.check()

    def check(self):
        if self.signal is not None:
            raise Interrupted(self.signal)


PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal to get when the parent dies


def leave_signals_to_parent(*_):
    """For worker processes: Ctrl-C and a scheduler's SIGTERM reach them too, and the death of one
    would break off what the parent has under way. So they live on, for as long as it may take, but
    not longer than the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
    with contextlib.suppress(AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def plural(count, word):
    """`1 class`, `2,000 images`."""
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}{'es' if word[-1] == 's' else 's'}"
    return f"{count:,} {word if count == 1 else many}"


def progress(iterable, total, label):
    """A tqdm bar on a terminal; elsewhere a plain line every half minute."""
    if sys.stderr.isatty():
        yield from tqdm(iterable, label, total, leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        if time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)


def in_parallel(function, items, workers, label):
    """[function(item) for each item], in order, by `workers` processes; shows the progress."""
    try:
        with ProcessPoolExecutor(workers, initializer=leave_signals_to_parent) as pool:
            return list(progress(pool.map(function, items, chunksize=16), len(items), label))
    except BrokenProcessPool as error:
        raise UserError(
            f"{label}: a process died, perhaps for lack of memory; use fewer --workers"
        ) from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and that knows no abbreviated flags."""

    def __init__(self, **kwargs):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def given_flags(parser, argv):
    """All flags as a namespace, and {name: value} of those that the command line gives."""
    args = parser.parse_args(argv)
    unset = object()
    absent = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    parsed = vars(parser.parse_args(argv, absent))
    return args, {name: value for name, value in parsed.items() if value is not unset}


def boolean(text):
    """argparse type: true/false, 1/0, yes/no in any case."""
    # differs: `bool("False")`, the published type, is True
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise ValueError(text) from None  # argparse names the flag and the value


def at_least(low, kind=int, most=10**9):
    """argparse type: a number no smaller than `low`, and not beyond all use."""

    def parse(text):
        value = kind(text)
        if not low <= value <= most:
            raise ValueError(text)
        return value

    parse.__name__ = f"number ({low} to {most:,})"
    return parse


def parse_stored(parser, flags, path, required=()):
    """The flags stored in a checkpoint, as a namespace, held to the same rules as typed ones."""
    argv = list(required)
    if not all(isinstance(name, str) for name in flags):
        raise UserError(f"{path}: its stored flags are not valid: their names are no text")
    for name, value in flags.items():
        if value is not None and name not in ("resume", "overwrite"):  # they are no settings
            flag = name.replace("_", "-") if name.islower() else name  # LOG_DIR, IPC
            argv.append(f"--{flag}={value}")
    try:
        return parser.parse_args(argv)
    except UserError as error:
        raise UserError(f"{path}: its stored flags are not valid: {error}") from error


def name_part(text):
    """argparse type: what may be part of a folder's name."""
    if "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"a folder's name cannot hold {ascii(text)}")
    return text


def image_size(text):
    """argparse type: BN-Inception joins maps that it has halved in two ways, one rounding up and
    one down, so the last maps but one have to have even sides."""
    value = int(text)
    if not 31 <= value <= 2**12 or (value + 1) % 32 >= 8:
        raise argparse.ArgumentTypeError(
            f"BN-Inception takes multiples of 32 and up to 6 pixels more, not {value}"
        )
    return value
