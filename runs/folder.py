"""A run's folder: its files, its lock, and saves that an interruption cannot damage."""

import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from runs.checkpoint import on_host
from runs.results import best_of, main_metric, results_of, summary
from storage import read_checkpoint, temporary_of, write_atomically, write_checkpoint, write_json
from utils import UserError, say, warn

# of a best checkpoint
BEST_PARTS = ("model_state_dict", "args", "history", "images", "trained_on")
CALIBRATION = "calibration.json"  # beside a checkpoint, by evaluate.py --calibrate
REPLACED = ".replaced"  # ends the names of files that --overwrite has renamed
LOCK_SECONDS = 10  # before version 4 of filelock, a killed run's workers hold its lock for 5 s


class RunFolder:
    """A run's files, each replaced as a whole. A `with` ends when the last save is on the disk."""

    def __init__(self, folder, name):
        """`name`, the data set and the network, begins the names of the checkpoints."""
        self.folder = Path(folder)
        self.best = self.folder / f"{name}_best.pth"
        self.last = self.folder / f"{name}_last.pth"
        self.previous = self.folder / f"{name}_previous.pth"
        self.results = self.folder / f"{name}_best_results.txt"
        self.metrics = self.folder / "metrics.jsonl"
        self.args = self.folder / "args.json"
        self.summary = self.folder / "results.json"
        self.curves = self.folder / "curves.png"
        self.page = self.folder / "page.html"
        self.calibration = self.folder / CALIBRATION
        self.files = [self.args, self.metrics, self.results, self.summary, self.curves, self.page,
                      self.calibration, self.best, self.last, self.previous]  # fmt: skip
        self.file_lock = FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)
        self.complete, self.writing = False, None

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.wait()
        if not error:
            self.previous.unlink(missing_ok=True)  # a finished run needs only the last

    def in_use(self):
        """Whether a run has saved something here."""
        return any(path.exists() for path in (self.best, self.last, self.previous, self.results))

    def lock(self):
        """Make the folder, and keep other processes out of it until this one ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file_lock.acquire()
        except Timeout:
            raise UserError(f"{self.folder} is in use by another process; wait for it, or give "
                            "this run a --remark of its own") from None  # fmt: skip
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror})") from error

    def claim(self, args, new):
        """Lock the folder; returns the content of args.json, {} for a new run."""
        self.lock()
        for file in self.files:
            temporary_of(file).unlink(missing_ok=True)
        if new and self.in_use() and not args.overwrite:
            raise UserError(f"{self.folder}: another process has just finished this run")
        try:
            return {} if new or not self.args.exists() else json.loads(self.args.read_text())
        except ValueError:
            raise UserError(f"{self.args}: damaged; delete it, --resume writes a new one") from None

    def start(self, description, training, new):
        """Write args.json and the results so far. A new run first renames the old files to
        *.replaced: if it dies before its first save, they stay."""
        if new and self.in_use():
            for file in filter(Path.exists, self.files):
                os.replace(file, f"{file}{REPLACED}")
        # what the run left when it was finished, before it goes on
        for file in (self.summary, self.page, self.curves, self.calibration):
            file.unlink(missing_ok=True)
        write_json(self.args, description)
        self.write_results(training.history, training.start)

    def write_results(self, history, start):
        if history:
            write_atomically(self.results, summary(results_of(history, start)).encode())
        lines = "".join(json.dumps(result) + "\n" for result in history)
        write_atomically(self.metrics, lines.encode())

    def stored_results(self):
        """What results.json holds."""
        return json.loads(self.summary.read_text())

    def save(self, checkpoint):
        """Write a checkpoint in a thread, once the one before is written. An error is raised by the
        next `save`, `wait` or `check`."""
        self.wait()
        self.writing = ThreadPoolExecutor(1).submit(self.write, checkpoint)

    def wait(self):
        """Return when everything saved is on the disk."""
        try:
            if self.writing:
                self.writing.result()
        finally:
            self.writing = None  # drops an error's traceback, whose frames hold the lock

    def check(self):
        """Raise the error of a save that has failed so far."""
        if self.writing and self.writing.done():
            self.wait()

    def write(self, checkpoint):
        """Writes `last` at the end: after an interrupted save, --resume uses the one before."""
        checkpoint |= on_host(checkpoint)  # in place: else the thread keeps the GPU's copy
        history = checkpoint["history"]
        if not checkpoint["partial"]:
            metric = main_metric(history[-1])
            if metric and best_of(history, metric) is history[-1]:
                write_checkpoint(self.best, {part: checkpoint[part] for part in BEST_PARTS})
            self.write_results(history, checkpoint["start"])
        write_checkpoint(self.last, checkpoint, keep=self.previous)
        for file in self.files:
            Path(f"{file}{REPLACED}").unlink(missing_ok=True)

    def newest_checkpoint(self):
        """(path, checkpoint) of the newest that is not damaged, (None, None) if none was saved."""
        for path in filter(Path.exists, (self.last, self.previous)):
            try:
                checkpoint = read_checkpoint(path)
            except UserError as error:
                warn(f"{error}; trying the checkpoint before it")
                continue
            if path != self.last and self.last.exists():
                os.replace(self.last, f"{self.last}.damaged")  # else it would become `previous`
            return path, checkpoint
        if self.curves.exists() and self.best.exists() and not self.last.exists():
            raise UserError(f"{self.folder} is finished, and --keep best has deleted what "
                            "continues it; --overwrite trains it again")  # fmt: skip
        if self.in_use():
            raise UserError(f"--resume: no checkpoint in {self.folder} can be continued; --weights "
                            "PATH starts a new run from the network of any other")  # fmt: skip
        return None, None

    def require_room(self, needed):
        """UserError if the disk has no room for a run's checkpoints."""
        there = sum(file.stat().st_size for file in self.files if file.exists())
        free = shutil.disk_usage(self.folder).free + there
        if free < needed:
            raise UserError(f"{self.folder}: a run's checkpoints take up to {needed / 1e6:,.0f} MB"
                            f", and {free / 1e6:,.0f} MB are free; use another --LOG_DIR")


class NoFolder(contextlib.nullcontext):
    """The RunFolder of ranks above 0: writes nothing."""

    folder = best = last = None

    def __init__(self, complete):
        super().__init__()
        self.complete = complete

    def save(self, *_):
        pass

    wait = check = stored_results = save


def checkpoint_in(path):
    """The checkpoint to evaluate: `path` if it is a file, a run folder's best checkpoint, or else
    its last; in a folder of run folders, that of the newest run."""
    if not os.path.isdir(path):
        return path
    for below in ("", "*/"):
        found = [file for kind in ("best", "last", "previous")
                 for file in Path(path).glob(f"{below}*_{kind}.pth")]  # fmt: skip
        if found:
            newest = max(found, key=lambda file: file.stat().st_mtime).parent
            if below:
                say(f"{path}: its newest run is {newest.name}")
            return str(next(file for file in found if file.parent == newest))
    raise UserError(f"{path}: a folder without a run's checkpoints")
