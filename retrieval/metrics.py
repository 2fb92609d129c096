"""Recall@K, MAP@R and R-Precision, exact."""

import math

import torch
from torch.nn import functional as F

from distributed import all_reduce, round_robin
from retrieval.exact import exact_products
from utils import plural, progress, warn


def recall_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=None):
    """{k: fraction of the queries with an image of their class among their k nearest}.

    embeddings [N, d], of any length, and labels [N] are tensors or arrays, and so is the gallery
    [M, d], [M]: by default the queries themselves. Nearest is by cosine; ties and queries without a
    match as in hits_at_k. ValueError for what does not fit, is empty or not finite.
    """
    sides = [as_side(embeddings, labels)]
    if gallery is not None or gallery_labels is not None:
        sides.append(as_side(gallery, gallery_labels))
    widths = [x.shape[1] for x, _ in sides]
    if len(set(widths)) > 1:
        raise ValueError(f"embeddings of {widths[0]} and a gallery of {widths[1]} dimensions")
    (x, y), *others = sides
    hits = hits_at_k(x, y, ks, *(others[0] if others else ()), chunk_size=chunk_size)
    return {k: hit.sum().item() / len(hit) for k, hit in hits.items()}


def as_side(embeddings, labels):
    """(embeddings as a tensor, L2-normalised, labels); ValueError for what these cannot be."""
    x, y = (None if part is None else torch.as_tensor(part) for part in (embeddings, labels))
    if x is None or y is None or x.ndim != 2 or y.shape != x.shape[:1] or not x.numel():
        shapes = [None if part is None else tuple(part.shape) for part in (x, y)]
        raise ValueError(f"embeddings {shapes[0]} and labels {shapes[1]} do not fit, or are empty")
    x = x if x.is_floating_point() else x.double()
    if y.is_floating_point():
        raise ValueError(f"labels of type {y.dtype} are no class numbers")
    if not x.isfinite().all():
        raise ValueError("the embeddings are not all finite")
    lengths = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    if (lengths - 1).abs().max() > 16 * torch.finfo(x.dtype).eps:
        x = F.normalize(x.double(), dim=1)  # a zero row stays zero
    return x, y.to(x.device)


@torch.no_grad()
@exact_products()
def hits_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=None):
    """{k: [N], whether a query has an image of its class among its k nearest}.

    embeddings [N, d], L2-normalised, so that their dot product is the cosine; labels [N]; the
    gallery [M, d], [M] likewise, by default the queries themselves, each of them excluded from
    its own results by index. Exact: a similarity that float32 cannot tell from the best match's
    is computed again in float64, and one that is equal there counts as ahead of it. A query
    without a match counts as a miss and is reported. Similarities exist in tiles of chunk_size^2,
    at which several processes, each with all embeddings, take turns; on a GPU they are larger, and
    it is not waited for between them.
    """
    itself = gallery is None
    size = chunk_size or (8192 if embeddings.is_cuda else 1024)
    if not ks or min(ks) < 1:
        raise ValueError(f"K of {ks}: must be at least 1")
    query, order = _sorted_by_label(embeddings, labels)
    gallery = query if itself else _sorted_by_label(gallery, gallery_labels)[0]
    longest = [
        torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max() for x, _ in (query, gallery)
    ]
    # times the precision, more than a dot product's rounding comes to
    slack = 8 * math.sqrt(embeddings.shape[1]) * longest[0] * longest[1]

    tiles = _tiles(query[1], gallery[1], size)
    best = _best_match(query, gallery, itself, tiles, size)
    least, most = _count_ahead(query, gallery, itself, best, slack * 2**-24, tiles, size)
    close = torch.stack([(least < k) & (k <= most) for k in ks]).any(dim=0) & best.isfinite()
    for rows in close.nonzero().flatten().split(128):
        most[rows] = _count_exactly(query, gallery, itself, rows, slack * 2**-53)

    unmatched = int(best.isinf().sum())
    if unmatched:
        warn(f"{unmatched:,} of {plural(len(best), 'query')} have no match and count as misses")
    hits = {k: (most < k) & best.isfinite() for k in ks}
    return {k: hit[order.argsort()] for k, hit in hits.items()}


