"""What a network retrieves among the images of a split."""

from typing import NamedTuple

import torch

from distributed import all_gather
from loading.loader import batches
from retrieval.embed import embed
from retrieval.metrics import hits_at_k, precision_at_r
from utils import plural, progress


class Retrieved(NamedTuple):
    scores: dict  # {"R@K": fraction}, MAP@R and R-Precision if wanted
    embeddings: torch.Tensor  # [N, d] of all images
    hits: dict  # {k: [Q], whether a query has an image of its class among its k nearest}


def evaluate(model, loader, ks, queries=None, at_r=False, watch=iter):
    """What `model` retrieves among the loader's images: each among all others, or the first
    `queries` among the rest. `at_r`: MAP@R and R-Precision too; `watch` goes around the batches.
    Leaves `model` in eval mode."""
    tested = progress(watch(batches(loader, model.mean.device)), len(loader), "evaluating")
    embeddings, labels = map(all_gather, embed(model, tested))
    sides = (embeddings, labels), ()
    if queries is not None:
        sides = ((embeddings[:queries], labels[:queries]),
                 (embeddings[queries:], labels[queries:]))  # fmt: skip
    query, gallery = sides
    hits = hits_at_k(*query, ks, *gallery)
    scores = {f"R@{k}": hit.sum().item() / len(hit) for k, hit in hits.items()}
    if at_r:
        scores |= precision_at_r(*query, *gallery)
    return Retrieved(scores, embeddings, hits)


def describe(name, images):
    """One line about a split, with the R@1 that random embeddings would have."""
    labels, q = images.labels, images.queries
    itself = int(q is None)  # a match that does not count
    gallery = labels[q or 0 :]
    matches = gallery.bincount(minlength=len(images.classes))[labels[:q]] - itself
    chance = matches.double().mean() / max(len(gallery) - itself, 1)
    found = f"{plural(len(images), 'image')} of {plural(len(images.classes), 'class')}"
    if q is not None:
        found += f", {plural(q, 'query')} against a gallery of {len(gallery):,}"
    return f"{name}: {found} (R@1 by chance: {100 * chance:.1f} %)"
