"""Recall@K, MAP@R and R-Precision, exact."""

import math

import torch

from distributed import all_reduce, round_robin
from retrieval.search import exact_products
from utils import plural, progress, warn


def recall_at_k(embeddings, labels, ks, gallery=None, gallery_labels=None, chunk_size=None):
    """{k: fraction of the queries with an image of their class among their k nearest}.

    embeddings [Q, d], of any length, and labels [Q] are tensors or arrays, and so is the gallery
    [M, d], [M], by default the queries. Nearest is by cosine; ties and queries without a match as
    in hits_at_k. ValueError if shapes differ or something is empty or not finite.
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
    """(embeddings, L2-normalised, labels) as tensors on one device."""
    try:
        x, y = (None if part is None else torch.as_tensor(part) for part in (embeddings, labels))
    except (TypeError, ValueError) as error:  # such as labels that are text
        raise ValueError(f"embeddings or labels are no array of numbers ({error})") from error
    if x is None or y is None or x.ndim != 2 or y.shape != x.shape[:1] or not x.numel():
        shapes = [None if part is None else tuple(part.shape) for part in (x, y)]
        raise ValueError(f"embeddings {shapes[0]} and labels {shapes[1]} do not fit, or are empty")
    if y.is_floating_point():
        raise ValueError(f"labels of type {y.dtype} are no class numbers")
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
    each has all embeddings. A GPU is not waited for between tiles.
    """
    if len(ks) == 0 or min(ks) < 1:
        raise ValueError(f"K of {ks}: must be at least 1")
    order = labels.argsort()
    query = others = embeddings[order], labels[order]
    if gallery is not None:
        by_label = gallery_labels.argsort()
        others = gallery[by_label], gallery_labels[by_label]
    tiles = tiles_of(query, others, chunk_size or (8192 if embeddings.is_cuda else 1024))

    # times the precision: more than the rounding error of a dot product of unit vectors
    slack = 8 * math.sqrt(embeddings.shape[1])
    best = best_match(query, others, tiles)
    matched = best.isfinite()
    surely, possibly = count_ahead(query, others, tiles, best, slack * 2**-24)
    unsure = torch.stack([(surely < k) & (k <= possibly) for k in ks]).any(dim=0) & matched
    for rows in unsure.nonzero().flatten().split(128):
        possibly[rows] = count_ahead_in_float64(query, others, rows, slack * 2**-53)

    if unmatched := int((~matched).sum()):
        warn(f"{unmatched:,} of {plural(len(best), 'query')} have no match and count as misses")
    return {k: ((possibly < k) & matched)[order.argsort()] for k in ks}


