"""Nearest neighbours, exact, in memory that does not grow with the gallery."""

import torch


@torch.inference_mode()
def nearest(queries, gallery, top, chunk_size=2**16):
    """(similarities, indices) [Q, top] of each query's nearest items of the gallery, best first.

    queries [Q, d], gallery [M, d], L2-normalised, so that the dot product is the cosine. Of equally
    similar items those that come first in the gallery. Beside its arguments it holds
    [Q, chunk_size] similarities.
    """
    top = min(top, len(gallery))
    best = queries.new_full((len(queries), 0), 0.0)
    index = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), chunk_size):
        similarity = queries @ gallery[start : start + chunk_size].T
        found = torch.arange(start, start + similarity.shape[1], device=queries.device)
        best = torch.cat([best, similarity], dim=1)
        index = torch.cat([index, found.expand(len(queries), -1)], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :top], index.gather(1, order[:, :top])
    return best, index
