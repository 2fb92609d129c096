"""Metric losses, and DDML (Park et al., AAAI 2025) around any of them that has proxies.

B batch, C classes, d embedding size: embeddings [B, d], labels [B] in 0 .. C - 1, proxies [C, d].
A head [B, 2d] is [mu | s]: the mean, and the raw scale of std = softplus(s - 5). DDML expects each
head to be L2-normalised as a whole, mu and s together, which keeps std near 0.0067. ProxyAnchor and
DDML compute in float32 or better, under autocast too. This file imports no other of the repository.
"""

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
    """Rows of unit length, x / sqrt(sum x^2 + 1e-12); a zero row stays zero."""
    wide = at_least_float32(x)  # 1e-12 is 0 in half precision
    return (wide / (wide.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()).to(x.dtype)


def log_one_plus_sum_exp(x, mask):
    """[B, C] -> [C]: log(1 + sum of exp(x) over the rows in mask). Padding adds the 1 = exp(0)."""
    return F.pad(x.masked_fill(~mask, -torch.inf), (0, 0, 1, 0)).logsumexp(dim=0)


def require_fit(x, labels, C, d, halves=1):
    """ValueError unless x [B, halves * d] and labels [B] fit proxies [C, d]. The range of labels is
    checked only on the CPU: on a GPU the check would synchronise every step."""
    if x.ndim != 2 or x.shape[1] != halves * d or labels.shape != x.shape[:1]:
        raise ValueError(f"embeddings {tuple(x.shape)} and labels {tuple(labels.shape)} do not fit "
                         f"each other or {C} proxies of {d} dimensions")  # fmt: skip
    if labels.is_floating_point():
        raise ValueError(f"labels of type {labels.dtype} are not class numbers")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= C:
            raise ValueError(f"labels from {low} to {high} do not fit {C} proxies")


class ProxyAnchor(nn.Module):
    """Kim et al., CVPR 2020, eq. 4, with learnable proxies."""

    def __init__(self, num_classes, embedding_size, margin=0.1, alpha=32):
        super().__init__()
        self.margin, self.alpha = margin, alpha
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings, labels):
        """embeddings [B, d] of any length, labels [B] -> scalar."""
        require_fit(embeddings, labels, *self.proxies.shape)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, P = l2_normalize(at_least_float32(embeddings)), l2_normalize(class_proxies(self))
            c = x @ P.T                                                             # [B, C]
            # differs: the script makes one-hot targets on the CPU
            own = labels[:, None] == torch.arange(len(P), device=c.device)          # [B, C]
            attract = log_one_plus_sum_exp(-self.alpha * (c - self.margin), own)    # [C], or 0
            repel = log_one_plus_sum_exp(self.alpha * (c + self.margin), ~own)      # [C]
            return attract.sum() / own.any(dim=0).sum() + repel.mean()


def class_proxies(metric_loss):
    """The proxies [C, d], wherever the loss keeps them. ValueError if it has none."""
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
    """std = softplus(s - 5), and log std; for small s, where std may underflow, that is s - 5."""
    std = F.softplus(s - 5)
    return std, std.clamp_min(torch.finfo(std.dtype).tiny).log().minimum(s - 5)


