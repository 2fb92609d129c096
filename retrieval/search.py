"""Nearest neighbours and duplicates: exact, by blocks of similarities."""

import contextlib
import math

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from retrieval.tiles import similarities_of_others, tiles_of
from utils import progress

NEIGHBOURS = 8  # in pages and exports


@contextlib.contextmanager
def exact_products():
    """In a `with` or as a decorator: matrix products without TensorFloat-32 or autocast."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, older = [setting.fp32_precision for setting in settings], None
    with contextlib.suppress(RuntimeError):  # torch refuses to read the older API after the newer
        older = torch.get_float32_matmul_precision()
    try:
        if older:  # else TunableOp, which reads it, would raise
            torch.set_float32_matmul_precision("highest")
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older)
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


@torch.inference_mode()
@exact_products()
def nearest(queries, gallery, top, excluded=None, chunk_size=2**16):
    """(similarities, indices) [Q, top] of each query's nearest images of the gallery, best first.

    queries [Q, d] and gallery [M, d] are L2-normalised; excluded [Q] is the gallery's index of the
    query itself. Memory: [Q, chunk_size] similarities.
    """
    top = min(top, len(gallery) - (excluded is not None))
    best = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), chunk_size):
        similarity = queries @ gallery[start : start + chunk_size].T
        if excluded is not None:
            rows = ((excluded >= start) & (excluded < start + similarity.shape[1])).nonzero()
            similarity[rows, excluded[rows] - start] = -math.inf
        similarity, columns = similarity.topk(min(top, similarity.shape[1]), dim=1)
        best = torch.cat([best, similarity], dim=1)
        indices = torch.cat([indices, columns + start], dim=1)
        best, order = best.topk(min(top, best.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return best, indices


def neighbours(embeddings, top, queries=None):
    """`nearest` of each image [N, d] among all others, or of the first `queries` among the rest.
    Results are on the CPU; indices are rows of `embeddings`."""
    first = queries or 0
    parts = []
    chunks = torch.arange(queries or len(embeddings), device=embeddings.device).split(256)
    for rows in progress(chunks, len(chunks), "nearest images"):
        excluded = rows if queries is None else None
        parts.append(nearest(embeddings[rows], embeddings[first:], top, excluded))
    similarities, indices = (torch.cat(part).cpu() for part in zip(*parts))
    return similarities, indices + first


@torch.inference_mode()
@exact_products()
def duplicates(embeddings, threshold, chunk_size=2048):
    """[(images, similarities)]: groups of images connected by pairs at or above `threshold`, best
    first. Each image has the similarity of its most similar one. embeddings [N, d]: L2-normalised.
    Memory: chunk_size^2 similarities and, if all reach the threshold, as many pairs."""
    count, device = len(embeddings), embeddings.device
    images = embeddings, torch.arange(count, device=device)  # each a class of its own
    best, group = torch.full((count,), -math.inf, device=device), np.arange(count)
    tiles = tiles_of(images, images, chunk_size)
    for rows, columns, similarity in similarities_of_others(images, images, tiles, "duplicates"):
        i, j = (similarity >= threshold).nonzero(as_tuple=True)
        best[rows].scatter_reduce_(0, i, similarity[i, j], "amax")
        one, other = group[rows][i.cpu()], group[columns][j.cpu()]
        if (new := one != other).any():  # most pairs connect what is connected already
            pairs = coo_array((new[new], (one[new], other[new])), shape=(count, count))
            group = connected_components(pairs, directed=False)[1][group]
    best = best.cpu().numpy()
    found = np.isfinite(best).nonzero()[0]
    found = found[np.lexsort((found, -best[found], group[found]))]
    starts = np.unique(group[found], return_index=True)[1]
    groups = [(part, best[part]) for part in np.split(found, starts[1:]) if len(part)]
    return sorted(groups, key=lambda each: -each[1][0])
