"""Recall@K of a checkpoint: python evaluate.py --resume CHECKPOINT"""

import math
from pathlib import Path

import dataset
from cli import (
    MODELS,
    Parser,
    UserError,
    at_least,
    boolean,
    check_flags,
    given_flags,
    image_size,
    parse_stored,
    plural,
    progress,
    run,
    warn,
)


def build_parser():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--resume", required=True, metavar="CHECKPOINT", help="published, or one of train.py's")
    add("--dataset", default="cub", type=dataset.canonical_name, help="cub, car, SOP, demo")
    add("--data-root", default="./data", help="folder of the extracted data sets")
    add("--model", default="bn_inception", choices=MODELS)
    add("--embedding-size", default=512, type=at_least(1, most=2**13), help="d")
    add("--l2-norm", default=True, type=boolean, help="the heads are L2-normalised")
    add("--image-size", default=224, type=image_size, help="pixels; resized to 256/224 of it")
    add("--batch-size", default=150, type=at_least(1))
    add("--gpu-id", default=0, type=at_least(-1))
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    add("--remark", default="", help="printed with the result")
    add("--json", metavar="PATH", help="also write the recalls, in per cent, to this file")
    return parser


if __name__ == "__main__":
    check_flags(build_parser)

import torch

from dataset.loader import batches, test_loader
from dataset.transforms import test_transform
from net import create_model, place
from net.weights import load_strictly
from utils import choose_device, read_checkpoint, write_json


@torch.no_grad()
def recall_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=1024):
    """{k: fraction of the queries with an image of their class among their k nearest}.

    embeddings [N, d], L2-normalised, so that their dot product is the cosine; labels [N]; the
    gallery [M, d], [M] likewise, by default the queries themselves, each of them excluded from
    its own results by index. Exact: a similarity that float32 cannot tell from the best match's
    is computed again in float64, and one that is equal there counts as ahead of it. A query
    without a match counts as a miss and is reported. Similarities exist in tiles of chunk_size^2.
    """
    itself = gallery is None
    if not embeddings.isfinite().all() or not itself and not gallery.isfinite().all():
        raise ValueError("recall_at_k: the embeddings are not all finite")
    query = _sorted_by_label(embeddings, labels)
    gallery = query if itself else _sorted_by_label(gallery, gallery_labels)
    longest = [
        torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max() for x, _ in (query, gallery)
    ]
    # times the precision, more than a dot product's rounding comes to
    slack = 8 * math.sqrt(embeddings.shape[1]) * longest[0] * longest[1]

    best = _best_match(query, gallery, itself, chunk_size)
    least, most = _count_ahead(query, gallery, itself, best, slack * 2**-24, chunk_size)
    close = torch.stack([(least < k) & (k <= most) for k in ks]).any(dim=0) & best.isfinite()
    for rows in close.nonzero().flatten().split(128):
        most[rows] = _count_exactly(query, gallery, itself, rows, slack * 2**-53)

    unmatched = int(best.isinf().sum())
    if unmatched:
        warn(f"{unmatched:,} of {plural(len(best), 'query')} have no match and count as misses")
    return {k: ((most < k) & best.isfinite()).sum().item() / len(best) for k in ks}


def _sorted_by_label(x, labels):
    """(x, labels) with the images of a class side by side, so that matches are in few tiles."""
    order = labels.argsort()
    return x[order], labels[order]


def _columns(labels, gallery_labels):
    """The range of the sorted gallery that holds the matches of sorted queries."""
    start = torch.searchsorted(gallery_labels, labels[:1])
    return int(start), int(torch.searchsorted(gallery_labels, labels[-1:], right=True))


def _tile(query, gallery, itself, rows, columns):
    """Similarities of some rows to some columns, and which of them match: [r, c] each."""
    (x, labels), (y, gallery_labels) = query, gallery
    match = labels[rows, None] == gallery_labels[columns]
    if itself:  # differs: the query is excluded by index, not by dropping the first hit
        match &= _index(rows, x)[:, None] != _index(columns, x)
    return x[rows].float() @ y[columns].float().T, match


def _index(rows, x):
    return torch.arange(rows.start, rows.stop, device=x.device)


def _slices(start, stop, size):
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _best_match(query, gallery, itself, size):
    """[N] similarity of each query's best match; -inf where it has none."""
    best = torch.full((len(query[0]),), -math.inf, device=query[0].device)
    for rows in _slices(0, len(best), size):
        for columns in _slices(*_columns(query[1][rows], gallery[1]), size):
            similarity, match = _tile(query, gallery, itself, rows, columns)
            found = similarity.masked_fill_(~match, -math.inf).amax(dim=1)
            best[rows] = torch.maximum(best[rows], found)
    return best


