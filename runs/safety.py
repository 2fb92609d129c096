"""What keeps a run safe while an epoch trains."""

import shlex
import time

import torch
import torch.distributed as dist

from dataset.files import UnreadableImage
from distributed import all_reduce_max, barrier, world_size
from runs.checkpoint import save
from utils import Interrupted, UserError, out_of_memory

FETCH_SECONDS = 1  # between reads of the losses; each read waits for the device
EVALUATION_SECONDS = 5  # a kill may cost as much beside the steps since the last save


def after_step(training, run_folder, stop):
    """Signals, failed saves, checkpoints in mid-epoch, and a look at the losses now and then."""
    epoch, every = training.epoch, training.args.checkpoint_every
    late = time.perf_counter() > epoch.fetched + FETCH_SECONDS
    signal, late = of_all_ranks(epoch, stop.signal or 0, late)
    if signal:
        raise Interrupted(signal)
    run_folder.check()
    if every and epoch.step % every == 0:
        save(training, run_folder)
    elif late:
        epoch.fetch()


def of_all_ranks(epoch, *numbers):
    """The greatest of all ranks' numbers, of several ranks those of the step before: so none waits
    for another."""
    if world_size() == 1:
        return numbers
    x = torch.tensor(numbers, dtype=torch.long)
    before, epoch.asked = epoch.asked, (x, dist.all_reduce(x, dist.ReduceOp.MAX, async_op=True))
    if not before:
        return 0, 0
    x, work = before
    work.wait()
    return x.tolist()


def before_evaluation(training, run_folder):
    """Save what is not saved, unless evaluating took less than EVALUATION_SECONDS last time."""
    epoch, history = training.epoch, training.history
    long = not history or history[-1]["seconds_eval"] > EVALUATION_SECONDS
    if epoch.step > epoch.saved and all_reduce_max(long):
        save(training, run_folder)


def early_end(error, training, run_folder):
    """Save what can be saved after `error` (a signal, a damaged image, a full GPU); returns what to
    raise, which says what is saved and how to continue."""
    epoch = training.epoch
    interrupted = isinstance(error, Interrupted)
    gpu_full = isinstance(error, torch.OutOfMemoryError)
    if isinstance(error, UnreadableImage):
        training.trained_on = None  # a good file in its place is another: all are hashed again
    # a damaged image is met by one rank alone, and a save takes all of them
    if epoch.step > epoch.saved and (interrupted or world_size() == 1 and not gpu_full):
        save(training, run_folder)
    go_on = "continue with --resume"
    if run_folder.folder:
        go_on = f"continue with: python train.py --resume {shlex.quote(str(run_folder.folder))}"
    if interrupted:
        run_folder.wait()
        barrier()  # torchrun ends all ranks when one ends: not before rank 0 has saved
        return Interrupted(error.number, go_on)
    saved = "nothing was saved yet"
    if training.history or epoch.saved:
        all_saved = epoch.step == epoch.saved
        saved = "what was trained is saved" if all_saved else "the last checkpoint is good"
    if gpu_full:
        first = "--cache ram, " if training.args.cache == "gpu" else ""
        return UserError(f"{out_of_memory(error, first)}; {saved}")
    return type(error)(f"{error}; {saved}; with a good file in its place, {go_on}")
