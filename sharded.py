"""--shard-proxies: Proxy-Anchor and DDML where each rank holds the proxies of C / W classes.

Sums over classes are all-reduced. Results are those of losses.py; checkpoints hold all proxies.
"""

import math

import torch
import torch.distributed as dist
from torch import nn

from distributed import AllReduceSum, all_reduce, rank, rows_of_this_rank, split_rows, world_size
from losses import DDML, at_least_float32, l2_normalize, log_one_plus_sum_exp, require_fit
from utils import UserError

sum_over_ranks = AllReduceSum.apply


def initial_proxies(C, d, block=2**16):
    """This rank's rows of [C, d], kaiming-normal (fan_out). Every rank draws all blocks and keeps
    its own rows, so the proxies do not depend on the number of ranks."""
    here = rows_of_this_rank(range(C))
    proxies = torch.empty(len(here), d)
    for first in range(0, C, block):
        drawn = torch.empty(min(block, C - first), d).normal_(std=math.sqrt(2) / math.sqrt(C))
        held = drawn[max(here.start - first, 0) : max(here.stop - first, 0)]
        proxies[max(first - here.start, 0) :][: len(held)] = held
    return proxies


class ShardedProxyAnchor(nn.Module):
    """losses.ProxyAnchor, with `proxies` [C / W, d] of this rank's classes."""

    def __init__(self, num_classes, embedding_size, margin=0.1, alpha=32):
        super().__init__()
        if num_classes < world_size():
            raise UserError(f"--shard-proxies: {num_classes} classes are fewer than the "
                            f"{world_size()} processes")  # fmt: skip
        self.num_classes, self.margin, self.alpha = num_classes, margin, alpha
        self.proxies = nn.Parameter(initial_proxies(num_classes, embedding_size))

    def own(self, labels):
        """[B, C / W]: whether the class is the label's."""
        here = rows_of_this_rank(range(self.num_classes))
        return labels[:, None] == torch.arange(here.start, here.stop, device=labels.device)

    def forward(self, embeddings, labels):
        require_fit(embeddings, labels, self.num_classes, self.proxies.shape[1])
        with torch.autocast(embeddings.device.type, enabled=False):
            x = l2_normalize(at_least_float32(embeddings))
            c = x @ l2_normalize(at_least_float32(self.proxies)).T                  # [B, C / W]
            own = self.own(labels)
            attract = log_one_plus_sum_exp(-self.alpha * (c - self.margin), own)    # [C / W]
            repel = log_one_plus_sum_exp(self.alpha * (c + self.margin), ~own)
            positive = sum_over_ranks(own.any(dim=0).sum())
            return (sum_over_ranks(attract.sum()) / positive
                    + sum_over_ranks(repel.sum()) / self.num_classes)  # fmt: skip


class ShardedDDML(DDML):
    """losses.DDML around a ShardedProxyAnchor, with logits [B, C / W]."""

    def __init__(self, metric_loss, *weights):
        super().__init__(metric_loss, *weights)
        self.num_classes = metric_loss.num_classes

    def agnostic(self, logits):
        mean = sum_over_ranks(logits.sum(dim=1)) / self.num_classes
        return (self.log_sum_exp(logits) - mean).mean()

    def specific(self, logits, labels):
        own = sum_over_ranks((logits * self.metric_loss.own(labels)).sum(dim=1))
        return (self.log_sum_exp(logits) - own).mean()

    def log_sum_exp(self, logits):
        return self.scale + sum_over_ranks((logits.logsumexp(dim=1) - self.scale).exp()).log()


def sharded_parameters(criterion):
    """The parameters that are split over the ranks: their gradients need no all-reduce."""
    return {loss.proxies for loss in criterion.modules() if isinstance(loss, ShardedProxyAnchor)}


def map_proxies(checkpoint, function):
    """The checkpoint with function(x) for x: the proxies, and each of the optimiser's moments."""
    optimizer = checkpoint["optimizer_state_dict"]
    proxies = set(optimizer["param_groups"][-1]["params"])
    state = dict(optimizer["state"])
    for number in proxies & state.keys():
        state[number] = {name: function(x) if x.ndim else x for name, x in state[number].items()}
    criterion = {name: function(x) for name, x in checkpoint["criterion_state_dict"].items()}
    optimizer = {**optimizer, "state": state}
    return {**checkpoint, "criterion_state_dict": criterion, "optimizer_state_dict": optimizer}


def gather_on_rank_0(x):
    """[C / W, ...] of each rank -> [C, ...] in the memory of rank 0, None in the others."""
    C = int(all_reduce(torch.tensor(len(x))))
    if rank():
        dist.send(x.cpu(), 0)
        return None
    gathered = torch.empty(C, *x.shape[1:], dtype=x.dtype)
    mine, *others = split_rows(gathered)
    mine.copy_(x)
    for source, rows in enumerate(others, start=1):
        dist.recv(rows, source)
    return gathered


def scatter_from_rank_0(x):
    """x [C, ...] has values on rank 0 and is on `meta` elsewhere -> this rank's rows."""
    mine = torch.empty_like(rows_of_this_rank(x), device="cpu")
    if rank():
        dist.recv(mine, 0)
        return mine
    for destination, rows in enumerate(split_rows(x)[1:], start=1):
        dist.send(rows, destination)
    return mine.copy_(rows_of_this_rank(x))
