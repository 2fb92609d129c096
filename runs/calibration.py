"""evaluate.py --calibrate of a checkpoint: on which images, and where the calibration goes."""

from argparse import Namespace
from functools import partial
from pathlib import Path

from dataset.check import load_split
from distributed import world_size
from loading.loader import batches, test_loader
from retrieval.calibrate import calibrate, check_pairs, describe_calibration
from retrieval.embed import embed
from retrieval.picture import draw_calibration
from runs.checkpoint import epoch_of
from runs.checks import hold_out
from runs.diagnosis import show_finding
from runs.folder import CALIBRATION
from runs.sources import data_of
from storage import write_json
from utils import UserError, progress

FMR = 0.01


def check_calibration(args, sources):
    if args.fmr is not None and not args.calibrate:
        raise UserError("--fmr: needs --calibrate, whose rate of false matches it is")
    if args.calibrate and len(sources) > 1:
        raise UserError("--calibrate: is of one network; name one checkpoint")
    if args.calibrate and world_size() > 1:
        raise UserError("--calibrate: needs one process; leave torchrun out")


def images_to_calibrate_on(args, checkpoint, test):
    """{"calibration": ImageSet} of the classes that a run held out; of any other run {"test": the
    `test` images}; {} without --calibrate."""
    if not args.calibrate:
        return {}
    theirs, found = checkpoint.get("args", {}), {"test": test}
    if "dataset" in theirs and data_of(theirs) == data_of(vars(args)):
        if theirs.get("train_on") == "all":
            raise UserError(f"--calibrate: {args.checkpoint} was trained on all classes of "
                            f"{data_of(theirs)}; name other images with --dataset or --data-root")
        if theirs.get("val_classes"):
            trained = load_split(args, "train")
            found = {"calibration": hold_out(Namespace(**theirs), trained)["val"]}
    for images in found.values():
        check_pairs(images, args.fmr or FMR)
    return found


def calibrate_checkpoint(args, checkpoint, model, images, loading, tested, facts):
    """(calibration, counts to draw) of a network. images: of `images_to_calibrate_on`; tested: the
    embeddings of the test images; facts: of runs.start.facts_of."""
    ((split, unseen),) = images.items()
    if split != "test":
        loader = test_loader(unseen, args.batch_size, loading)
        loaded = progress(batches(loader, loading.device), len(loader), "embedding")
        tested, _ = embed(model, loaded)
    found, drawn = calibrate(tested, unseen.labels, args.fmr or FMR, unseen.queries)
    found["computed_on"] = {
        "dataset": args.dataset, "data_root": args.data_root,
        "split": "test images" if split == "test" else "held-out classes",
        **facts["images"][split],
        "checkpoint": Path(args.checkpoint).name, "epoch": epoch_of(checkpoint),
    }  # fmt: skip
    return found, drawn


def write_calibration(path, calibration, drawn, page=None):
    """Print a checkpoint's calibration, draw it, and keep it in calibration.json beside it."""
    file, on = Path(path).with_name(CALIBRATION), calibration["computed_on"]
    write_json(file, calibration)
    lines = describe_calibration(calibration)
    if on["split"] == "test images":
        lines.append("calibration and test are the same images, so the threshold is optimistic; "
                     "of a run with --val-classes it is computed on the held-out classes")
    draw = partial(draw_calibration, calibration, drawn)
    show_finding("Calibration", path, on["epoch"], lines, draw, page)
    print(f"{file}: the threshold, for search.py")
