"""Recall@K of a checkpoint: python evaluate.py --resume CHECKPOINT"""

from pathlib import Path

import dataset
from dataset.loader import batches, test_loader
from flags import Parser, add_data_flags, add_network_flags, given_flags, parse_stored
from net import create_model, model_name, network_of
from net.weights import load_strictly
from retrieval.embed import embed
from retrieval.metrics import recall_at_k
from storage import read_checkpoint, write_json
from utils import UserError, choose_device, plural, progress, run


def build_parser():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CHECKPOINT", help="published, or one of train.py's")
    add("--remark", default="", help="printed with the result")
    add("--json", metavar="PATH", help="also write the recalls, in per cent, to this file")
    add_data_flags(parser, dataset.canonical_name, batch_size=150)
    add_network_flags(parser, model_name)
    return parser


def evaluate(model, test_batches, ks):
    """{k: Recall@K} of all images among each other. Leaves `model` in eval mode."""
    embeddings, labels = embed(model, test_batches)
    if not embeddings.isfinite().all():
        raise UserError("the network's embeddings are not all finite: its weights are of no use")
    return recall_at_k(embeddings, labels, ks)


def describe(name, images):
    """One line about a split, with the R@1 that random embeddings would have."""
    counts = images.labels.bincount().double()
    chance = (counts * (counts - 1)).sum() / len(images) / max(len(images) - 1, 1)
    found = f"{plural(len(images), 'image')} of {plural(len(images.classes), 'class')}"
    return f"{name}: {found} (R@1 by chance: {100 * chance:.1f} %)"


def resolve_flags(parser, argv):
    """Flags, state dict of the network and whether it has disent. A flag comes from the command
    line, else from the checkpoint's own flags, else from the shapes of its weights, else from the
    default."""
    args, given = given_flags(parser, argv)
    state, theirs = network_of(read_checkpoint(args.resume), args.resume)
    kept = vars(args).keys() - {"resume", "json", "gpu_id", "workers", "remark"}
    stored = {flag: value for flag, value in theirs.items() if flag in kept}
    resolved = parse_stored(parser, stored, args.resume, required=["--resume", args.resume])
    for flag, value in given.items():
        setattr(resolved, flag, value)
    return resolved, state, theirs["disent"]


def main(argv=None):
    args, state, disent = resolve_flags(build_parser(), argv)
    out = args.json and Path(args.json).resolve()
    if out and (out.exists() and not out.is_file() or not out.parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file's path in a folder that exists")
    device = choose_device(args.gpu_id)
    model = create_model(args.model, args.embedding_size, disent, args.l2_norm)
    load_strictly(model, state, args.resume)
    model.num_features(args.image_size)  # ends here where the network cannot take it

    images = dataset.load(args.dataset, args.data_root, "test")
    print(describe(f"{args.dataset} test", images))
    loader = test_loader(
        images, args.image_size, args.batch_size, args.workers, device, model.interpolation
    )
    tested = progress(batches(loader, device), len(loader), "evaluating")
    recalls = evaluate(model.to(device), tested, dataset.ks(args.dataset))

    print(f"{args.resume} {args.remark}".strip())
    for k, recall in recalls.items():
        print(f"R@{k} : {100 * recall:.3f}")
    if out:
        write_json(out, {f"R@{k}": 100 * recall for k, recall in recalls.items()})


if __name__ == "__main__":
    run(main)
