"""Metric losses, and DDML (Park et al., AAAI 2025) around any of them that has proxies.

B batch, C classes, d embedding size: embeddings [B, d], labels [B] in 0 .. C - 1, proxies [C, d].
A head [B, 2d] is [mu | s]: the mean, and the raw scale of std = softplus(s - 5). All is computed in
float32 or better, under autocast too. This file needs nothing else of the repository.

Several processes may hold a part of the proxies each (`Classes`): what is [C] or [B, C] below is
that part of it, and sums over the classes are summed over processes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as pml
from torch import nn
from torch.nn import functional as F


def at_least_float32(x):
    # differs: the script computes the loss in the network's precision
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def l2_normalize(x):
    """Rows of unit length; a zero row stays zero."""
    return x / (x.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()


class Classes(NamedTuple):
    """The C classes, and which of them have their proxies here: all, or a process's part. `total`
    makes sums over these those over all C; its gradient is the sum of all processes'."""

    C: int
    here: range
    total: Callable = lambda x: x

    def own(self, labels):
        """[B, C], whether a class is the label's."""
        here = torch.arange(self.here.start, self.here.stop, device=labels.device)
        return labels[:, None] == here

    def log_sum_exp(self, x, most):
        """log(sum of exp x over the classes), none of them above `most`: [B, C] -> [B]."""
        return most + self.total((x.logsumexp(dim=1) - most).exp()).log()


def initial_proxies(classes, d, block=2**16):
    """[C, d], kaiming-normal (fan_out). Drawn a block after the other, whoever holds which: a part
    is what it is in the whole, and no process has more than a block beside it."""
    C, here = classes.C, classes.here
    proxies = torch.empty(len(here), d)
    for first in range(0, C, block):
        drawn = torch.empty(min(block, C - first), d).normal_(std=math.sqrt(2) / math.sqrt(C))
        held = drawn[max(here.start - first, 0) : max(here.stop - first, 0)]
        proxies[max(first - here.start, 0) :][: len(held)] = held
    return proxies


def require_fit(x, labels, C, d, halves=1):
    """ValueError unless x [B, halves * d] and labels [B] belong to proxies [C, d]. That labels are
    below C is looked at on the CPU alone: on a GPU every step would wait for the answer."""
    if x.ndim != 2 or x.shape[1] != halves * d or labels.shape != x.shape[:1]:
        raise ValueError(f"embeddings {tuple(x.shape)} and labels {tuple(labels.shape)} do not fit "
                         f"each other or {C} proxies of {d} dimensions")  # fmt: skip
    if labels.is_floating_point():
        raise ValueError(f"labels of type {labels.dtype} are no class numbers")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= C:
            raise ValueError(f"labels from {low} to {high} do not fit {C} proxies")


def log_one_plus_sum_exp(x, mask):
    """log(1 + sum of exp x over the rows, where mask): [B, C] -> [C]. The row of zeros is the 1."""
    return F.pad(x.masked_fill(~mask, -torch.inf), (0, 0, 1, 0)).logsumexp(dim=0)


class ProxyAnchor(nn.Module):
    """Kim et al., CVPR 2020, eq. 4, with learnable proxies."""

    def __init__(self, num_classes, embedding_size, margin=0.1, alpha=32, classes=None):
        super().__init__()
        self.margin, self.alpha = margin, alpha
        self.classes = classes or Classes(num_classes, range(num_classes))
        self.proxies = nn.Parameter(initial_proxies(self.classes, embedding_size))

    def forward(self, embeddings, labels):
        """embeddings [B, d] of any length, labels [B] -> scalar."""
        C, total = self.classes.C, self.classes.total
        require_fit(embeddings, labels, C, self.proxies.shape[1])
        with torch.autocast(embeddings.device.type, enabled=False):
            x, P = l2_normalize(at_least_float32(embeddings)), l2_normalize(class_proxies(self))
            c = x @ P.T                                                             # [B, C]
            # differs: no one-hot targets from the CPU, labels stay on the device
            own = self.classes.own(labels)                                          # [B, C]
            attract = log_one_plus_sum_exp(-self.alpha * (c - self.margin), own)    # [C], or 0
            repel = log_one_plus_sum_exp(self.alpha * (c + self.margin), ~own)      # [C]
            return total(attract.sum()) / total(own.any(dim=0).sum()) + total(repel.sum()) / C


