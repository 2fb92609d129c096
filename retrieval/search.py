"""Nearest neighbours, exact, in memory that does not grow with the gallery."""

import math

import torch

from retrieval.exact import exact_products
from utils import progress

NEIGHBOURS = 8  # in pages and exports


@torch.inference_mode()
@exact_products()
def nearest(queries, gallery, top, excluded=None, chunk_size=2**16):
    """(similarities, indices) [Q, top] of each query's nearest items of the gallery, best first.

    queries [Q, d], gallery [M, d], L2-normalised, so that the dot product is the cosine; excluded
    [Q], an item for each query to leave out: itself. Beside its arguments it holds [Q, chunk_size]
    similarities.
    """
    top = min(top, len(gallery) - (excluded is not None))
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), chunk_size):
        similarity = queries @ gallery[start : start + chunk_size].T
        if excluded is not None:
            here = ((excluded >= start) & (excluded < start + similarity.shape[1])).nonzero()
            similarity[here, excluded[here] - start] = -math.inf
        similarity, found = similarity.topk(min(top, similarity.shape[1]), dim=1)
        best, index = torch.cat([best, similarity], dim=1), torch.cat([index, found + start], dim=1)
        best, order = best.topk(min(top, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return best, index


def neighbours(embeddings, top, queries=None):
    """`nearest` of each image [N, d] among all others, or of the first `queries` among the rest, on
    the CPU; an index is a row of `embeddings`."""
    first, found = queries or 0, []
    chunks = torch.arange(queries or len(embeddings), device=embeddings.device).split(256)
    for rows in progress(chunks, len(chunks), "nearest images"):
        excluded = rows if queries is None else None
        found.append(nearest(embeddings[rows], embeddings[first:], top, excluded))
    similarities, indices = (torch.cat(part).cpu() for part in zip(*found))
    return similarities, indices + first
