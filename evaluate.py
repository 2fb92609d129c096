"""Recall@K of a checkpoint, or of a run folder's best one: python evaluate.py CHECKPOINT"""

from pathlib import Path

import dataset
from dataset.loader import batches, test_loader
from flags import Parser, add_data_flags, add_network_flags, given_flags, parse_stored
from net import CHOICES, create_model, model_name, network_of
from net.weights import load_strictly
from retrieval.embed import embed
from retrieval.metrics import recall_at_k
from runs.checkpoint import epoch_of
from runs.folder import checkpoint_in
from storage import read_checkpoint, write_json
from utils import UserError, choose_device, plural, progress, run, warn


def build_parser():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="train.py's or a published one, or a run folder")
    add("--resume", metavar="CHECKPOINT", help="the same, as the published script has it")
    add("--remark", default="", metavar="TEXT", help="printed with the result")
    add("--json", metavar="PATH", help="also write the recalls, in per cent, to this file")
    add_data_flags(parser, dataset.canonical_name, dataset.CHOICES, batch_size=150)
    add_network_flags(parser, model_name, CHOICES)
    return parser


def evaluate(model, loader, device, ks, queries=None, watch=iter):
    """{k: Recall@K} of all images among each other, or of the first `queries` among the rest.
    Leaves `model` in eval mode; `watch` goes around the batches."""
    tested = progress(watch(batches(loader, device)), len(loader), "evaluating")
    embeddings, labels = embed(model, tested)
    if not embeddings.isfinite().all():
        raise UserError("the network's embeddings are not all finite: its weights are of no use")
    if queries is None:
        return recall_at_k(embeddings, labels, ks)
    return recall_at_k(
        embeddings[:queries], labels[:queries], ks, embeddings[queries:], labels[queries:]
    )


def describe(name, images):
    """One line about a split, with the R@1 that random embeddings would have."""
    labels, q = images.labels, images.queries
    itself = int(q is None)  # a match that does not count
    gallery = labels[q or 0 :]
    matches = gallery.bincount(minlength=len(images.classes))[labels[:q]] - itself
    chance = matches.double().mean() / max(len(gallery) - itself, 1)
    found = f"{plural(len(images), 'image')} of {plural(len(images.classes), 'class')}"
    if q is not None:
        found += f", {plural(q, 'query')} against a gallery of {len(gallery):,}"
    return f"{name}: {found} (R@1 by chance: {100 * chance:.1f} %)"


def resolve_flags(parser, argv):
    """Flags, and the checkpoint. A flag comes from the command line, else from the checkpoint's own
    flags, else from the shapes of its weights, else from the default."""
    args, given = given_flags(parser, argv)
    if bool(args.checkpoint) == bool(args.resume):
        parser.error("name one checkpoint or run folder")
    path = checkpoint_in(args.checkpoint or args.resume, ("best", "last", "previous"))
    checkpoint = read_checkpoint(path)
    _, theirs = network_of(checkpoint, path)
    kept = vars(args).keys() - {"checkpoint", "resume", "json", "gpu_id", "workers", "remark"}
    if theirs.get("train_on") == "all" and not {"dataset", "data_root"} & given.keys():
        raise UserError(f"{path}: trained on all classes of {theirs['dataset']}, so that none are "
                        "left to test it on; name another data set with --dataset")  # fmt: skip
    if given.get("dataset", theirs.get("dataset")) != theirs.get("dataset"):
        kept -= {"ks", "data_root"}
    stored = {flag: value for flag, value in theirs.items() if flag in kept}
    resolved = parse_stored(parser, stored, path)
    for flag, value in given.items():
        setattr(resolved, flag, value)
    resolved.checkpoint = path
    if "dataset" not in theirs:
        return resolved, checkpoint
    trained, tested = images_of(theirs), images_of(vars(resolved))
    if trained != tested:
        print(f"{path}: trained on {trained}, tested on {tested}")
    elif theirs.get("train_on") == "all":
        warn(f"{path} was trained on all classes of {resolved.dataset}: its recall here says "
             "nothing about unseen ones")  # fmt: skip
    return resolved, checkpoint


def images_of(flags):
    """What says which images these are: a data set's name, and of one's own, its path."""
    own = getattr(dataset.module_of(flags["dataset"]), "OWN", None)
    place = f" ({Path(flags[own]).resolve()})" if own in flags else ""
    return f"{dataset.title(flags['dataset'])}{place}"


def main(argv=None):
    args, checkpoint = resolve_flags(build_parser(), argv)
    out = args.json and Path(args.json).resolve()
    if out and (out.exists() and not out.is_file() or not out.parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file's path in a folder that exists")
    device = choose_device(args.gpu_id)
    state, theirs = network_of(checkpoint, args.checkpoint)
    model = create_model(args.model, args.embedding_size, theirs["disent"], args.l2_norm)
    load_strictly(model, state, args.checkpoint)
    model.num_features(args.image_size)  # ends here where the network cannot take it

    images = dataset.load(args.dataset, args.data_root, "test")
    print(describe(f"{dataset.title(args.dataset)} test", images))
    loader = test_loader(
        images, args.image_size, args.batch_size, args.workers, device, model.interpolation
    )
    ks = dataset.ks(args.dataset, args.ks)
    recalls = evaluate(model.to(device), loader, device, ks, images.queries)

    print(f"{args.checkpoint} {args.remark}".strip())
    for k, recall in recalls.items():
        print(f"R@{k} : {100 * recall:.3f}")
    if out:
        recalls = {f"R@{k}": 100 * recall for k, recall in recalls.items()}
        write_json(out, {
            **recalls, "dataset": args.dataset, "data_root": args.data_root, "split": "test",
            "checkpoint": args.checkpoint, "epoch": epoch_of(checkpoint),
        })  # fmt: skip


if __name__ == "__main__":
    run(main)
