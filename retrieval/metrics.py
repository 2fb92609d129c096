"""Recall@K, MAP@R and R-Precision, exact."""

import math

import torch

from distributed import all_gather, all_reduce, round_robin
from retrieval.search import exact_products
from retrieval.tiles import (
    class_ranges,
    in_float64,
    similarities_of_others,
    sorted_by_label,
    tiles_of,
)
from utils import plural, warn

# SLACK * sqrt(d) * precision exceeds the rounding error of a dot product of unit vectors
SLACK = 8
FEW = 4  # similarities a query that precision_at_r computes again in float64, one by one


def recall_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=None):
    """{k: fraction of the queries with an image of their class among their k nearest}.

    embeddings [Q, d], of any length, and labels [Q] are tensors or arrays, and so is the gallery
    [M, d], [M], by default the queries. Nearest is by cosine; ties and queries without a match
    count as in hits_at_k. ValueError if shapes do not fit or something is empty or not finite.
    """
    query, others = checked(embeddings, labels), ()
    if gallery is not None or gallery_labels is not None:
        others = checked(gallery, gallery_labels)
        widths = query[0].shape[1], others[0].shape[1]
        if widths[0] != widths[1]:
            raise ValueError(f"embeddings of {widths[0]} and a gallery of {widths[1]} dimensions")
    return fractions(hits_at_k(*query, ks, *others, chunk_size=chunk_size))


def fractions(hits):
    return {k: hit.sum().item() / len(hit) for k, hit in hits.items()}


def checked(embeddings, labels):
    """(L2-normalised embeddings, labels), as tensors on one device."""
    try:
        x, y = (None if part is None else torch.as_tensor(part) for part in (embeddings, labels))
    except (TypeError, ValueError) as error:  # such as labels that are text
        raise ValueError(f"embeddings or labels are not arrays of numbers ({error})") from error
    if x is None or y is None or x.ndim != 2 or y.shape != x.shape[:1] or not x.numel():
        shapes = [None if part is None else tuple(part.shape) for part in (x, y)]
        raise ValueError(f"embeddings {shapes[0]} and labels {shapes[1]} do not fit, or are empty")
    if y.is_floating_point():
        raise ValueError(f"labels of type {y.dtype} are not class numbers")
    if not x.isfinite().all():
        raise ValueError("the embeddings are not all finite")
    x = x if x.is_floating_point() else x.double()
    lengths = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    if (lengths - 1).abs().max() > 16 * torch.finfo(x.dtype).eps:
        x = x.double() / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)[:, None]
    return x, y.to(x.device)


@torch.no_grad()
@exact_products()
def hits_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=None):
    """{k: [Q], whether a query has an image of its class among its k nearest}.

    embeddings [Q, d] and gallery [M, d] are L2-normalised; labels [Q], gallery_labels [M]. Without
    a gallery, each query is compared to all others. Exact: float64 decides where float32 cannot.
    A tie between a match and another image counts against the query. A query without a match is a
    miss, and is reported. Memory: tiles of chunk_size^2 similarities. Processes share the tiles;
    each has all embeddings. Tiles do not synchronise with a GPU.
    """
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"K of {ks}: must be at least 1")
    query, others, order = sorted_by_label(embeddings, labels, gallery, gallery_labels)
    tiles = tiles_of(query, others, chunk_size or (8192 if embeddings.is_cuda else 1024))
    slack = SLACK * math.sqrt(embeddings.shape[1])
    best = best_matches(query, others, torch.arange(len(order), device=order.device), 1)
    matched = best.isfinite().flatten()
    surely, possibly = count_ahead(query, others, tiles, best, slack * 2**-24)
    unsure = torch.stack([(surely < k) & (k <= possibly) for k in ks]).any(dim=0) & matched
    for rows in unsure.nonzero().flatten().split(128):
        _, similarity = in_float64(query, others, rows)
        possibly[rows] = (similarity >= best[rows] - slack * 2**-53).sum(dim=1)

    if unmatched := int((~matched).sum()):
        warn(f"{unmatched:,} of {plural(len(best), 'query')} have no match and count as misses")
    return {k: ((possibly < k) & matched)[order.argsort()] for k in ks}


