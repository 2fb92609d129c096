"""The flags and networks of the checkpoints that evaluate.py is given."""

from pathlib import Path

import dataset
from flags import given_flags, parse_stored
from net import network_from, state_and_flags
from runs.folder import checkpoint_in
from storage import read_checkpoint
from utils import UserError, say

NOT_OF_THE_RUN = {"checkpoint", "resume", "gpu_id", "workers", "remark", "version", "help"}


def resolve_flags(parser, argv, outputs):
    """[(flags, checkpoint)] of the named checkpoints; UserError unless all were trained on one data
    set. outputs: flags that a checkpoint cannot set."""
    args, given = given_flags(parser, argv)
    if bool(args.checkpoint) == bool(args.resume):
        parser.error("name one checkpoint or run folder, or several without --resume")
    sources, trained = [], {}
    for path in map(checkpoint_in, args.checkpoint or [args.resume]):
        flags, checkpoint = read_source(parser, given, path, outputs)
        sources.append((flags, checkpoint))
        if "dataset" in checkpoint.get("args", {}):
            trained.setdefault(data_of(checkpoint["args"]), path)
    if len(trained) > 1:
        (first, path), (second, other), *_ = trained.items()
        raise UserError(f"{path} was trained on {first}, {other} on {second}; evaluate together "
                        "what was trained on one data set")  # fmt: skip
    tested = data_of(vars(sources[0][0]))
    for images, path in trained.items():
        if images != tested:
            say(f"{path}: trained on {images}, tested on {tested}")
    return sources


def read_source(parser, given, path, outputs):
    """(flags, checkpoint). A flag comes from the command line, else from the checkpoint's flags,
    else from the shapes of its weights, else from the default."""
    checkpoint = read_checkpoint(path)
    _, theirs = state_and_flags(checkpoint, path)
    chosen = {"dataset", "data_root", "save_model"} & given.keys()
    if theirs.get("train_on") == "all" and not chosen:
        raise UserError(f"{path}: trained on all classes of {theirs['dataset']}, so none are left "
                        "to test it on; name another data set with --dataset, or, to export "
                        "embeddings, its own with --data-root; --save-model needs no images")
    unused = NOT_OF_THE_RUN | {*outputs}
    if given.get("dataset", theirs.get("dataset")) != theirs.get("dataset"):
        unused |= {"ks", "data_root", "skip_unreadable"}
        if not dataset.own_flag(given["dataset"]):
            unused.add("background")
    kept = vars(parser.parse_args([])).keys() - unused
    stored = {flag: value for flag, value in theirs.items() if flag in kept}
    args = parse_stored(parser, stored, path)
    vars(args).update(given, checkpoint=path)
    dataset.refuse_own_flags(args)
    return args, checkpoint


def data_of(flags):
    """The data set's name; users' own images also have their path."""
    own = dataset.own_flag(flags["dataset"])
    place = f" ({Path(flags[own]).resolve()})" if own in flags else ""
    return f"{dataset.title(flags['dataset'])}{place}"


def network_of(flags, checkpoint):
    """The checkpoint's network, as its flags say, in eval mode."""
    model = network_from(
        checkpoint, flags.checkpoint, model=flags.model, embedding_size=flags.embedding_size,
        l2_norm=flags.l2_norm, precision=flags.precision,
    )  # fmt: skip
    model.num_features(flags.image_size)  # UserError if the network cannot take this size
    return model
