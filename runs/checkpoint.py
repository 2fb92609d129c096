"""What a checkpoint holds: all that a run needs to go on, bit for bit."""

import warnings

import torch

from flags import parse_stored
from utils import UserError

# The optimiser of a continued run has made its steps in another process.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

PARTS = {"model_state_dict", "criterion_state_dict", "optimizer_state_dict",
         "scheduler_state_dict", "partial", "args", "history", "images"}  # fmt: skip
# Flags that may differ when a run is continued: they do not change what is computed.
FREE_ON_RESUME = {"epochs", "workers", "cache", "gpu_id", "data_root", "LOG_DIR", "wandb",
                  "resume", "overwrite", "checkpoint_every"}  # fmt: skip


def capture(training, partial=None):
    """A checkpoint: of a finished epoch, or with `partial` of the one that it has begun."""
    require_finite(training)
    return {
        "model_state_dict": training.model.state_dict(),  # differs: the script saves this alone
        "criterion_state_dict": training.criterion.state_dict(),
        "optimizer_state_dict": training.optimizer.state_dict(),
        "scheduler_state_dict": training.scheduler.state_dict(),
        "partial": partial,
        "args": vars(training.args),
        "history": training.history,
        "images": training.images,  # which they are: with other ones it is another run
    }


def require_finite(training):
    """An update can overflow where loss and gradient did not; that is not to be saved."""
    modules, moments = (training.model, training.criterion), training.optimizer.state.values()
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    tensors += [value for state in moments for value in state.values() if torch.is_tensor(value)]
    finite = [tensor.isfinite().all().to(training.device) for tensor in tensors]
    if not torch.stack(finite).all():  # one wait for the device
        raise UserError(
            "the weights or the optimiser's state are no longer finite; nothing of this was "
            "saved, and the last checkpoint is good. A smaller --lr or --weight-decay may help"
        )


def restore(training, checkpoint, path):
    """Put a checkpoint's state into `training`."""
    if checkpoint["images"] != training.images:
        raise UserError(
            f"{path}: the run was started with other images than those in --data-root "
            f"{training.args.data_root}, so it cannot be continued with them"
        )
    try:
        training.model.load_state_dict(checkpoint["model_state_dict"])
        training.criterion.load_state_dict(checkpoint["criterion_state_dict"])
        training.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        training.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        training.history = checkpoint["history"]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its state is not that of this run ({error})") from error


def flags_to_continue_with(parser, given, checkpoint, path):
    """The flags that the run was started with, and, of those given now, the free ones."""
    if PARTS - checkpoint.keys():
        raise UserError(
            f"--resume {path}: this checkpoint cannot be continued: it lacks "
            f"{', '.join(sorted(PARTS - checkpoint.keys()))}, as published ones and those of "
            f"earlier versions do; evaluate.py takes it, and --weights {path} starts a new run "
            "from its network"
        )
    try:
        progress_of(checkpoint)
        [result["R@1"] + 0 for result in checkpoint["history"]]
        stored = parse_stored(parser, checkpoint["args"], path)
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{path}: its partial, history or args are not a run's") from error
    for name, value in given.items():
        if name not in FREE_ON_RESUME and getattr(stored, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run of {path} was started with "
                f"{getattr(stored, name)}; leave the flag out, or start another run"
            )
        setattr(stored, name, value)
    return stored


def progress_of(checkpoint):
    """Orders the checkpoints of a run."""
    partial = checkpoint["partial"]
    return len(checkpoint["history"]), partial["step"] + 0 if partial else 0
