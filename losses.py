"""Proxy-Anchor (Kim et al., CVPR 2020) and DDML (Park et al., AAAI 2025).

Shapes: B batch, C classes, d embedding size. `head` is [B, 2d]: columns [:d] the mean mu,
[d:] the raw scale s. Everything is computed in float32 or better, under autocast too, and
nothing leaves the device.
"""

import torch
from torch import nn
from torch.nn import functional as F

from net import l2_normalize


def at_least_float32(x):
    # differs: the script computes the loss in the network's precision
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cosines(x, proxies):
    """Cosine of each row of x [N, d] to each proxy [C, d]: [N, C]."""
    return l2_normalize(x) @ l2_normalize(proxies).T


def log_std(s):
    """log(softplus(s - 5)). Far below zero softplus(x) is exp(x), whose logarithm is x itself."""
    x, floor = s - 5, -37.0  # exp(-37) is below the last bit of float64
    return torch.where(x > floor, F.softplus(x.clamp(min=floor)).log(), x)


def sample(head, noise):
    """z = mu + std * eps with std = softplus(s - 5): [B, d]. Also returns log std [B, d]."""
    mu, s = head.chunk(2, dim=1)
    return mu + F.softplus(s - 5) * noise, log_std(s)


class ProxyAnchor(nn.Module):
    """Proxy-Anchor with learnable proxies [C, d], eq. 4 of the paper."""

    def __init__(self, num_classes, embedding_size, margin=0.1, alpha=32):
        super().__init__()
        self.margin, self.alpha = margin, alpha
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, embeddings, labels):
        """embeddings [B, d] of any length, labels [B] -> scalar loss."""
        with torch.autocast(embeddings.device.type, enabled=False):
            c = cosines(at_least_float32(embeddings), at_least_float32(self.proxies))
            return self.from_cosines(c, labels)

    def from_cosines(self, c, labels):
        """c [B, C], labels [B] -> scalar loss."""
        own = labels[:, None]  # differs: no one-hot targets, labels stay on the device
        # A proxy's positives are the rows of its class, so sample by sample over [B, B] instead of
        # proxy by proxy over [B, C]: a class of n samples has its term n times, at weight 1/n.
        positive = -self.alpha * (c.gather(1, own) - self.margin)  # [B, 1]
        same = own == labels
        hidden = torch.finfo(c.dtype).min / 2  # as good as -inf, and its gradient is 0, not NaN
        attract = _log1p_sum_exp(positive.T.masked_fill(~same, hidden), dim=1)
        weight = 1 / same.sum(dim=1).to(c.dtype)

        negative = (self.alpha * (c + self.margin)).scatter(1, own, hidden)
        repel = _log1p_sum_exp(negative, dim=0)
        return (attract * weight).sum() / weight.sum() + repel.mean()


def _log1p_sum_exp(x, dim):
    """log(1 + sum exp x), without overflow."""
    total = x.logsumexp(dim)
    return torch.logaddexp(total, torch.zeros_like(total))


class DDML(nn.Module):
    """The disentanglement regulariser around a proxy loss: metric + al * agnostic
    + be * specific + gam * split. All terms share `metric_loss.proxies`."""

    def __init__(self, metric_loss, al, be, gam, scale=23.0):
        super().__init__()
        self.metric_loss = metric_loss
        self.al, self.be, self.gam, self.scale = al, be, gam, scale

    def forward(self, head, head_specific, labels, noise=None):
        """head, head_specific [B, 2d]; labels [B]; noise: the pair (eps, eps_specific), each
        [B, d] standard normal, drawn here when None -> total, {term's name: unweighted scalar}."""
        with torch.autocast(head.device.type, enabled=False):
            head, head_specific = at_least_float32(head), at_least_float32(head_specific)
            proxies = at_least_float32(self.metric_loss.proxies)
            mu = head.chunk(2, dim=1)[0]
            eps, eps_specific = (
                (torch.randn_like(mu), torch.randn_like(mu))
                if noise is None
                else (n.to(mu.dtype) for n in noise)
            )
            z, _ = sample(head, eps)
            z_s, log_std_s = sample(head_specific, eps_specific)
            # one product for the three blocks of similarities
            c, c_z, c_zs = cosines(torch.cat([mu, z, z_s]), proxies).chunk(3)  # each [B, C]

            terms = {
                "metric": self.metric_loss.from_cosines(c, labels),
                "agnostic": uniform_cross_entropy(self.scale * c_z),
                "specific": F.cross_entropy(self.scale * c_zs, labels),
                "split": split(z_s, log_std_s, eps_specific),
            }
            total = (
                terms["metric"]
                + self.al * terms["agnostic"]
                + self.be * terms["specific"]
                + self.gam * terms["split"]
            )
        return total, terms


def uniform_cross_entropy(logits):
    """Cross-entropy against the uniform distribution over all C classes, mean over the batch."""
    return (logits.logsumexp(dim=1) - logits.mean(dim=1)).mean()


def split(z, log_std, eps):
    """log N(z; mu, std^2) - log N(z; 0, I) at z = mu + std * eps, summed over d, batch mean."""
    # differs: written in eps, since (z - mu) / std loses every digit where std is tiny
    return (0.5 * (z.square() - eps.square()) - log_std).sum(dim=1).mean()
