"""The similarities behind recall, MAP@R and duplicates, tile by tile."""

import math

import torch

from distributed import round_robin
from utils import progress

# query, gallery: (embeddings, labels), sorted by label; the gallery is the query where each query
# is compared to all others.


def sorted_by_label(embeddings, labels, gallery=None, gallery_labels=None):
    """(query, gallery, the order of the queries)"""
    order = labels.argsort()
    query = embeddings[order], labels[order]
    if gallery is None:
        return query, query, order
    by_label = gallery_labels.argsort()
    return query, (gallery[by_label], gallery_labels[by_label]), order


def class_ranges(query, gallery):
    """([Q], [Q]): where in the gallery each query's class begins and ends."""
    return [torch.searchsorted(gallery[1], query[1], right=right) for right in (False, True)]


def tiles_of(query, gallery, size):
    """[(rows, columns, whether a match is in them)] of the matrix of similarities. If the gallery
    is the query, the matrix is symmetric: only tiles on and above the diagonal."""
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


def similarities_of_others(query, gallery, tiles, what):
    """Yields (rows, columns, float32 similarities [r, c]) of this rank's tiles and their mirror
    images. Similarities of matches are -inf."""
    (x, labels), (y, gallery_labels) = query, gallery
    tiles = round_robin(tiles)
    for rows, columns, has_matches in progress(tiles, len(tiles), what):
        similarity = x[rows].float() @ y[columns].float().T
        if has_matches:
            match = labels[rows, None] == gallery_labels[columns]  # the query itself among them
            similarity.masked_fill_(match, -math.inf)
        yield rows, columns, similarity
        if gallery is query and rows != columns:
            yield columns, rows, similarity.T


def in_float64(query, gallery, rows, columns=slice(None)):
    """([r, c], [r, c]): similarities of matches, and of others; -inf in place of the rest."""
    (x, labels), (y, gallery_labels) = query, gallery
    x = x[rows].double()
    similarity = torch.cat([x @ part.double().T for part in y[columns].split(8192)], dim=1)
    match = same_class = labels[rows, None] == gallery_labels[columns]
    if gallery is query:
        itself = rows[:, None] == torch.arange(len(y), device=y.device)[columns]
        match = same_class & ~itself
    return similarity.masked_fill(~match, -math.inf), similarity.masked_fill_(same_class, -math.inf)
