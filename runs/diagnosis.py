"""evaluate.py --diagnose of a checkpoint: its training images and its proxies."""

from argparse import Namespace
from functools import partial

import dataset
from dataset.check import load_split
from losses import class_proxies
from recipe import build_criterion
from retrieval.diagnose import describe_diagnosis, diagnose
from retrieval.picture import draw_diagnosis
from retrieval.probes import read_factors
from runs.checks import hold_out
from utils import UserError, say


def diagnose_checkpoint(args, checkpoint, model, images, loading):
    """(diagnosis, lines, draw) of a network; images: the test images."""
    factors = read_factors(args.factors) if args.factors else None
    both = {"train": trained_images(args, checkpoint), "test": images}
    proxies = stored_proxies(args.checkpoint, checkpoint, len(both["train"].classes))
    found = diagnose(model, both, loading, args.batch_size, proxies, factors)
    return found, describe_diagnosis(found), partial(draw_diagnosis, found)


def trained_images(args, checkpoint):
    """The ImageSet that a network was trained on, from the data set of `args`."""
    theirs = checkpoint.get("args", {})
    trained, title = theirs.get("dataset", args.dataset), dataset.title(args.dataset)
    if theirs.get("train_on") == "all" or dataset.title(trained) != title:
        raise UserError("--diagnose: compares training classes with unseen ones, and this network "
                        f"was trained on all classes of {title}, or on none")  # fmt: skip
    images = load_split(args, "train")
    return hold_out(Namespace(**theirs), images)["train"] if theirs.get("val_classes") else images


def stored_proxies(path, checkpoint, num_classes):
    """The proxies [C, d] of the training classes; None, with a printed line, if there are none."""
    where = f"{path}: entropy and slope are left out:"
    if "criterion_state_dict" not in checkpoint:
        say(f"{where} they need the proxies, which *_last.pth has")
        return None
    flags = Namespace(**{**checkpoint["args"], "shard_proxies": False})
    criterion = build_criterion(flags, num_classes)
    try:
        criterion.load_state_dict(checkpoint["criterion_state_dict"])
        return class_proxies(getattr(criterion, "metric_loss", criterion)).detach()
    except ValueError:
        say(f"{where} --loss {flags.loss} has no proxies")
    except RuntimeError:
        say(f"{where} its proxies are not those of the {num_classes:,} training classes here")
