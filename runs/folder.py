"""A run's folder: its files, its results, and what is continued after an interruption."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from runs.checkpoint import network_alone, on_host
from runs.results import best_of, main_metric, summary
from storage import read_checkpoint, temporary_of, write_atomically, write_checkpoint, write_json
from utils import UserError, warn

REPLACED = ".replaced"  # ends the names of a run's files that --overwrite has put aside
LOCK_SECONDS = 10  # before version 4 of filelock, a killed run's workers hold its lock for 5 s


class RunFolder:
    """Where a run's files are; every file is replaced whole, never written in place. In a `with`
    are a run's saves: it ends when the last one is on the disk, whatever ends it."""

    def __init__(self, folder, name):
        """`name`, of the data set and the network, begins its files' names."""
        self.folder = Path(folder)
        self.best = self.folder / f"{name}_best.pth"
        self.last = self.folder / f"{name}_last.pth"
        self.previous = self.folder / f"{name}_previous.pth"
        self.results = self.folder / f"{name}_best_results.txt"
        self.metrics = self.folder / "metrics.jsonl"
        self.args = self.folder / "args.json"
        self.curves = self.folder / "curves.png"
        self.page = self.folder / "page.html"
        self.files = [self.args, self.metrics, self.results, self.curves, self.page, self.best,
                      self.last, self.previous]  # fmt: skip
        self.file_lock = FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)
        self.complete, self.writing = False, None

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        self.wait()
        if not kind:
            self.previous.unlink(missing_ok=True)  # a finished run needs no second one

    def in_use(self):
        """Whether there is something to lose: a run that saved nothing may be started again."""
        return any(path.exists() for path in (self.best, self.last, self.previous, self.results))

    def is_complete(self, history, epochs):
        """Whether there is nothing left to train, to draw or to log."""
        return len(history) >= epochs and self.curves.exists()  # which is written last

    def lock(self):
        """Keep other processes out for as long as this one lives, however it ends."""
        try:
            self.file_lock.acquire()  # again, where this process has it already
        except Timeout:
            raise UserError(
                f"{self.folder} is in use by another process; wait for it, or give this run a "
                "--remark of its own"
            ) from None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror})") from error

    def claim(self, args, new):
        """Make and lock the folder; returns what args.json says, {} for a new run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock()
            for file in self.files:
                temporary_of(file).unlink(missing_ok=True)
            if new and self.in_use() and not args.overwrite:
                raise UserError(f"{self.folder}: another process has just finished this run")
            return {} if new or not self.args.exists() else json.loads(self.args.read_text())
        except OSError as error:
            raise UserError(f"{self.folder}: {error.strerror}") from error
        except ValueError:
            raise UserError(f"{self.args}: damaged; delete it, --resume writes a new one") from None

    def start(self, description, history):
        """Write args.json and the results so far. A new run (history None) first renames the old
        files to *.replaced: if it dies before its first save, they stay."""
        if history is None and self.in_use():
            for file in filter(Path.exists, self.files):
                put_aside(file, REPLACED)
        for picture in (self.page, self.curves):  # of an end that is not one any more
            picture.unlink(missing_ok=True)
        write_json(self.args, description)
        self.write_results(history or [])

    def write_results(self, history):
        if history:
            write_atomically(self.results, summary(history).encode())
        lines = "".join(json.dumps(result) + "\n" for result in history)
        write_atomically(self.metrics, lines.encode())

    def save(self, checkpoint):
        """Write a checkpoint in a thread, after the save before it. UserError where that one could
        not be written; where this one cannot be, the next `save`, `wait` or `check` raises it."""
        self.wait()
        self.writing = ThreadPoolExecutor(1).submit(self.write, checkpoint)

    def wait(self):
        """Until all that was saved is on the disk."""
        try:
            if self.writing:
                self.writing.result()
        finally:
            self.writing = None  # and with it the frames of its error

    def check(self):
        """Raise what has gone wrong with a save so far."""
        if self.writing and self.writing.done():
            self.wait()

    def write(self, checkpoint):
        """Of a finished epoch, first the best network and the results. What --resume continues from
        comes last, so that an interrupted save is an epoch that never happened; the checkpoint
        before it is kept."""
        checkpoint |= on_host(checkpoint)  # in place: the thread would keep the device's copy
        history = checkpoint["history"]
        if not checkpoint["partial"]:
            metric = main_metric(history[-1])
            if metric and best_of(history, metric) is history[-1]:
                write_checkpoint(self.best, network_alone(checkpoint))
            self.write_results(history)
        write_checkpoint(self.last, checkpoint, keep=self.previous)
        for file in self.files:
            Path(f"{file}{REPLACED}").unlink(missing_ok=True)

    def newest_checkpoint(self):
        """(path, checkpoint) of the newest that is not damaged, or None if there is none at all."""
        for path in filter(Path.exists, (self.last, self.previous)):
            try:
                checkpoint = read_checkpoint(path)
            except UserError as error:
                warn(f"{error}; trying the checkpoint before it")
                continue
            if path != self.last and self.last.exists():
                # else the next save would keep the damaged one, in the place of the good one
                put_aside(self.last, ".damaged")
            return path, checkpoint
        if self.in_use():
            raise UserError(f"--resume: no checkpoint in {self.folder} can be continued")
        return None

    def require_room(self, needed):
        """UserError, before the first epoch, where the disk has no room for a run's checkpoints."""
        there = sum(file.stat().st_size for file in self.files if file.exists())
        free = shutil.disk_usage(self.folder).free + there
        if free < needed:
            raise UserError(
                f"{self.folder}: a run's checkpoints take up to {needed / 1e6:,.0f} MB, and "
                f"{free / 1e6:,.0f} MB are free; use another --LOG_DIR"
            )


class NoFolder:
    """What the ranks above 0 have in the place of the RunFolder: nothing is written."""

    folder = None

    def __init__(self, complete):
        self.complete = complete

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def wait(self):
        pass

    check = wait

    def save(self, checkpoint):
        pass


def put_aside(file, suffix):
    try:
        os.replace(file, f"{file}{suffix}")
    except OSError as error:
        raise UserError(f"{file}: cannot be renamed to {file}{suffix} ({error.strerror})") from None


def checkpoint_in(path, kinds=("best", "last", "previous")):
    """The path itself; of a run folder, that of its first checkpoint of these kinds; of a folder of
    run folders, that of the run that was written last."""
    if not os.path.isdir(path):
        return path
    for below in ("", "*/"):
        found = [file for kind in kinds for file in Path(path).glob(f"{below}*_{kind}.pth")
                 if file.is_file()]  # fmt: skip
        if found:
            newest = max(found, key=lambda file: file.stat().st_mtime).parent
            return str(next(file for file in found if file.parent == newest))
    raise UserError(f"{path}: a folder without a run's checkpoints")
