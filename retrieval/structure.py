"""How an embedding is built: the field's measures, each as its formula.

X [N, d]: L2-normalised embeddings; labels [N]. Sums are in float64. Every measure depends on N:
compare at equal N, well above d.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from losses import l2_normalize

SMALLEST = torch.finfo(torch.float32).eps  # a smaller share of a spectrum is rounding
SCALE = 23.0  # of p(k | x), as in DDML's terms


def spectrum(X, centred=False):
    """p = s / sum(s), largest first, [min(N, d)]; s: the singular values of X, or of X less its
    mean, not squared."""
    X = X.double()
    s = torch.linalg.svdvals(X - X.mean(dim=0) if centred else X)
    return s / s.sum().clamp_min(SMALLEST)


def rho(p):
    """KL(uniform || p) = mean(log(1 / d) - log p) of a spectrum that is not centred. Of p[1:],
    which is scaled to sum 1, it is rho@2. 0: all directions alike. (Roth et al., ICML 2020)"""
    p = (p / p.sum().clamp_min(SMALLEST)).clamp_min(SMALLEST)
    return (-math.log(len(p)) - p.log()).mean()


def effective_rank(p):
    """exp(entropy of p), of the spectrum of centred X. (Roy and Vetterli 2007)"""
    return (-torch.xlogy(p, p).sum()).exp()


def class_sums(X, labels):
    """Of the classes of several images: counts [C], the sum [C, d] of their x, and of |x|^2 [C]."""
    counts = labels.bincount().double()
    sums = X.new_zeros(len(counts), X.shape[1]).index_add_(0, labels, X)
    squares = X.new_zeros(len(counts)).index_add_(0, labels, X.square().sum(dim=1))
    return (part[counts > 1] for part in (counts, sums, squares))


def density(X, labels):
    """(intra, inter, intra / inter). intra: mean over classes of the mean pairwise cosine distance;
    inter: mean pairwise cosine distance of the L2-normalised means of classes. Classes of one image
    are left out."""
    n, sums, squares = class_sums(X.double(), labels)
    intra = (1 - (sums.square().sum(dim=1) - squares) / (n * (n - 1))).mean()
    means = F.normalize(sums)
    C, own = len(means), means.square().sum()
    inter = 1 - (means.sum(dim=0).square().sum() - own) / (C * (C - 1))
    return intra, inter, intra / inter


def alignment(X, labels):
    """Mean of |x - x'|^2 over all pairs of one class. (Wang and Isola, ICML 2020)"""
    n, sums, squares = class_sums(X.double(), labels)
    return 2 * (n * squares - sums.square().sum(dim=1)).sum() / (n * (n - 1)).sum()


def uniformity(X, block=1024):
    """log of the mean of exp(-2 |x - x'|^2) over all pairs. (Wang and Isola, ICML 2020)"""
    X = X.double()
    total, squares = 0, X.square().sum(dim=1)
    for first in range(0, len(X), block):
        rows, others = slice(first, first + block), slice(first, None)
        distance = squares[rows, None] + squares[others] - 2 * X[rows] @ X[others].T
        total += (-2 * distance).exp().triu(1).sum()  # of each pair once
    return (total / (len(X) * (len(X) - 1) / 2)).log()


def walks(X, labels, proxies, pairs=200, points=51, seed=0):
    """{"entropy", "slope", "entropy along": [points]} of p(k | x) = softmax(23 cos(x, P)) on
    straight ways between two images of different classes, normalised at each point. entropy: in
    nats, mean over ways and points; slope: the largest change of the top p(k | x) between two
    points, over their distance, where a way is from 0 to 1; mean over ways."""
    rng, numbers = np.random.default_rng(seed), labels.cpu().numpy()
    starts = rng.integers(len(X), size=pairs)
    ends = [rng.choice(np.flatnonzero(numbers != numbers[start])) for start in starts]
    t = torch.linspace(0, 1, points, dtype=X.dtype, device=X.device)[:, None]
    P, entropies, slopes = l2_normalize(proxies.to(X)), [], []
    for start, end in zip(starts, ends):
        way = l2_normalize((1 - t) * X[start] + t * X[end])                     # [points, d]
        log_p = (SCALE * way @ P.T).log_softmax(dim=1)                          # [points, C]
        entropies.append(-(log_p.exp() * log_p).sum(dim=1))
        slopes.append(log_p.amax(dim=1).exp().diff().abs().max() * (points - 1))
    along = torch.stack(entropies).mean(dim=0)
    return {"entropy": along.mean().item(), "slope": torch.stack(slopes).mean().item(),
            "entropy along": along.tolist()}  # fmt: skip
