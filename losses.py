"""Proxy-Anchor (Kim et al., CVPR 2020) and DDML (Park et al., AAAI 2025).

Shapes: B batch, C classes, d embedding size. `head` is [B, 2d]: columns [:d] the mean mu,
[d:] the raw scale s. Everything is computed in float32 or better, under autocast too, and
nothing leaves the device.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def at_least_float32(x):
    # differs: the script computes the loss in the network's precision
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def softplus(x):
    """log(1 + exp x) and its derivative, at least exp(-87), about the least normal float32."""
    u = x.clamp(-87, 40).exp_()  # beyond 40 softplus(x) is x
    w = u + 1
    # On a CPU log1p takes, at times, as long as three logs. What rounding added to w, (w - 1) - u,
    # is all that log(w) lacks of log1p(u).
    return torch.maximum(w.log().addcdiv_((w - 1).sub_(u), w, value=-1), x), u / w


def log_standard_deviation(s, std):
    """log(softplus(s - 5)). Far below zero softplus(x) is exp(x), whose logarithm is x itself."""
    return torch.minimum(std.log(), s - 5)


class CosineTerms(torch.autograd.Function):
    """Losses of the cosines between rows and proxies, each with its gradient in closed form.

    x [T, B, d], proxies [C, d], and T terms, pairs (scale, loss): loss t is a function of the
    logits l [B, C], scale times the cosines of x[t], that returns (value, factor) and leaves its
    gradient / factor in l. One matrix product serves all terms, and the logits are the only
    tensor of their size. Returns T scalars.
    """

    @staticmethod
    def forward(ctx, x, proxies, *terms):
        x_length, length = row_lengths(x), row_lengths(proxies)
        unit = proxies / length
        logits = x @ unit.T  # rows are scaled below, by the pass that each term needs anyway
        values, factors = [], []
        for (scale, loss), part, part_length in zip(terms, logits, x_length):
            value, factor = loss(part.mul_(scale / part_length))
            values.append(value)
            factors.append(scale * factor)
        ctx.factors = factors
        ctx.save_for_backward(x, x_length, unit, length, logits)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *outer):
        x, x_length, unit, length, gradient = ctx.saved_tensors
        factors = torch.stack([g * factor for g, factor in zip(outer, ctx.factors)])
        scale = factors[:, None, None] / x_length  # [T, B, 1]
        grad_x = scale * x
        grad_unit = gradient.flatten(0, 1).T @ grad_x.flatten(0, 1)
        grad_proxies = across(grad_unit, unit).div_(length)
        torch.matmul(gradient, unit, out=grad_x)
        across(grad_x, x, x_length).mul_(scale)
        return grad_x, grad_proxies, *(None for _ in outer)


def row_lengths(x):
    """[..., d] -> [..., 1], never zero."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() + 1e-12).sqrt_()


def across(gradient, x, length=1):
    """The part of `gradient` across x, in place: what is along x does not turn it."""
    along = torch.linalg.vecdot(x, gradient)[..., None] / length**2
    return gradient.addcmul_(x, along, value=-1)