def _count_ahead(query, gallery, itself, best, slack, size):
    """([N], [N]) non-matching items that are surely, and possibly, as similar as the best match.

    Among themselves each pair of images is looked at once, for both of its queries.
    """
    (x, labels), (y, gallery_labels) = query, gallery
    bounds = (best.double() + slack).float(), (best.double() - slack).float()
    counts = torch.zeros(2, len(x), device=x.device, dtype=torch.float64)
    flags = torch.empty(size * size, device=x.device)
    for rows in _slices(0, len(x), size):
        low, high = _columns(labels[rows], gallery_labels)
        for columns in _slices(rows.start if itself else 0, len(y), size):
            similarity = x[rows].float() @ y[columns].float().T
            if low < columns.stop and columns.start < high:
                match = labels[rows, None] == gallery_labels[columns]
                similarity.masked_fill_(match, -math.inf)  # the query itself among them
            ahead = flags[: similarity.numel()].view_as(similarity)
            for count, bound in zip(counts, bounds):
                # comparing into floats and adding them up is far faster than through booleans
                count[rows] += torch.ge(similarity, bound[rows, None], out=ahead).sum(dim=1)
                if itself and columns.start > rows.start:
                    count[columns] += torch.ge(similarity, bound[columns], out=ahead).sum(dim=0)
    return counts.long()


def _count_exactly(query, gallery, itself, rows, slack):
    """[r] as _count_ahead, for some queries in float64. Ties count as ahead (differs)."""
    (x, labels), (y, gallery_labels) = query, gallery
    x64 = x[rows].double()
    similarity = torch.cat([x64 @ part.double().T for part in y.split(8192)], dim=1)
    same = labels[rows, None] == gallery_labels
    match = same.clone()
    if itself:
        match[torch.arange(len(rows), device=x.device), rows] = False
    best = similarity.masked_fill(~match, -math.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best - slack) & ~same).sum(dim=1)


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


def resolve_flags(parser, argv):
    """Flags and checkpoint. A flag comes from the command line, else from the checkpoint's own
    flags, else from the shapes of its weights, else from the default."""
    args, given = given_flags(parser, argv)
    checkpoint = read_checkpoint(args.resume)
    state = checkpoint.get("model_state_dict")
    if not isinstance(state, dict):
        raise UserError(f"{args.resume}: not a checkpoint: it has no model_state_dict")
    theirs = checkpoint.get("args", {})
    if not isinstance(theirs, dict):
        raise UserError(f"{args.resume}: its stored flags are no dictionary")
    kept = set(vars(args)) - {"resume", "json", "gpu_id", "workers", "remark"}
    theirs = {flag: theirs[flag] for flag in kept & theirs.keys()}
    disent = "model.embedding_specific.weight" in state
    shape = getattr(state.get("model.embedding.weight"), "shape", ())
    if len(shape) == 2:  # held to the flag's limits, before a network of that size is made
        theirs.setdefault("embedding_size", shape[0] // 2 if disent else shape[0])
    stored = parse_stored(parser, theirs, args.resume, required=["--resume", args.resume])
    for flag, value in {**{flag: getattr(stored, flag) for flag in theirs}, **given}.items():
        setattr(args, flag, value)
    return args, state, disent


def main(argv=None):
    args, state, disent = resolve_flags(build_parser(), argv)
    out = args.json and Path(args.json).resolve()
    if out and (out.exists() and not out.is_file() or not out.parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file's path in a folder that exists")
    device = choose_device(args.gpu_id)
    model = create_model(args.model, args.embedding_size, disent, args.l2_norm)
    load_strictly(model, state, args.resume)

    transform = test_transform(args.image_size)
    images = dataset.load(args.dataset, args.data_root, "test", transform)
    print(describe(f"{args.dataset} test", images))
    loader = test_loader(images, args.batch_size, args.workers, device)
    recalls = evaluate(place(model, device), loader, device, dataset.ks(args.dataset))

    print(f"{args.resume} {args.remark}".strip())
    for k, recall in recalls.items():
        print(f"R@{k} : {100 * recall:.3f}")
    if out:
        write_json(out, {f"R@{k}": 100 * recall for k, recall in recalls.items()})


if __name__ == "__main__":
    run(main)
