"""Proxy-Anchor (Kim et al., CVPR 2020) and DDML (Park et al., AAAI 2025).

Shapes: B batch, C classes, d embedding size. `head` is [B, 2d]: columns [:d] the mean mu,
[d:] the raw scale s. Everything is computed in float32 or better, under autocast too, and
nothing leaves the device.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from net import l2_normalize


def at_least_float32(x):
    # differs: the script computes the loss in the network's precision
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def standard_deviation(s):
    return F.softplus(s - 5)


def log_standard_deviation(s, std):
    """log(softplus(s - 5)). Far below zero softplus(x) is exp(x), whose logarithm is x itself."""
    floor = -37.0  # exp(-37) is below the last bit of float64
    return std.clamp(min=2.718281828459045**floor).log() + (s - 5 - floor).clamp(max=0)


def cosines(x, proxies):
    """Cosine of each row of x [N, d] to each proxy [C, d]: [N, C]."""
    return l2_normalize(x) @ l2_normalize(proxies).T


class CosineTerms(torch.autograd.Function):
    """Losses of the cosines between rows and proxies, each with its gradient in closed form.

    x [T * B, d], proxies [C, d], and T terms: term t is a function of the cosines c [B, C] of the
    t-th B rows that returns (loss, factor) and leaves its gradient / factor in c. One matrix
    product serves all terms, and c is the only tensor of its size. Returns T scalars.
    """

    @staticmethod
    def forward(ctx, x, proxies, *terms):
        x_length, length = (
            (torch.linalg.vecdot(v, v)[:, None] + 1e-12).sqrt() for v in (x, proxies)
        )
        x, proxies = x / x_length, proxies / length
        c = x @ proxies.T
        losses, factors = zip(*(term(part) for term, part in zip(terms, c.chunk(len(terms)))))
        ctx.factors = factors
        ctx.save_for_backward(x, x_length, proxies, length, c)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, *outer):
        x, x_length, proxies, length, c = ctx.saved_tensors
        scale = torch.stack([g * factor for g, factor in zip(outer, ctx.factors)])  # [T]
        scale = scale.repeat_interleave(len(x) // len(scale), output_size=len(x))[:, None]
        grad_x = through_normalization(c @ proxies, x, x_length / scale)
        grad_proxies = through_normalization(c.T @ (scale * x), proxies, length)
        return grad_x, grad_proxies, *(None for _ in outer)


def through_normalization(gradient, unit, length):
    """Gradient of v from that of unit = v / length, in place: what is along v changes nothing."""
    along = torch.linalg.vecdot(unit, gradient)[:, None]
    return gradient.addcmul_(unit, along, value=-1).div_(length)


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
            (loss,) = CosineTerms.apply(
                at_least_float32(embeddings), at_least_float32(self.proxies), self.term(labels)
            )
        return loss

    def term(self, labels):
        """The loss as one of CosineTerms."""
        own = labels[:, None]  # differs: no one-hot targets, labels stay on the device

        def anchor(c):
            # A proxy's positives are the rows of its class, so sample by sample over [B, B] and
            # not proxy by proxy over [B, C]: a class of n samples is there n times, at weight 1/n.
            positive = -self.alpha * (c.gather(1, own) - self.margin)  # [B, 1]
            same = own == labels
            total = positive.T.masked_fill(~same, -torch.inf).logsumexp(dim=1)
            total = torch.logaddexp(total, torch.zeros_like(total))
            weight = 1 / same.sum(dim=1).to(c.dtype)
            attract = (total * weight).sum() / weight.sum()

            factor = self.alpha / c.shape[1]
            c.mul_(self.alpha).scatter_(1, own, -torch.inf)
            top = (c.amax(dim=0) + self.alpha * self.margin).clamp(min=0)  # [C]
            c.add_(self.alpha * self.margin - top).exp_()
            sums = c.sum(dim=0) + (-top).exp()  # exp(-top) is the 1 of log(1 + ...)
            repel = (top + sums.log()).mean()

            c.div_(sums)
            pull = (positive - total[:, None]).exp() / weight.sum()
            c.scatter_(1, own, -self.alpha / factor * pull)
            return attract + repel, factor

        return anchor


def softmax_term(scale, labels=None):
    """Cross-entropy of scale * c against the labels, or, without them, against the uniform
    distribution over all C classes; mean over the batch; as one of CosineTerms."""

    def cross_entropy(c):
        log_p = c.mul_(scale).log_softmax(dim=1)
        torch.exp(log_p, out=c)
        if labels is None:
            c.sub_(1 / c.shape[1])
            return -log_p.mean(), scale / len(c)
        own = labels[:, None]
        c.scatter_add_(1, own, torch.full_like(own, -1, dtype=c.dtype))
        return -log_p.gather(1, own).mean(), scale / len(c)

    return cross_entropy


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
            mu, s = at_least_float32(head).chunk(2, dim=1)
            mu_s, s_s = at_least_float32(head_specific).chunk(2, dim=1)
            eps, eps_s = (
                (torch.randn_like(mu), torch.randn_like(mu))
                if noise is None
                else (n.to(mu.dtype) for n in noise)
            )
            std_s = standard_deviation(s_s)
            z = mu + standard_deviation(s) * eps
            z_s = mu_s + std_s * eps_s
            metric, agnostic, specific = CosineTerms.apply(
                torch.cat([mu, z, z_s]),
                at_least_float32(self.metric_loss.proxies),
                self.metric_loss.term(labels),
                softmax_term(self.scale),
                softmax_term(self.scale, labels),
            )
            split = kl_estimate(z_s, log_standard_deviation(s_s, std_s), eps_s)
            total = metric + self.al * agnostic + self.be * specific + self.gam * split
        return total, {
            "metric": metric, "agnostic": agnostic, "specific": specific, "split": split
        }  # fmt: skip


def kl_estimate(z, log_std, eps):
    """log N(z; mu, std^2) - log N(z; 0, I) at z = mu + std * eps, summed over d, batch mean."""
    # differs: written in eps, since (z - mu) / std loses every digit where std is tiny
    return (0.5 * (z.square().sum() - eps.square().sum()) - log_std.sum()) / len(z)
