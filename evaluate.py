"""Recall@K of a checkpoint: python evaluate.py --resume CHECKPOINT"""

import math
from pathlib import Path

import torch

import dataset
from dataset.loader import batches, test_loader
from dataset.transforms import test_transform
from net import MODELS, create_model
from net.weights import load_strictly
from utils import (
    Parser,
    UserError,
    at_least,
    boolean,
    choose_device,
    given_flags,
    image_size,
    parse_stored,
    plural,
    progress,
    read_checkpoint,
    run,
    warn,
    write_json,
)


@torch.no_grad()
def recall_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=None):
    """{k: fraction of the queries with an image of their class among their k nearest}.

    embeddings [N, d], L2-normalised, so that their dot product is the cosine; labels [N]; the
    gallery [M, d], [M] likewise, by default the queries themselves, each of them excluded from
    its own results by index. Exact: a similarity that float32 cannot tell from the best match's
    is computed again in float64, and one that is equal there counts as ahead of it. A query
    without a match counts as a miss and is reported. Memory: a chunk of rows at a time.
    """
    itself = gallery is None
    if itself:
        gallery, gallery_labels = embeddings, labels
    if not (embeddings.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("recall_at_k: the embeddings are not all finite")
    chunk_size = chunk_size or max(1, 2**24 // len(gallery))
    longest = [
        torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max() for x in (embeddings, gallery)
    ]
    # times the precision, more than a dot product's rounding comes to
    slack = 8 * math.sqrt(embeddings.shape[1]) * longest[0] * longest[1]

    ahead = []  # per query: non-matching items at least as similar as its best match
    for start in range(0, len(embeddings), chunk_size):
        rows = slice(start, start + chunk_size)
        match = labels[rows, None] == gallery_labels
        other = ~match
        if itself:
            match.diagonal(start).fill_(False)  # differs: not by dropping the first hit
        query = embeddings[rows]
        similarity = query.float() @ gallery.float().T
        least, most = _count_ahead(similarity, match, other, slack * 2**-24)
        del similarity
        close = torch.stack([(least < k) & (k <= most) for k in ks]).any(dim=0)
        if close.any():
            parts = gallery.split(8192)
            exact = torch.cat([query[close].double() @ p.double().T for p in parts], dim=1)
            most[close] = _count_ahead(exact, match[close], other[close], slack * 2**-53)[1]
        most[~match.any(dim=1)] = torch.iinfo(most.dtype).max
        ahead.append(most)
    ahead = torch.cat(ahead)

    unmatched = int((ahead == torch.iinfo(ahead.dtype).max).sum())
    if unmatched:
        warn(f"{unmatched:,} of {plural(len(ahead), 'query')} have no match and count as misses")
    return {k: (ahead < k).sum().item() / len(ahead) for k in ks}


def _count_ahead(similarity, match, other, slack):
    """[B] non-matching items surely, and possibly, as similar as the best match: [B, M] -> [B]."""
    best = similarity.masked_fill(~match, -math.inf).amax(dim=1, keepdim=True)
    least = ((similarity > best + slack) & other).sum(dim=1)
    most = ((similarity >= best - slack) & other).sum(dim=1)  # differs: ties count as ahead
    return least, most


def evaluate(model, loader, device, ks):
    """{k: Recall@K} of all of the loader's images among each other. Leaves `model` in eval mode."""
    model.eval()
    embeddings, labels = [], []
    with torch.inference_mode():
        for images, targets in progress(batches(loader, device), len(loader), "evaluating"):
            embeddings.append(model.embed(images))
            labels.append(targets)
    embeddings = torch.cat(embeddings)
    if not embeddings.isfinite().all():
        raise UserError("the network's embeddings are not all finite: its weights are of no use")
    return recall_at_k(embeddings, torch.cat(labels), ks)


def describe(name, images):
    """One line about a split, with the R@1 that random embeddings would have."""
    counts = images.labels.unique(return_counts=True)[1].double()
    chance = (counts * (counts - 1)).sum() / len(images) / max(len(images) - 1, 1)
    found = f"{plural(len(images), 'image')} of {plural(images.num_classes, 'class')}"
    return f"{name}: {found} (R@1 by chance: {100 * chance:.1f} %)"


def build_parser():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CHECKPOINT", help="published, or one of train.py's")
    add("--dataset", default="cub", type=dataset.canonical_name, help="cub, car, SOP, demo")
    add("--data-root", default="./data", help="folder of the extracted data sets")
    add("--model", default="bn_inception", choices=MODELS)
    add("--embedding-size", default=512, type=at_least(1), help="d")
    add("--l2-norm", default=True, type=boolean, help="the heads are L2-normalised")
    add("--image-size", default=224, type=image_size, help="pixels; resized to 256/224 of it")
    add("--batch-size", default=150, type=at_least(1))
    add("--gpu-id", default=0, type=at_least(-1))
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    add("--remark", default="", help="printed with the result")
    add("--json", metavar="PATH", help="also write the recalls, in per cent, to this file")
    return parser


def resolve_flags(parser, argv):
    """Flags and checkpoint. A flag comes from the command line, else from the checkpoint's own
    flags, else from the shapes of its weights, else from the default."""
    args, given = given_flags(parser, argv)
    checkpoint = read_checkpoint(args.resume)
    state = checkpoint.get("model_state_dict")
    if not isinstance(state, dict):
        raise UserError(f"{args.resume}: not a checkpoint: it has no model_state_dict")
    disent = "model.embedding_specific.weight" in state
    shape = getattr(state.get("model.embedding.weight"), "shape", ())
    if len(shape) == 2:
        args.embedding_size = shape[0] // 2 if disent else shape[0]
    theirs = checkpoint.get("args", {})
    if not isinstance(theirs, dict):
        raise UserError(f"{args.resume}: its stored flags are no dictionary")
    kept = set(vars(args)) - {"resume", "json", "gpu_id", "workers", "remark"}
    theirs = {flag: theirs[flag] for flag in kept & theirs.keys()}
    stored = parse_stored(parser, theirs, args.resume, required=["--resume", args.resume])
    for flag, value in {**{flag: getattr(stored, flag) for flag in theirs}, **given}.items():
        setattr(args, flag, value)
    return args, state, disent


def main(argv=None):
    args, state, disent = resolve_flags(build_parser(), argv)
    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file's path in a folder that exists")
    device = choose_device(args.gpu_id)
    model = create_model(args.model, args.embedding_size, disent, args.l2_norm)
    load_strictly(model, state, args.resume)

    transform = test_transform(args.image_size)
    images = dataset.load(args.dataset, args.data_root, "test", transform)
    print(describe(f"{args.dataset} test", images))
    loader = test_loader(images, args.batch_size, args.workers, device)
    recalls = evaluate(model.to(device), loader, device, dataset.ks(args.dataset))

    print(f"{args.resume} {args.remark}".strip())
    for k, recall in recalls.items():
        print(f"R@{k} : {100 * recall:.3f}")
    if args.json:
        write_json(Path(args.json), {f"R@{k}": 100 * recall for k, recall in recalls.items()})


if __name__ == "__main__":
    run(main)