@torch.no_grad()
@exact_products()
def precision_at_r(embeddings, labels, gallery=None, gallery_labels=None, memory=2**27):
    """{"MAP@R", "R-Precision"} (Musgrave et al., ECCV 2020, section 3.2): of the R nearest of a
    query with R matches, the fraction that match, and their average precision; means over queries.

    Arguments, ties and queries without a match as in hits_at_k. All in float64, in chunks of
    queries whose similarities take `memory` bytes. Processes share the chunks.
    """
    exclude_self = gallery is None
    if exclude_self:
        gallery, gallery_labels = embeddings, labels
    gallery = gallery.double()
    slack = 8 * math.sqrt(gallery.shape[1]) * 2**-53
    totals = torch.zeros(2, len(labels), dtype=torch.float64, device=gallery.device)
    chunks = round_robin(torch.arange(len(labels)).split(max(1, memory // (8 * len(gallery)))))
    for rows in progress(chunks, len(chunks), "MAP@R"):
        similarity = embeddings[rows].double() @ gallery.T
        match = labels[rows, None] == gallery_labels
        if exclude_self:
            similarity[torch.arange(len(rows)), rows] = -math.inf
            match[torch.arange(len(rows)), rows] = False
        R = match.sum(dim=1, keepdim=True).clamp_min(1).double()
        max_R = int(R.max())
        matches = similarity.masked_fill(~match, -math.inf).topk(max_R, dim=1).values
        others = similarity.masked_fill_(match, -math.inf).topk(max_R, dim=1).values
        # non-matches at least as similar as the i-th match
        ahead = torch.searchsorted(-others, -(matches - slack), right=True)
        number = torch.arange(1, max_R + 1, device=gallery.device, dtype=torch.float64)
        within = (number + ahead <= R) & matches.isfinite()
        precision = number / (number + ahead)
        totals[:, rows] = torch.stack([precision * within, within]).div(R).sum(dim=2)
    return dict(zip(("MAP@R", "R-Precision"), all_reduce(totals).mean(dim=1).tolist()))


# query, gallery: (embeddings, labels), sorted by label; the gallery is the query where each query
# is compared to all others.


def tiles_of(query, gallery, size):
    """[(rows, columns, whether a match is in them)] of the matrix of similarities. It is symmetric
    where the gallery is the query: then only those on and above the diagonal."""
    sides = []
    for _, labels in (query, gallery):
        numbers = labels.tolist()
        sides.append([(slice(i, i + size), numbers[i], numbers[i : i + size][-1])
                      for i in range(0, len(numbers), size)])  # fmt: skip
    return [
        (rows, columns, first <= last_there and first_there <= last)
        for rows, first, last in sides[0]
        for columns, first_there, last_there in sides[1]
        if gallery is not query or columns.start >= rows.start
    ]


def best_match(query, gallery, tiles):
    """[Q] similarity of each query's best match; -inf without one."""
    (x, labels), (y, gallery_labels) = query, gallery
    best = torch.full((len(x),), -math.inf, device=x.device)
    for rows, columns in round_robin([tile for *tile, has_matches in tiles if has_matches]):
        similarity = x[rows].float() @ y[columns].float().T
        match = labels[rows, None] == gallery_labels[columns]
        if gallery is query and rows == columns:
            match.fill_diagonal_(False)  # differs: excluded by index, not as the first hit
        similarity.masked_fill_(~match, -math.inf)
        best[rows] = torch.maximum(best[rows], similarity.amax(dim=1))
        if gallery is query and rows != columns:
            best[columns] = torch.maximum(best[columns], similarity.amax(dim=0))
    return all_reduce(best, "max")


def count_ahead(query, gallery, tiles, best, slack):
    """([Q], [Q]): how many non-matches are surely, and possibly, as similar as the best match."""
    (x, labels), (y, gallery_labels) = query, gallery
    bounds = (best.double() + slack).float(), (best.double() - slack).float()
    counts = torch.zeros(2, len(x), device=x.device, dtype=torch.float64)
    tiles = round_robin(tiles)
    for rows, columns, has_matches in progress(tiles, len(tiles), "recall"):
        similarity = x[rows].float() @ y[columns].float().T
        if has_matches:
            match = labels[rows, None] == gallery_labels[columns]  # the query itself among them
            similarity.masked_fill_(match, -math.inf)
        ahead = torch.empty_like(similarity)  # comparing into floats is far faster than into bools
        for count, bound in zip(counts, bounds):
            count[rows] += torch.ge(similarity, bound[rows, None], out=ahead).sum(dim=1)
            if gallery is query and rows != columns:
                count[columns] += torch.ge(similarity, bound[columns], out=ahead).sum(dim=0)
    return all_reduce(counts).long()


def count_ahead_in_float64(query, gallery, rows, slack):
    """[r]: as count_ahead, for the queries `rows`. differs: ties count as ahead."""
    (x, labels), (y, gallery_labels) = query, gallery
    x = x[rows].double()
    similarity = torch.cat([x @ part.double().T for part in y.split(8192)], dim=1)
    same_class = labels[rows, None] == gallery_labels
    match = same_class.clone()
    if gallery is query:
        match[torch.arange(len(rows), device=rows.device), rows] = False
    best = similarity.masked_fill(~match, -math.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best - slack) & ~same_class).sum(dim=1)
