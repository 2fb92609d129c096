"""evaluate.py --diagnose of a checkpoint: what it was trained on, and where the diagnosis goes."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import dataset
from dataset.check import load_split
from distributed import world_size
from losses import class_proxies
from recipe import build_criterion
from retrieval.diagnose import describe_diagnosis, diagnose
from retrieval.page import add_to_page
from retrieval.picture import draw_diagnosis
from retrieval.probes import read_factors
from runs.checks import hold_out
from storage import write_atomically
from utils import UserError, say


def check_diagnosis(args, sources):
    if args.diagnose and len(sources) > 1:
        raise UserError("--diagnose: is of one network; name one checkpoint")
    if args.diagnose and world_size() > 1:
        raise UserError("--diagnose: needs one process; leave torchrun out")
    if args.factors and not args.diagnose:
        raise UserError("--factors: needs --diagnose, which probes them")


def diagnose_checkpoint(args, checkpoint, model, images, loading):
    """`diagnose` a network; images: those of the test."""
    factors = read_factors(args.factors) if args.factors else None
    both = {"train": trained_images(args, checkpoint), "test": images}
    proxies = stored_proxies(args.checkpoint, checkpoint, len(both["train"].classes))
    return diagnose(model, both, loading, args.batch_size, proxies, factors)


def trained_images(args, checkpoint):
    """The ImageSet of the classes that a network was trained on, in the data set of `args`."""
    theirs = checkpoint.get("args", {})
    trained, title = theirs.get("dataset", args.dataset), dataset.title(args.dataset)
    if theirs.get("train_on") == "all" or dataset.title(trained) != title:
        raise UserError("--diagnose: compares training classes with unseen ones, and this network "
                        f"was trained on all classes of {title}, or on none")  # fmt: skip
    images = load_split(args, "train")
    return hold_out(Namespace(**theirs), images)["train"] if theirs.get("val_classes") else images


def stored_proxies(path, checkpoint, num_classes):
    """Proxies [C, d] of the training classes; None, and says so, where there are none."""
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


def write_diagnosis(path, epoch, diagnosis, page=None):
    """Print a checkpoint's diagnosis, and draw it."""
    lines = describe_diagnosis(diagnosis)
    show_finding("Diagnosis", path, epoch, lines, partial(draw_diagnosis, diagnosis), page)


def show_finding(what, path, epoch, lines, draw, page=None):
    """Print what was found of a checkpoint, and write its picture, draw(title): beside the
    checkpoint, on the page of its run, and on `page`."""
    path = Path(path)
    title = f"{what} of {path.name}" + ("" if epoch is None else f", epoch {epoch}")
    picture = draw(title=title)
    print("\n".join(lines))
    drawn = path.with_name(f"{path.stem}_{what.lower()}.png")
    write_atomically(drawn, picture)
    print(f"{drawn}: the same, drawn")
    pages = [path.with_name("page.html"), *([page] if page else [])]
    for file in filter(Path.exists, {Path(each).resolve() for each in pages}):
        write_atomically(file, add_to_page(file.read_bytes(), title, lines, picture))
