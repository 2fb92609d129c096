"""The field's measures of an embedding's structure, each as its formula.

X [N, d]: L2-normalised embeddings; labels [N]. Sums are in float64. Every measure depends on N:
compare at equal N, well above d.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from distributed import all_reduce, world_size
from losses import l2_normalize, standard_deviation

SMALLEST = torch.finfo(torch.float32).eps  # a smaller share of a spectrum is rounding
SCALE = 23.0  # of p(k | x), as in DDML's terms


def spectrum(X, centred=False):
    """p = s / sum(s), largest first, [min(N, d)]; s: the singular values of X, or of X minus its
    mean, not squared."""
    X = X.double()
    s = torch.linalg.svdvals(X - X.mean(dim=0) if centred else X)
    return s / s.sum().clamp_min(SMALLEST)


def rho(p):
    """KL(uniform || p) = mean(log(1 / d) - log p) of a spectrum that is not centred; p is scaled to
    sum 1. 0: all directions alike. rho@2 is rho(p[1:]). (Roth et al., ICML 2020)"""
    p = (p / p.sum().clamp_min(SMALLEST)).clamp_min(SMALLEST)
    return (-math.log(len(p)) - p.log()).mean()


def effective_rank(p):
    """exp(entropy of p), where p is the spectrum of centred X. (Roy and Vetterli 2007)"""
    return (-torch.xlogy(p, p).sum()).exp()


def squared_distances(X):
    """|x - x'|^2 of each pair; for unit vectors that is twice the cosine distance."""
    return torch.pdist(X).double().square()


def split_by_class(X, labels):
    """[X of a class], without classes of one image."""
    return [X[labels == c] for c, n in enumerate(labels.bincount()) if n > 1]


def density(X, labels):
    """(intra, inter, intra / inter). intra: mean over classes of the mean pairwise cosine distance;
    inter: mean pairwise cosine distance of the L2-normalised means of classes. Classes of one image
    are left out."""
    classes = split_by_class(X, labels)
    intra = torch.stack([squared_distances(x).mean() / 2 for x in classes]).mean()
    means = F.normalize(torch.stack([x.double().mean(dim=0) for x in classes]))
    inter = squared_distances(means).mean() / 2
    return intra, inter, intra / inter


def alignment(X, labels):
    """Mean of |x - x'|^2 over all pairs of one class. (Wang and Isola, ICML 2020)"""
    return torch.cat([squared_distances(x) for x in split_by_class(X, labels)]).mean()


def uniformity(X):
    """log of the mean of exp(-2 |x - x'|^2) over all pairs. (Wang and Isola, ICML 2020)"""
    return (-2 * squared_distances(X)).exp().mean().log()


def entropy_and_slope(X, labels, proxies, pairs=200, points=51, seed=0):
    """{"entropy", "slope", "entropy along": [points]} of p(k | x) = softmax(23 cos(x, P)) along the
    straight line between two images of different classes, normalised at each point. entropy: in
    nats, mean over lines and points; slope: the largest change of the top p(k | x) between two
    points, over their distance, where a line is from 0 to 1; mean over lines."""
    rng, numbers = np.random.default_rng(seed), labels.cpu().numpy()
    starts = rng.integers(len(X), size=pairs)
    ends = [rng.choice(np.flatnonzero(numbers != numbers[start])) for start in starts]
    t = torch.linspace(0, 1, points, dtype=X.dtype, device=X.device)[:, None]
    P, entropies, slopes = l2_normalize(proxies.to(X)), [], []
    for start, end in zip(starts, ends):
        line = l2_normalize((1 - t) * X[start] + t * X[end])                     # [points, d]
        log_p = (SCALE * line @ P.T).log_softmax(dim=1)                          # [points, C]
        entropies.append(-(log_p.exp() * log_p).sum(dim=1))
        slopes.append(log_p.amax(dim=1).exp().diff().abs().max() * (points - 1))
    along = torch.stack(entropies).mean(dim=0)
    return {"entropy": along.mean().item(), "slope": torch.stack(slopes).mean().item(),
            "entropy along": along.tolist()}  # fmt: skip


def at_the_heads(criterion, heads, terms):
    """{name: scalar} of a batch's heads [B, 2d]: each head's mean std, and each weighted term's
    share of the gradient: its L2 norm at both heads, over the sum of all terms' norms."""
    std, std_specific = (standard_deviation(head.chunk(2, dim=1)[1])[0].mean() for head in heads)
    norms = []
    for weight, term in zip((1, criterion.al, criterion.be, criterion.gam), terms.values()):
        gradients = torch.autograd.grad(term, heads, retain_graph=True, materialize_grads=True)
        # mean over ranks: with --shard-proxies each has W times its own classes' part
        norms.append(weight * (all_reduce(torch.cat(gradients)) / world_size()).norm())
    total = sum(norms).clamp_min(1e-30)  # all may be 0
    shares = {f"share_{name}": norm / total for name, norm in zip(terms, norms)}
    return {"std": std, "std_specific": std_specific, **shares}