def class_proxies(metric_loss):
    """[C, d]: where each loss keeps its proxies. ValueError for one that has none."""
    if isinstance(metric_loss, InFloat32):
        metric_loss = metric_loss.loss
    if hasattr(metric_loss, "proxies"):                     # Proxy-Anchor, Proxy-NCA: [C, d]
        return at_least_float32(metric_loss.proxies)
    several = hasattr(metric_loss, "sub_centers") or hasattr(metric_loss, "centers_per_class")
    W = metric_loss.fc if hasattr(metric_loss, "fc") else getattr(metric_loss, "W", None)
    if W is None:
        raise ValueError(f"{type(metric_loss).__name__} has no proxies, which DDML's terms need")
    if several:                             # SoftTriple, SubCenterArcFace: [d, C * centers]
        centers = at_least_float32(W).T.unflatten(0, (metric_loss.num_classes, -1))
        return l2_normalize(centers).mean(dim=1)
    return at_least_float32(W).T            # NormSoftmax, CosFace, ArcFace: [d, C]


def standard_deviation(s):
    """std = softplus(s - 5) and log std, which is s - 5 where softplus is exp and may underflow."""
    std = F.softplus(s - 5)
    return std, std.clamp_min(torch.finfo(std.dtype).tiny).log().minimum(s - 5)


class DDML(nn.Module):
    """The class-agnostic regulariser of AAAI 2025 around a proxy loss, whose proxies P it shares:
    total = metric + al * agnostic + be * specific + gam * split."""

    def __init__(self, metric_loss, al, be, gam, scale=23.0):
        super().__init__()
        class_proxies(metric_loss)  # what has none is refused here, not at the first step
        self.metric_loss, self.al, self.be, self.gam, self.scale = metric_loss, al, be, gam, scale

    def forward(self, head, head_specific, labels, noise=None):
        """head, head_specific [B, 2d], of the retrieval embedding and of the specific head; noise:
        (eps, eps_s), standard normal [B, d] each, drawn here when None -> total, {term: scalar}."""
        with torch.autocast(head.device.type, enabled=False):
            P = l2_normalize(class_proxies(self.metric_loss))                       # [C, d]
            classes = getattr(self.metric_loss, "classes", None) or Classes(len(P), range(len(P)))
            for x in (head, head_specific):
                require_fit(x, labels, classes.C, P.shape[1], halves=2)
            mu, s = at_least_float32(head).chunk(2, dim=1)
            mu_s, s_s = at_least_float32(head_specific).chunk(2, dim=1)
            eps, eps_s = noise if noise is not None else (torch.randn_like(mu) for _ in range(2))
            if eps.shape != mu.shape or eps_s.shape != mu.shape:
                raise ValueError(f"noise of {tuple(eps.shape)} does not fit {tuple(mu.shape)}")
            labels = labels.long()                                                  # int32 too
            (std, _), (std_s, log_std_s) = standard_deviation(s), standard_deviation(s_s)
            z, z_s = mu + std * eps, mu_s + std_s * eps_s                           # [B, d]

            metric = self.metric_loss(mu, labels)
            # minus the logarithms of a softmax: their mean over the classes, and the label's own
            logits, logits_s = (self.scale * l2_normalize(x) @ P.T for x in (z, z_s))   # [B, C]
            mean = classes.total(logits.sum(dim=1)) / classes.C                     # [B]
            own = classes.total((logits_s * classes.own(labels)).sum(dim=1))        # [B]
            agnostic = (classes.log_sum_exp(logits, self.scale) - mean).mean()
            specific = (classes.log_sum_exp(logits_s, self.scale) - own).mean()
            # differs: log N(z_s; mu_s, std_s^2) - log N(z_s; 0, I) in eps_s, where nothing cancels
            split = ((z_s.square() - eps_s.square()) / 2 - log_std_s).sum(dim=1).mean()

            total = metric + self.al * agnostic + self.be * specific + self.gam * split
        terms = {"metric": metric, "agnostic": agnostic, "specific": specific, "split": split}
        return total, terms


