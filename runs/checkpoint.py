"""What a checkpoint holds: all that a run needs to go on, bit for bit."""

import warnings

import torch
from torch.utils._pytree import tree_map_only

import dataset
from distributed import most, part_from_first, rank, to_first, world
from flags import flag_of, parse_stored
from utils import UserError, stream_of_copies

# The optimiser of a continued run has made its steps in another process.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

PARTS = {"model_state_dict", "criterion_state_dict", "optimizer_state_dict",
         "scheduler_state_dict", "partial", "args", "history", "images"}  # fmt: skip
# Flags that may differ when a run is continued: they do not change what is computed.
FREE_ON_RESUME = {"epochs", "metrics", "workers", "cache", "gpu_id", "data_root", "LOG_DIR",
                  "quiet", "wandb", "resume", "overwrite", "checkpoint_every",
                  "shard_proxies"}  # fmt: skip


def capture(training, partial=None):
    """A checkpoint: of a finished epoch, or with `partial` of the one that it has begun; in the
    first process, which writes it, a copy on the device, so that training can go on. Where the
    proxies are in parts all processes call this, and the first has the whole."""
    checkpoint = {
        "model_state_dict": training.model.state_dict(),  # differs: the script saves this alone
        "criterion_state_dict": training.criterion.state_dict(),
        "optimizer_state_dict": training.optimizer.state_dict(),
        "scheduler_state_dict": training.scheduler.state_dict(),
        "partial": partial,
        "args": vars(training.args),
        "history": training.history,
        "images": training.images,  # which they are: with other ones it is another run
    }
    if rank() == 0:
        checkpoint = tree_map_only(torch.Tensor, torch.clone, checkpoint)
    require_finite(training)  # waits for the device, and so for the copies
    return by_class(checkpoint, to_first) if training.args.shard_proxies else checkpoint


def on_host(checkpoint):
    """A captured checkpoint in the host's memory."""
    weight = next(iter(checkpoint["model_state_dict"].values()))
    with torch.cuda.device_of(weight), torch.cuda.stream(stream_of_copies(weight.device)):
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, checkpoint)


def by_class(checkpoint, function):
    """The checkpoint, with function(x) for each x that has a row for each class: the proxies and
    their moments."""
    optimizer = checkpoint["optimizer_state_dict"]
    proxies = set(optimizer["param_groups"][-1]["params"])
    state = dict(optimizer["state"])
    for number in proxies & state.keys():
        state[number] = {name: function(x) if x.ndim else x for name, x in state[number].items()}
    criterion = {name: function(x) for name, x in checkpoint["criterion_state_dict"].items()}
    optimizer = {**optimizer, "state": state}
    return {**checkpoint, "criterion_state_dict": criterion, "optimizer_state_dict": optimizer}


def network_alone(checkpoint):
    """Of a checkpoint, what evaluates: the network, and what rebuilds it."""
    return {part: checkpoint[part] for part in ("model_state_dict", "args", "history", "images")}


def bytes_needed(training):
    """What a run's checkpoints take on the disk at most: best, last, the one before, the next."""
    network = sum(tensor.nbytes for tensor in training.model.state_dict().values())
    proxies = sum(tensor.nbytes for tensor in training.criterion.state_dict().values())
    proxies *= world() if training.args.shard_proxies else 1
    trained = sum(p.nbytes for p in training.model.parameters()) + proxies
    return network + 3 * (network + proxies + 2 * trained)  # an optimiser has up to two moments


def require_finite(training):
    """An update can overflow where loss and gradient did not; that is not to be saved."""
    modules, moments = (training.model, training.criterion), training.optimizer.state.values()
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    tensors += [value for state in moments for value in state.values() if torch.is_tensor(value)]
    finite = [tensor.isfinite().all().to(training.device) for tensor in tensors]
    if most(not torch.stack(finite).all()):  # one wait for the device
        raise UserError(
            "the weights or the optimiser's state are no longer finite; nothing of this was "
            "saved, and the last checkpoint is good. A smaller --lr or --weight-decay may help"
        )


def restore(training, checkpoint, path):
    """Put a checkpoint's state into `training`."""
    if checkpoint["images"] != training.images:
        raise UserError(
            f"{path}: the run was started with other images than those in --data-root "
            f"{training.args.data_root}: put back what was removed or renamed, take away what was "
            f"added, or start a new run from its network with --weights {path}"
        )
    try:
        if training.args.shard_proxies:
            checkpoint = by_class(checkpoint, part_from_first)
        training.model.load_state_dict(checkpoint["model_state_dict"])
        training.criterion.load_state_dict(checkpoint["criterion_state_dict"])
        training.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        training.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        training.history = checkpoint["history"]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its state is not that of this run ({error})") from error


def flags_to_continue_with(parser, given, flags, path):
    """The flags that the run was started with, and, of those given now, the free ones."""
    try:
        stored = parse_stored(parser, flags, path)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path}: its args are not a run's") from error
    for name, value in given.items():
        moved = name == "dataset" and dataset.title(value) == dataset.title(stored.dataset)
        if name not in FREE_ON_RESUME and getattr(stored, name) != value and not moved:
            raise UserError(
                f"{flag_of(name)} {value}: the run of {path} was started with "
                f"{getattr(stored, name)}; leave the flag out, or start another run"
            )
        setattr(stored, name, value)
    return stored


def require_parts(checkpoint, path, parts):
    """UserError for what is no checkpoint that a run can go on from."""
    lacking = ", ".join(sorted(parts - checkpoint.keys()))
    if lacking:
        raise UserError(
            f"--resume {path}: this checkpoint cannot be continued: it lacks {lacking}, as "
            "published ones, best ones alone and those of earlier versions do; evaluate.py takes "
            f"it, and --weights {path} starts a new run from its network"
        )
    try:
        progress_of(checkpoint)
        [result["epoch"] + result.get("R@1", 0) for result in checkpoint["history"]]
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{path}: its partial or history are not a run's") from error


def progress_of(checkpoint):
    """(finished epochs, steps of the one begun): orders the checkpoints of a run."""
    partial = checkpoint.get("partial")
    return len(checkpoint["history"]), partial["step"] + 0 if partial else 0


def epoch_of(checkpoint):
    """The epoch, from 0, in which a checkpoint's network was last trained; None if it does not
    say."""
    history = checkpoint.get("history")
    return len(history) - (not checkpoint.get("partial")) if isinstance(history, list) else None