@torch.no_grad()
@exact_products()
def precision_at_r(
    embeddings, labels, gallery=None, gallery_labels=None, chunk_size=None, kept=2**22
):
    """{"MAP@R", "R-Precision"}, means over queries (Musgrave et al., ECCV 2020, section 3.2): of
    the R nearest of a query with R matches, the average precision, and the share that matches.

    Arguments and promises as in hits_at_k. Memory: also the R nearest matches and the R nearest
    others of all queries; if these are more than `kept`, of some queries at a time.
    """
    query, others, _ = sorted_by_label(embeddings, labels, gallery, gallery_labels)
    first, end = class_ranges(query, others)
    R = end - first - int(others is query)
    max_R = max(1, int(R.max()))
    unsure = torch.zeros_like(R, dtype=torch.bool)
    scores = torch.zeros(2, len(R), dtype=torch.float64, device=R.device)
    slack = SLACK * math.sqrt(embeddings.shape[1])
    for block in torch.arange(len(R), device=R.device).split(max(1, kept // max_R)):
        k = max(1, int(R[block].max()))
        part = query if len(block) == len(R) else (query[0][block], query[1][block])
        tiles = tiles_of(part, others, chunk_size or (8192 if R.is_cuda else 2048))
        matches = best_matches(query, others, block, k)
        nearest = best_others(part, others, tiles, k)
        for rows in round_robin(block.split(512)):
            match, *other = (part[rows - block[0]] for part in (matches, *nearest))
            other, unsure[rows] = resolve_ties(query, others, rows, match, *other, slack * 2**-24)
            scores[:, rows] = score(match, other, slack * 2**-53)
    for rows in unsure.nonzero().flatten().split(128):
        both = (part.topk(max_R, dim=1).values for part in in_float64(query, others, rows))
        scores[:, rows] = score(*both, slack * 2**-53)
    return dict(zip(("MAP@R", "R-Precision"), all_reduce(scores).mean(dim=1).tolist()))


# query, gallery: as in retrieval/tiles.py


def best_matches(query, gallery, rows, k):
    """[r, k] similarities in float64 of the best matches of `rows`; -inf past the last."""
    first, end = torch.stack(class_ranges(query, gallery))[:, rows].tolist()
    best = torch.full((len(rows), k), -math.inf, dtype=torch.float64, device=rows.device)
    for start in round_robin(range(0, len(rows), 128)):
        part = slice(start, start + 128)
        matches, _ = in_float64(query, gallery, rows[part], slice(first[start], end[part][-1]))
        width = min(k, matches.shape[1])
        best[part, :width] = matches.topk(width, dim=1).values
    return all_reduce(best, "max")


def count_ahead(query, gallery, tiles, best, slack):
    """([Q], [Q]): how many others surely, and possibly, are as similar as the best match [Q, 1]."""
    bounds = (best + slack).float(), (best - slack).float()
    counts = torch.zeros(2, len(best), device=best.device, dtype=torch.float64)
    for rows, _, similarity in similarities_of_others(query, gallery, tiles, "recall"):
        ahead = torch.empty_like(similarity)  # comparing into floats is far faster than into bools
        for count, bound in zip(counts, bounds):
            count[rows] += torch.ge(similarity, bound[rows], out=ahead).sum(dim=1)
    return all_reduce(counts).long()


def best_others(query, gallery, tiles, k):
    """([Q, k], [Q, k]): similarities, in float32, and gallery indices of the k best others."""
    best = torch.full((len(query[0]), k), -math.inf, device=query[0].device)
    found = torch.zeros_like(best, dtype=torch.long)
    for rows, columns, similarity in similarities_of_others(query, gallery, tiles, "MAP@R"):
        values, indices = candidates(similarity.contiguous(), k)
        values = torch.cat([best[rows], values], dim=1)
        indices = torch.cat([found[rows], indices + columns.start], dim=1)
        best[rows], at = values.topk(k, dim=1, sorted=False)
        found[rows] = indices.gather(1, at)
    best, found = (all_gather(part[None]).movedim(0, 1).flatten(1) for part in (best, found))
    best, at = best.topk(k, dim=1)
    return best, found.gather(1, at)


def candidates(similarity, k):
    """(similarities, columns) [r, few] that include the k greatest of each row. Those lie in the k
    groups of columns with the greatest maxima."""
    width = similarity.shape[1]
    size = max(1, math.isqrt(width // k))
    count = width // size
    maxima = similarity[:, : size * count].unflatten(1, (size, count)).amax(dim=1)
    groups = maxima.topk(min(k, count), dim=1, sorted=False).indices
    column = torch.arange(width, device=groups.device)
    columns = (groups[:, :, None] + column[: size * count : count]).flatten(1)
    rest = column[size * count :].expand(len(groups), -1)
    columns = torch.cat([columns, rest], dim=1)
    return similarity.gather(1, columns), columns


def resolve_ties(query, gallery, rows, matches, values, indices, slack):
    """The best others' similarities [r, k], in float64 where float32 cannot tell whether a match is
    ahead; and whether more than these are near ties, [r]. rows: of the queries."""
    values = values.double()
    above, below = (torch.searchsorted(-matches, shift - values) for shift in (-slack, slack))
    close = above != below
    few = close.byte().topk(min(FEW, close.shape[1]), dim=1).indices
    x, y = query[0][rows].double(), gallery[0][indices.gather(1, few)].double()
    exact = torch.einsum("rd,rfd->rf", x, y).where(close.gather(1, few), values.gather(1, few))
    at_the_end = (matches - values[:, -1:]).abs() <= slack  # others that were not kept may be ahead
    unsure = (close.sum(dim=1) > FEW) | at_the_end.any(dim=1)
    return values.scatter(1, few, exact), unsure


def score(matches, others, slack):
    """[2, r]: average precision and precision at R, from the R best matches and others."""
    found = matches.isfinite()
    R = found.sum(dim=1, keepdim=True).clamp_min(1).double()
    number = torch.arange(1, matches.shape[1] + 1, device=R.device, dtype=torch.float64)
    others = others.sort(dim=1, descending=True).values
    # differs: ties count as ahead
    rank = number + torch.searchsorted(-others, slack - matches, right=True)
    within = found & (rank <= R)
    return torch.stack([number / rank * within, within]).div(R).sum(dim=2)