class DDML(nn.Module):
    """The class-agnostic regulariser of AAAI 2025 around a proxy loss, whose proxies P it shares:
    total = metric + al * agnostic + be * specific + gam * split."""

    def __init__(self, metric_loss, al, be, gam, scale=23.0):
        super().__init__()
        self.metric_loss, self.al, self.be, self.gam, self.scale = metric_loss, al, be, gam, scale
        self.num_classes = len(class_proxies(metric_loss))

    def forward(self, head, head_specific, labels, noise=None):
        """head, head_specific [B, 2d]: the head of the retrieval embedding, and the specific head;
        noise: (eps, eps_s), standard normal [B, d], None: drawn here -> total, {term: scalar}."""
        with torch.autocast(head.device.type, enabled=False):
            P = l2_normalize(class_proxies(self.metric_loss))                       # [C, d]
            for x in (head, head_specific):
                require_fit(x, labels, self.num_classes, P.shape[1], halves=2)
            mu, s = at_least_float32(head).chunk(2, dim=1)                          # [B, d] each
            mu_s, s_s = at_least_float32(head_specific).chunk(2, dim=1)
            eps, eps_s = noise if noise is not None else (torch.randn_like(mu) for _ in range(2))
            if eps.shape != mu.shape or eps_s.shape != mu.shape:
                raise ValueError(f"noise of {tuple(eps.shape)} does not fit {tuple(mu.shape)}")
            labels = labels.long()                                                  # int32 too
            std, _ = standard_deviation(s)
            std_s, log_std_s = standard_deviation(s_s)
            z, z_s = mu + std * eps, mu_s + std_s * eps_s                           # [B, d]

            metric = self.metric_loss(mu, labels)
            agnostic = self.agnostic(self.scale * l2_normalize(z) @ P.T)
            specific = self.specific(self.scale * l2_normalize(z_s) @ P.T, labels)
            # differs: log N(z_s; mu_s, std_s^2) - log N(z_s; 0, I) in eps_s, where nothing cancels
            split = ((z_s.square() - eps_s.square()) / 2 - log_std_s).sum(dim=1).mean()
            total = metric + self.al * agnostic + self.be * specific + self.gam * split
        terms = {"metric": metric, "agnostic": agnostic, "specific": specific, "split": split}
        return total, terms

    def agnostic(self, logits):
        """Cross-entropy of softmax(logits [B, C]) against the uniform distribution."""
        return (self.log_sum_exp(logits) - logits.mean(dim=1)).mean()

    def specific(self, logits, labels):
        """Cross-entropy of softmax(logits [B, C]) against the labels."""
        own = logits.gather(1, labels[:, None]).squeeze(1)
        return (self.log_sum_exp(logits) - own).mean()

    def log_sum_exp(self, logits):
        """[B, C] -> [B], relative to `scale`, the greatest possible logit, as in ShardedDDML."""
        return self.scale + (logits.logsumexp(dim=1) - self.scale).exp().log()


class Mined(nn.Module):
    """A loss on the pairs or triplets that a miner chooses."""

    def __init__(self, loss, miner):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings, labels):
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


class Choice(NamedTuple):
    """A value of --loss. None: the loss has no such setting, and its flag is refused."""

    make: Callable  # (C, d, margin, scale) -> loss(embeddings, labels)
    margin: float | None
    scale: float | None
    lr_factor: float | None  # of its proxies' learning rate; None: it has no proxies


def triplet(C, d, margin, scale):
    miner = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
    return Mined(pml.TripletMarginLoss(margin=margin), miner)


def multi_similarity(C, d, margin, scale):
    miner = miners.MultiSimilarityMiner(epsilon=0.1)
    return Mined(pml.MultiSimilarityLoss(alpha=2, beta=scale, base=margin), miner)


def n_pair(C, d, margin, scale):  # Sohn, NIPS 2016: dot products, not cosines
    return pml.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))


# Margins and scales are the library's; those of Proxy_NCA and of the pair losses are from the
# Proxy-Anchor authors' script. ArcFace's margin is in degrees. lr_factor is as published for
# Proxy_Anchor, Proxy_NCA and SoftTriple (Qian et al., ICCV 2019). The other proxy losses have 100
# too, untuned: their class weights start at random, beside a pretrained network.
LOSSES = {
    # name                   constructor: C, d, margin, scale                 margin scale lr_factor
    "Proxy_Anchor":    Choice(ProxyAnchor,                                       0.1,   32,  100),
    "Proxy_NCA":       Choice(lambda C, d, m, s: pml.ProxyNCALoss(
                           C, d, softmax_scale=s),                              None,   32,    1),
    "NormSoftmax":     Choice(lambda C, d, m, s: pml.NormalizedSoftmaxLoss(
                           C, d, temperature=1 / s),                            None,   20,  100),
    "CosFace":         Choice(lambda C, d, m, s: pml.CosFaceLoss(
                           C, d, margin=m, scale=s),                            0.35,   64,  100),
    "ArcFace":         Choice(pml.ArcFaceLoss,                                  28.6,   64,  100),
    "SoftTriple":      Choice(lambda C, d, m, s: pml.SoftTripleLoss(
                           C, d, la=s, margin=m),                               0.01,   20,  100),
    "Contrastive":     Choice(lambda C, d, m, s: pml.ContrastiveLoss(neg_margin=m),
                                                                                 0.5, None, None),
    "Triplet":         Choice(triplet,                                           0.1, None, None),
    "MultiSimilarity": Choice(multi_similarity,                                  0.5,   50, None),
    "NPair":           Choice(n_pair,                                           None, None, None),
}  # fmt: skip
PROXY_LOSSES = [name for name, choice in LOSSES.items() if choice.lr_factor is not None]
