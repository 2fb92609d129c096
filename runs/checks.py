"""The images of a run, and errors where flags, losses and images do not fit each other."""

from functools import partial

import dataset
from dataset.check import leave_out_unreadable
from distributed import rank_0_first, world_size
from losses import PROXY_LOSSES
from retrieval.evaluate import describe
from runs.tracking import wandb_mode
from utils import UserError, say, warn


def check_flags(args):
    """UserError or warning where flags do not go together, or not with this machine."""
    dataset.refuse_own_flags(args)
    wandb_mode(args.wandb)  # refuses an account that is not there
    for name in ("fold", "patience"):
        if getattr(args, name) is not None and not args.val_classes:
            raise UserError(f"--{name}: needs --val-classes, the share of classes to choose by")
    if args.val_classes and args.train_on == "all":
        raise UserError("--train-on all: leaves no class for --val-classes; leave one of them out")
    if args.weights == "none" and (args.warm or args.bn_freeze):
        warn("--weights none: random weights learn little while --warm and --bn-freeze hold them "
             "still; use --warm 0 --bn-freeze 0")  # fmt: skip
    has_proxies = args.loss in PROXY_LOSSES
    if args.shard_proxies and args.loss != "Proxy_Anchor":
        raise UserError(f"--shard-proxies: --loss {args.loss} needs all of its parameters in each "
                        "process; use --loss Proxy_Anchor, or leave the flag out")  # fmt: skip
    if args.disent and not has_proxies:
        raise UserError(f"--disent True: --loss {args.loss} compares pairs of images and has no "
                        f"proxies, which DDML's terms need; choose from {', '.join(PROXY_LOSSES)}")
    weights = args.al + args.be + args.gam
    if args.disent and not weights:
        warn("--disent True, --al, --be and --gam of 0: trains the plain loss and an unused head")
    if not args.disent and weights:
        warn("--al, --be and --gam weigh nothing without --disent True: training the plain loss")
    if not has_proxies and not args.IPC:
        warn(f"--loss {args.loss} learns from pairs of one class; --IPC N puts some in each batch")


def load_images(args, left_out):
    """Returns ({split: ImageSet}, left_out as in leave_out_unreadable). The splits are train and
    test, with --val-classes train and val, with --train-on all train alone."""
    with rank_0_first():
        dataset.prepare(args.dataset, args.data_root)
    name, splits = dataset.title(args.dataset), dataset.read(args.dataset, args.data_root)
    looked = {"train": splits.get("train", ())} if args.val_classes else splits
    looked, left_out = leave_out_unreadable(args, looked, left_out)
    splits |= looked
    image_set = partial(dataset.image_set, args.dataset, splits, background=args.background)
    images = {"train": image_set(args.train_on)}
    if args.val_classes:  # test images are not read before the end
        images = hold_out(args, images["train"])
        if not (splits.get("test") or splits.get("query")):
            warn(f"{name}: there are no test images, which the end of this run will evaluate")
    elif args.train_on == "train":
        images["test"] = image_set("test")
    check_batches(args, images["train"], name)
    for split, each in images.items():
        say(describe(f"{name} {args.train_on if split == 'train' else split}", each))
    return images, left_out


def check_batches(args, images, name):
    """UserError where --batch-size and --IPC make no batch of the training `images` of `name`."""
    if args.batch_size > len(images):  # differs: the script trains on nothing, in silence
        raise UserError(f"--batch-size {args.batch_size}: larger than the {len(images)} training "
                        f"images of {name}; use {len(images)} or fewer")  # fmt: skip
    if args.batch_size < world_size():
        raise UserError(f"--batch-size {args.batch_size}: fewer than the {world_size()} processes "
                        "that share a batch")  # fmt: skip
    if args.IPC:
        classes, rest = divmod(args.batch_size, args.IPC)
        if rest or classes > len(images.classes):
            raise UserError(f"--IPC {args.IPC}: a batch of --batch-size {args.batch_size} cannot "
                            f"hold {args.IPC} images of each of a whole number of the "
                            f"{len(images.classes)} classes")  # fmt: skip


def hold_out(args, images):
    """{"train", "val"} of the training images, by --val-classes and --fold."""
    count, share = len(images.classes), args.val_classes
    try:
        train, val = images.hold_out(share, args.fold)
        held = len(val.classes)
    except ValueError:  # there is no such fold
        held = round(share * count)
    if not 2 <= held <= count - 2:
        raise UserError(f"--val-classes {share}: of {count} classes, {held} would be held out and "
                        f"{count - held} train; both take at least two")  # fmt: skip
    if (args.fold + 1) * share > 1 + 1e-9:
        raise UserError(f"--fold {args.fold}: --val-classes {share} makes folds 0 to "
                        f"{int(1 / share + 1e-9) - 1}")  # fmt: skip
    return {"train": train, "val": val}
