"""Nearest neighbours, exact, in memory that does not grow with the gallery."""

import contextlib
import math

import torch

from utils import progress

NEIGHBOURS = 8  # in pages and exports


@contextlib.contextmanager
def exact_products():
    """As a `with` or a decorator: TensorFloat-32 and autocast are off, and restored at the end."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
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
    """`nearest` of each image [N, d] among all others, or of the first `queries` among the rest, on
    the CPU. Indices are rows of `embeddings`."""
    first = queries or 0
    parts = []
    chunks = torch.arange(queries or len(embeddings), device=embeddings.device).split(256)
    for rows in progress(chunks, len(chunks), "nearest images"):
        excluded = rows if queries is None else None
        parts.append(nearest(embeddings[rows], embeddings[first:], top, excluded))
    similarities, indices = (torch.cat(part).cpu() for part in zip(*parts))
    return similarities, indices + first
