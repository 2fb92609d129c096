"""What a network retrieves among the images of a split."""

from typing import NamedTuple

import torch

from distributed import all_gather
from loading.loader import batches
from retrieval.embed import embed
from retrieval.metrics import fractions, hits_at_k, precision_at_r
from utils import plural, progress


class Retrieved(NamedTuple):
    scores: dict  # {"R@K": per cent}, MAP@R and R-Precision if wanted
    embeddings: torch.Tensor  # [N, d] of all images
    hits: dict  # {k: [Q], whether a query has an image of its class among its k nearest}


def evaluate(model, loader, ks, queries=None, at_r=False, watch=iter):
    """Embed the loader's images and retrieve. `watch` wraps the batches. Leaves `model` in eval
    mode."""
    loaded = progress(watch(batches(loader, model.mean.device)), len(loader), "evaluating")
    return retrieve(*map(all_gather, embed(model, loaded)), ks, queries, at_r)


def retrieve(embeddings, labels, ks, queries=None, at_r=False):
    """Retrieve with the first `queries` images from the rest, the gallery; None: with each image
    from all others. `at_r`: MAP@R and R-Precision too."""
    query, gallery = (embeddings, labels), ()
    if queries is not None:
        query = embeddings[:queries], labels[:queries]
        gallery = embeddings[queries:], labels[queries:]
    hits = hits_at_k(*query, ks, *gallery)
    scores = {f"R@{k}": fraction for k, fraction in fractions(hits).items()}
    if at_r:
        scores |= precision_at_r(*query, *gallery)
    return Retrieved({name: 100 * score for name, score in scores.items()}, embeddings, hits)


def describe(name, images):
    """One line about a split, with the R@1 that random embeddings would have."""
    labels, queries = images.labels, images.queries
    gallery = labels[queries or 0 :]
    excluded = int(queries is None)  # the query itself
    matches = gallery.bincount(minlength=len(images.classes))[labels[:queries]] - excluded
    chance = matches.double().mean() / max(len(gallery) - excluded, 1)
    counts = f"{plural(len(images), 'image')} of {plural(len(images.classes), 'class')}"
    if queries is not None:
        counts += f", {plural(queries, 'query')} against a gallery of {len(gallery):,}"
    return f"{name}: {counts} (R@1 by chance: {100 * chance:.1f} %)"