class InFloat32(nn.Module):
    """A library's loss, behind its miner if it has one, that half precision never reaches: the
    library would cast the loss's parameters to the embeddings' type."""

    def __init__(self, loss, miner=None):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings, labels):
        with torch.autocast(embeddings.device.type, enabled=False):
            x = at_least_float32(embeddings)
            labels = labels.long()
            return self.loss(x, labels, self.miner(x, labels) if self.miner else None)


class Choice(NamedTuple):
    """A value of --loss. What is None the loss does not have: it is no flag's then."""

    make: Callable  # (C, d, margin, scale) -> loss(embeddings, labels)
    margin: float | None
    scale: float | None
    lr_factor: float | None  # of its parameters' learning rate; without parameters, no proxies


def triplet(C, d, margin, scale):
    mined = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
    return InFloat32(pml.TripletMarginLoss(margin=margin), mined)


def multi_similarity(C, d, margin, scale):
    mined = miners.MultiSimilarityMiner(epsilon=0.1)
    return InFloat32(pml.MultiSimilarityLoss(alpha=2, beta=scale, base=margin), mined)


def n_pair(C, d, margin, scale):  # Sohn, NIPS 2016: dot products, not cosines
    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    return InFloat32(pml.NPairsLoss(distance=dot))


# Margins and scales of Proxy_NCA and of the pair losses are those of the Proxy-Anchor authors'
# script, the others the library's; ArcFace's margin is in degrees. Learning-rate factors are as
# published for Proxy_Anchor, Proxy_NCA and SoftTriple (Qian et al., ICCV 2019); the rest have 100
# too, untuned: class weights that start anywhere, beside a pretrained network.
LOSSES = {
    # name                     constructor                               margin  scale  lr factor
    "Proxy_Anchor":     Choice(ProxyAnchor,                                 0.1,    32,   100),
    "Proxy_NCA":        Choice(lambda C, d, margin, scale: InFloat32(
                            pml.ProxyNCALoss(C, d, softmax_scale=scale)),  None,    32,     1),
    "NormSoftmax":      Choice(lambda C, d, margin, scale: InFloat32(
                            pml.NormalizedSoftmaxLoss(C, d, 1 / scale)),   None,    20,   100),
    "CosFace":          Choice(lambda C, d, margin, scale: InFloat32(
                            pml.CosFaceLoss(C, d, margin=margin, scale=scale)), 0.35, 64, 100),
    "ArcFace":          Choice(lambda C, d, margin, scale: InFloat32(
                            pml.ArcFaceLoss(C, d, margin, scale)),         28.6,    64,   100),
    "SoftTriple":       Choice(lambda C, d, margin, scale: InFloat32(
                            pml.SoftTripleLoss(C, d, la=scale, margin=margin)), 0.01, 20, 100),
    "Contrastive":      Choice(lambda C, d, margin, scale: InFloat32(
                            pml.ContrastiveLoss(neg_margin=margin)),        0.5,  None,  None),
    "Triplet":          Choice(triplet,                                     0.1,  None,  None),
    "MultiSimilarity":  Choice(multi_similarity,                            0.5,    50,  None),
    "NPair":            Choice(n_pair,                                     None,  None,  None),
}  # fmt: skip
PROXY_LOSSES = [name for name, choice in LOSSES.items() if choice.lr_factor is not None]