@torch.no_grad()
@exact_products()
def precision_at_r(embeddings, labels, gallery=None, gallery_labels=None, memory=2**27):
    """{"MAP@R", "R-Precision"} (Musgrave et al., ECCV 2020, section 3.2): of the R nearest of a
    query with R matches, the fraction that match, and their average precision; means over queries.

    Arguments, ties and queries without a match as in hits_at_k; all is computed in float64, in
    chunks of queries whose similarities take `memory` bytes, at which processes take turns.
    """
    itself = gallery is None
    if itself:
        gallery, gallery_labels = embeddings, labels
    y = gallery.double()
    longest = torch.linalg.vector_norm(y, dim=1).max()
    found = torch.zeros(2, len(labels), dtype=torch.float64, device=y.device)
    chunks = round_robin(torch.arange(len(labels)).split(max(1, memory // (8 * len(y)))))
    for rows in progress(chunks, len(chunks), "MAP@R"):
        x = embeddings[rows].double()
        similarity, match = x @ y.T, labels[rows, None] == gallery_labels
        if itself:
            similarity[torch.arange(len(rows)), rows] = -math.inf
            match[torch.arange(len(rows)), rows] = False
        R = match.sum(dim=1, keepdim=True).clamp_min(1).double()
        width = int(R.max())
        matches = similarity.masked_fill(~match, -math.inf).topk(width, dim=1).values
        others = similarity.masked_fill_(match, -math.inf).topk(width, dim=1).values
        slack = 8 * math.sqrt(y.shape[1]) * 2**-53 * x.norm(dim=1, keepdim=True) * longest
        # others at least as similar as the i-th match: as many as are ahead of it, up to R
        ahead = torch.searchsorted(-others, -(matches - slack), right=True)
        number = torch.arange(1, width + 1, device=y.device, dtype=torch.float64)
        within = (number + ahead <= R) & matches.isfinite()
        precision = number / (number + ahead)
        found[:, rows] = torch.stack([precision * within, within]).div(R).sum(dim=2)
    means = all_reduce(found).mean(dim=1).tolist()
    return dict(zip(("MAP@R", "R-Precision"), means))


def _sorted_by_label(x, labels):
    """((x, labels), their order) with the images of a class side by side, so that matches are in
    few tiles."""
    order = labels.argsort()
    return (x[order], labels[order]), order


def _tiles(labels, gallery_labels, size):
    """[(rows, low, high)]: sorted queries in tiles, and the range of the sorted gallery that holds
    their matches. One wait for the device, however many there are."""
    tiles = _slices(0, len(labels), size)
    first, last = labels[::size].contiguous(), labels[[rows.stop - 1 for rows in tiles]]
    low = torch.searchsorted(gallery_labels, first)
    high = torch.searchsorted(gallery_labels, last, right=True)
    return [(rows, *ends) for rows, ends in zip(tiles, torch.stack([low, high], dim=1).tolist())]


def _slices(start, stop, size):
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _best_match(query, gallery, itself, tiles, size):
    """[N] similarity of each query's best match; -inf where it has none."""
    (x, labels), (y, gallery_labels) = query, gallery
    best = torch.full((len(x),), -math.inf, device=x.device)
    pairs = [(rows, columns) for rows, low, high in tiles for columns in _slices(low, high, size)]
    for rows, columns in round_robin(pairs):
        similarity = x[rows].float() @ y[columns].float().T
        match = labels[rows, None] == gallery_labels[columns]
        if itself:  # differs: the query is excluded by index, not by dropping the first hit
            match.diagonal(rows.start - columns.start).fill_(False)
        found = similarity.masked_fill_(~match, -math.inf).amax(dim=1)
        best[rows] = torch.maximum(best[rows], found)
    return all_reduce(best, "max")


def _count_ahead(query, gallery, itself, best, slack, tiles, size):
    """([N], [N]) non-matching items that are surely, and possibly, as similar as the best match.

    Among themselves each pair of images is looked at once, for both of its queries.
    """
    (x, labels), (y, gallery_labels) = query, gallery
    bounds = (best.double() + slack).float(), (best.double() - slack).float()
    counts = torch.zeros(2, len(x), device=x.device, dtype=torch.float64)
    flags = torch.empty(min(size, len(x)) * min(size, len(y)), device=x.device)
    pairs = round_robin([
        (rows, columns, low < columns.stop and columns.start < high)
        for rows, low, high in tiles
        for columns in _slices(rows.start if itself else 0, len(y), size)
    ])  # fmt: skip
    for rows, columns, matches in progress(pairs, len(pairs), "recall"):
        similarity = x[rows].float() @ y[columns].float().T
        if matches:
            match = labels[rows, None] == gallery_labels[columns]
            similarity.masked_fill_(match, -math.inf)  # the query itself among them
        ahead = flags[: similarity.numel()].view_as(similarity)
        for count, bound in zip(counts, bounds):
            # comparing into floats and adding them up is far faster than through booleans
            count[rows] += torch.ge(similarity, bound[rows, None], out=ahead).sum(dim=1)
            if itself and columns.start > rows.start:
                count[columns] += torch.ge(similarity, bound[columns], out=ahead).sum(dim=0)
    return all_reduce(counts).long()


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
