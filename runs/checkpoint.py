"""Checkpoints: all that a run needs to continue bit for bit."""

import math
import re
import warnings
from collections import defaultdict

import torch
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

import dataset
from distributed import all_reduce, rank, world_size
from flags import flag_of, parse_stored
from sharded import gather_on_rank_0, map_proxies, scatter_from_rank_0
from utils import UserError, stream_of_copies

# In a continued run, the optimiser's steps were made in another process.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

PARTS = {"model_state_dict", "criterion_state_dict", "optimizer_state_dict",
         "scheduler_state_dict", "partial", "args", "history", "images"}  # fmt: skip
# Flags that do not change what is computed, and may differ when a run is continued.
FREE_ON_RESUME = {"epochs", "metrics", "workers", "cache", "gpu_id", "data_root", "LOG_DIR",
                  "quiet", "wandb", "resume", "overwrite", "checkpoint_every", "keep",
                  "shard_proxies", "skip_unreadable"}  # fmt: skip


def save(training, run_folder, finished=False):
    """Save the state after the last step; `finished`: the epoch has ended. All ranks call this,
    rank 0 writes, in a thread. UserError, and nothing is saved, if the state is not finite."""
    epoch = training.epoch
    epoch.fetch()
    run_folder.wait()  # else memory holds two copies of the state
    checkpoint = capture(training, None if finished else epoch.so_far())
    largest = all_reduce(largest_of(training), "max").item()  # synchronises: the copy is complete
    epoch.require_finite(epoch.step - 1, "state of network, proxies or optimiser after it", largest)
    run_folder.save(checkpoint)
    epoch.saved = epoch.step


def capture(training, partial=None):
    """A checkpoint; `partial`: of an epoch in progress. On rank 0 a copy on the device: training
    goes on meanwhile. With --shard-proxies all ranks call this, and rank 0 gets all proxies."""
    checkpoint = {
        "model_state_dict": training.model.state_dict(),  # differs: the script saves this alone
        "criterion_state_dict": training.criterion.state_dict(),
        "optimizer_state_dict": training.optimizer.state_dict(),
        "scheduler_state_dict": training.scheduler.state_dict(),
        "partial": partial,
        "args": vars(training.args),
        "history": training.history,
        "start": training.start,
        "images": training.images_digest,  # a run continues only with the same images
        "trained_on": training.trained_on,
    }
    if rank() == 0:
        checkpoint = copied(checkpoint)
    return map_proxies(checkpoint, gather_on_rank_0) if training.args.shard_proxies else checkpoint


def copied(checkpoint, device=None):
    """The checkpoint with its tensors copied, to `device` if they are elsewhere: those of one type
    and place by one operation."""
    groups = defaultdict(lambda: ([], []))

    def copy(x):
        if x.device == device:
            return x
        copies, originals = groups[x.device, x.dtype]
        originals.append(x)
        copies.append(torch.empty_like(x, device=device))
        return copies[-1]

    checkpoint = tree_map_only(torch.Tensor, copy, checkpoint)
    for group in groups.values():
        torch._foreach_copy_(*group)
    return checkpoint


def largest_of(training):
    """The largest entry of weights, proxies and moments; inf unless all are finite."""
    modules, moments = (training.model, training.criterion), training.optimizer.state.values()
    tensors = [x for state in (*(m.state_dict() for m in modules), *moments)
               for x in state.values() if torch.is_tensor(x) and x.is_floating_point() and x.ndim]
    return get_total_norm(tensors, math.inf).nan_to_num(math.inf, math.inf)


def on_host(checkpoint):
    """The checkpoint with its tensors on the CPU."""
    weight = next(iter(checkpoint["model_state_dict"].values()))
    with torch.cuda.device_of(weight), torch.cuda.stream(stream_of_copies(weight.device)):
        return copied(checkpoint, torch.device("cpu"))


def bytes_needed(training):
    """The most that a run's checkpoints take on the disk: best, last, previous, and a new one."""
    network = sum(tensor.nbytes for tensor in training.model.state_dict().values())
    proxies = sum(tensor.nbytes for tensor in training.criterion.state_dict().values())
    proxies *= world_size() if training.args.shard_proxies else 1
    trained = sum(p.nbytes for p in training.model.parameters()) + proxies
    return network + 3 * (network + proxies + 2 * trained)  # an optimiser has up to two moments


def restore(training, checkpoint, path):
    """Load a checkpoint into `training`."""
    if checkpoint["images"] != training.images_digest:
        raise UserError(f"{path}: the run was started with other images than those in --data-root "
                        f"{training.args.data_root}: put back what was removed or renamed, take "
                        f"away what was added, or start a new run with --weights {path}")
    try:
        if training.args.shard_proxies:
            checkpoint = map_proxies(checkpoint, scatter_from_rank_0)
        training.model.load_state_dict(checkpoint["model_state_dict"])
        # older checkpoints have a library's loss as the `loss` of a wrapper
        known = training.criterion.state_dict()
        proxies = {name if name in known else re.sub(r"(^|\.)loss\.", r"\1", name): x
                   for name, x in checkpoint["criterion_state_dict"].items()}  # fmt: skip
        training.criterion.load_state_dict(proxies)
        training.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        training.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        training.history = checkpoint["history"]
        training.start = checkpoint.get("start")  # older runs have none, nor what follows
        training.trained_on = checkpoint.get("trained_on")
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its state is not that of this run ({error})") from error


def flags_to_continue_with(parser, given, flags, path):
    """The flags the run was started with, updated by those given; UserError if one is not free."""
    stored = parse_stored(parser, flags, path)
    for name, value in given.items():
        moved = name == "dataset" and dataset.title(value) == dataset.title(stored.dataset)
        if name not in FREE_ON_RESUME and getattr(stored, name) != value and not moved:
            raise UserError(f"{flag_of(name)} {value}: the run of {path} was started with "
                            f"{getattr(stored, name)}; leave the flag out, or start another run")
        setattr(stored, name, value)
    return stored


def require_parts(checkpoint, path):
    """UserError if a run cannot be continued from this checkpoint."""
    if lacking := ", ".join(sorted(PARTS - checkpoint.keys())):
        raise UserError(f"--resume {path}: this checkpoint cannot be continued: it lacks {lacking},"
                        " as published ones, best ones alone and those of earlier versions do; "
                        f"evaluate.py takes it, and --weights {path} starts a new run from it")


def epoch_of(checkpoint):
    """The last epoch, from 0, in which the network was trained; None if the checkpoint has none."""
    history = checkpoint.get("history")
    if history is None:
        return None
    return len(history) if checkpoint.get("partial") else len(history) - 1
