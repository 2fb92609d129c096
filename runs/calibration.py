"""evaluate.py --calibrate of a checkpoint: on which images it works, and what it writes."""

from argparse import Namespace
from functools import partial
from pathlib import Path

from dataset.check import load_split
from loading.loader import batches, test_loader
from retrieval.calibrate import calibrate, check_pairs, describe_calibration
from retrieval.embed import embed
from retrieval.picture import draw_calibration
from runs.checkpoint import epoch_of
from runs.checks import hold_out
from runs.folder import CALIBRATION
from runs.sources import data_of
from storage import write_json
from utils import UserError, progress

FMR = 0.01


def images_to_calibrate_on(args, checkpoint, test):
    """{"calibration": the ImageSet of a run's held-out classes}; {"test": test} for other runs; {}
    without --calibrate."""
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
    check_pairs(*found.values(), args.fmr or FMR)
    return found


def calibrate_checkpoint(args, checkpoint, model, images, loading, tested, counts):
    """(calibration, lines, draw) of a network; writes calibration.json beside the checkpoint.

    images: from images_to_calibrate_on; tested: embeddings of the test images; counts: of both,
    from dataset.images.counts_of.
    """
    ((split, unseen),) = images.items()
    on_test = split == "test"
    if not on_test:
        loader = test_loader(unseen, args.batch_size, loading)
        loaded = progress(batches(loader, loading.device), len(loader), "embedding")
        tested, _ = embed(model, loaded)
    found, drawn = calibrate(tested, unseen.labels, args.fmr or FMR, unseen.queries)
    found["computed_on"] = {
        "dataset": args.dataset, "data_root": args.data_root,
        "split": "test images" if on_test else "held-out classes", **counts[split],
        "checkpoint": Path(args.checkpoint).name, "epoch": epoch_of(checkpoint),
    }  # fmt: skip
    file = Path(args.checkpoint).with_name(CALIBRATION)
    write_json(file, found)
    print(f"{file}: the threshold, for programs")
    lines = describe_calibration(found)
    if on_test:
        lines.append("calibration and test use the same images, so the threshold is optimistic; "
                     "for a run with --val-classes it is computed on the held-out classes")
    return found, lines, partial(draw_calibration, found, drawn)
