"""Steps and recalls of however many processes torchrun starts: python -m tests.processes OUT"""

import sys
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

import recipe
from distributed import join, part, rank
from net.backbones import BACKBONES, Backbone
from retrieval.metrics import hits_at_k
from tests import toy

BATCH, CLASSES, WARM, STEPS = 11, 5, 2, 6  # shares of unequal size


class Unused(toy.Toy):
    def __init__(self):
        super().__init__()
        self.last_linear = nn.Linear(16, 3)  # as BN-Inception's classifier: it has no gradient


def trained(bn_freeze):
    """{name: tensor} of network, proxies, moments and losses after steps in double precision."""
    BACKBONES["unused"] = lambda: Backbone(Unused(), toy.pool)
    recipe.CLIP_VALUE = 0.02  # so that entries are clipped
    args = SimpleNamespace(
        seed=1, model="unused", embedding_size=6, disent=True, l2_norm=True, loss="Proxy_Anchor",
        mrg=0.1, alpha=32, al=1.0, be=0.1, gam=1e-2, lr=1e-2, proxy_lr_factor=10, weight_decay=1e-4,
        optimizer="adamw", lr_decay_step=10, lr_decay_gamma=0.5, bn_freeze=bn_freeze,
        precision="fp32",
    )  # fmt: skip
    training = recipe.Training(args, CLASSES, torch.device("cpu"), None)
    model, criterion = training.model.double(), training.criterion.double()
    found, largest = {}, []
    for step in range(STEPS):
        torch.manual_seed(step)
        recipe.prepare_epoch(model, step, WARM, bn_freeze)
        images, labels = torch.randn(BATCH, 3, 16, 16).double(), torch.randint(CLASSES, (BATCH,))
        noise = torch.randn(2, BATCH, 6).double()
        values = recipe.train_step(
            model, criterion, training.optimizer, part(images), part(labels), noise, BATCH
        )
        largest.append(values.pop("gradient"))
        found |= {f"{name} {step}": value for name, value in values.items()}
    assert max(largest) > recipe.CLIP_VALUE
    found |= model.state_dict() | criterion.state_dict()
    for number, state in training.optimizer.state_dict()["state"].items():
        found |= {f"{name} of {number}": value for name, value in state.items()}
    return found


def recalls():
    """Of embeddings with ties, in more tiles than processes."""
    torch.manual_seed(0)
    x = F.normalize(torch.randint(-1, 2, (90, 4)).float() + 0.1)
    y = torch.randint(9, (90,))
    hits = hits_at_k(x, y, (1, 4, 16), chunk_size=16)
    against = hits_at_k(x[:20], y[:20], (1, 4), x[20:], y[20:], chunk_size=8)
    return {f"hits {k}": hit for k, hit in hits.items()} | {
        f"hits of queries {k}": hit for k, hit in against.items()
    }


def everything():
    return {"frozen": trained(True), "trained": trained(False), "recalls": recalls()}


if __name__ == "__main__":
    join(0)
    found = everything()
    if rank() == 0:
        torch.save(found, sys.argv[1])