class Sample(torch.autograd.Function):
    """Rows that the cosines are taken of, and the split term, from both heads and their noise.

    head, head_specific [B, 2d], eps, eps_s [B, d] -> x [3, B, d]: mu, z and z_s; split, a scalar.
    """

    @staticmethod
    def forward(ctx, head, head_specific, eps, eps_s):
        (mu, s), (mu_s, s_s) = head.chunk(2, dim=1), head_specific.chunk(2, dim=1)
        # One block: of six the C library gives more back to the system after every step, and
        # getting the pages anew can take as long as a matrix product.
        kept = head.new_empty(6, *mu.shape)
        x, (z_by_s, z_s_by_s, log_std_by_s) = kept[:3], kept[3:]  # `a_by_b` is da / db
        std, slope = softplus(s - 5)
        x[0].copy_(mu)
        torch.addcmul(mu, std, eps, out=x[1])
        torch.mul(slope, eps, out=z_by_s)
        std, slope = softplus(s_s - 5)
        torch.addcmul(mu_s, std, eps_s, out=x[2])
        torch.mul(slope, eps_s, out=z_s_by_s)
        torch.div(slope, std, out=log_std_by_s)
        ctx.save_for_backward(kept)
        return x, kl_estimate(x[2], log_standard_deviation(s_s, std), eps_s)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_split):
        _, _, z_s, z_by_s, z_s_by_s, log_std_by_s = ctx.saved_tensors[0]
        grad_mu, grad_z, grad_z_s = grad_x
        grad, grad_specific = (z_s.new_empty(len(z_s), 2 * z_s.shape[1]) for _ in range(2))
        to_mu, to_s = grad.chunk(2, dim=1)
        torch.add(grad_mu, grad_z, out=to_mu)
        torch.mul(grad_z, z_by_s, out=to_s)

        outer = grad_split / len(z_s)  # of the sum of z_s^2 / 2 - log std_s
        to_mu, to_s = grad_specific.chunk(2, dim=1)
        torch.addcmul(grad_z_s, z_s, outer, out=to_mu)
        torch.mul(to_mu, z_s_by_s, out=to_s).addcmul_(log_std_by_s, outer, value=-1)
        return grad, grad_specific, None, None


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
                at_least_float32(embeddings)[None],
                at_least_float32(self.proxies),
                self.term(labels),
            )
        return loss

    def term(self, labels):
        """The loss as one of CosineTerms."""
        own = labels[:, None]  # differs: no one-hot targets, labels stay on the device
        shift = self.alpha * self.margin

        def anchor(logits):
            num_classes = logits.shape[1]
            # Both sums are log(1 + sum exp x) = top + log(exp(-top) + sum exp(x - top)), top >= 0.
            positive = shift - logits.gather(1, own)[:, 0]  # [B]
            top = logits.new_zeros(num_classes).scatter_reduce_(0, labels, positive, "amax")
            e = (positive - top[labels]).exp_()
            sums = (-top).exp_().index_add_(0, labels, e)  # 1 where a class has no positives
            present = torch.zeros_like(top).index_fill_(0, labels, 1).sum()
            attract = (top + sums.log()).sum() / present
            pull = e / sums[labels] / present

            logits.scatter_(1, own, -torch.inf)
            top = (logits.amax(dim=0) + shift).clamp_(min=0)  # [C]
            logits.add_(shift - top).exp_()
            sums = (-top).exp_().add_(logits.sum(dim=0))
            repel = (top + sums.log()).mean()

            logits.div_(sums).scatter_(1, own, -num_classes * pull[:, None])
            return attract + repel, 1 / num_classes

        return self.alpha, anchor


def softmax_term(scale, labels=None):
    """Cross-entropy of scale * cosine against the labels, or, without them, against the uniform
    distribution over all C classes; mean over the batch; as one of CosineTerms."""

    def cross_entropy(logits):
        log_p = logits.log_softmax(dim=1)
        torch.exp(log_p, out=logits)
        if labels is None:
            logits.sub_(1 / logits.shape[1])
            return -log_p.mean(), 1 / len(logits)
        own = labels[:, None]
        logits.scatter_add_(1, own, torch.full_like(own, -1, dtype=logits.dtype))
        return -log_p.gather(1, own).mean(), 1 / len(logits)

    return scale, cross_entropy


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
            if noise is None:
                mu = head[:, : head.shape[1] // 2]
                noise = torch.randn_like(mu), torch.randn_like(mu)
            x, split = Sample.apply(head, head_specific, *(eps.to(head.dtype) for eps in noise))
            metric, agnostic, specific = CosineTerms.apply(
                x,
                at_least_float32(self.metric_loss.proxies),
                self.metric_loss.term(labels),
                softmax_term(self.scale),
                softmax_term(self.scale, labels),
            )
            total = metric.add(agnostic, alpha=self.al).add(specific, alpha=self.be)
            total = total.add(split, alpha=self.gam)
        return total, {
            "metric": metric, "agnostic": agnostic, "specific": specific, "split": split
        }  # fmt: skip


def kl_estimate(z, log_std, eps):
    """log N(z; mu, std^2) - log N(z; 0, I) at z = mu + std * eps, summed over d, batch mean."""
    # differs: written in eps, since (z - mu) / std loses every digit where std is tiny
    return (0.5 * (z.square().sum() - eps.square().sum()) - log_std.sum()) / len(z)
