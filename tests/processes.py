"""Steps and recalls of however many processes torchrun starts: python -m tests.processes OUT,
or, of `lacking FLAGS`, train.py where rank 1 finds no data."""

import contextlib
import os
import sys
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import recipe
import train
import utils
from distributed import from_rank_0, init_processes, rank, rows_of_this_rank, world_size
from net.backbones import BACKBONES, Backbone
from retrieval.metrics import hits_at_k, precision_at_r
from runs.checkpoint import capture
from tests import toy
from tests.operations import Operations

BATCH, CLASSES, WARM, STEPS = 11, 23, 2, 6  # of unequal shares; 23 is no other length here


class Unused(toy.Toy):
    def __init__(self):
        super().__init__()
        self.last_linear = nn.Linear(16, 3)  # as BN-Inception's classifier: it has no gradient


def trained(bn_freeze, disent=True, shard_proxies=False):
    """{name: tensor} of network, proxies, moments and losses after steps in double precision."""
    BACKBONES["unused"] = lambda: Backbone(Unused(), toy.pool)
    recipe.CLIP_VALUE = 0.02  # so that entries are clipped
    args = SimpleNamespace(
        seed=1, model="unused", embedding_size=6, disent=disent, l2_norm=True, loss="Proxy_Anchor",
        mrg=0.1, alpha=32, al=1.0, be=0.1, gam=1e-2, lr=1e-2, proxy_lr_factor=10, weight_decay=1e-4,
        optimizer="adamw", lr_decay_step=10, lr_decay_gamma=0.5, bn_freeze=bn_freeze,
        shard_proxies=shard_proxies, precision="fp32",
    )  # fmt: skip
    training = recipe.build_training(args, CLASSES, torch.device("cpu"), None)
    model, criterion = training.model.double(), training.criterion.double()
    found, largest, shapes = {}, [], set()

    def look(operation, args, result):
        shapes.update(tuple(x.shape) for x in tree_leaves(result) if torch.is_tensor(x))

    for step in range(STEPS):
        torch.manual_seed(step)
        recipe.prepare_epoch(model, step, WARM, bn_freeze)
        images, labels = torch.randn(BATCH, 3, 16, 16).double(), torch.randint(CLASSES, (BATCH,))
        noise = torch.randn(2, BATCH, 6).double()
        with Operations(look) if shard_proxies else contextlib.nullcontext():
            values = recipe.train_step(
                model, criterion, training.optimizer, rows_of_this_rank(images),
                rows_of_this_rank(labels), noise, BATCH, measured=step == STEPS - 1,
            )
        largest.append(values.pop("gradient"))
        found |= {f"{name} {step}": value for name, value in values.items()}
    assert max(largest) > recipe.CLIP_VALUE
    if shard_proxies:
        (proxies,) = criterion.parameters()
        assert len(proxies) <= -(-CLASSES // world_size()) and (BATCH, len(proxies)) in shapes
        assert world_size() == 1 or not any(CLASSES in shape for shape in shapes)
    checkpoint = capture(training)
    found |= checkpoint["model_state_dict"] | checkpoint["criterion_state_dict"]
    for number, state in checkpoint["optimizer_state_dict"]["state"].items():
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
    } | {
        f"{name}, {kept} kept": torch.tensor(value)
        for kept in (99, 2**22)
        for name, value in precision_at_r(x, y, chunk_size=16, kept=kept).items()
    }


def assert_one_call_a_machine(ranks=2):
    """As if each machine had this many."""
    here, called = rank() % ranks, []
    os.environ["LOCAL_RANK"] = str(here)

    def call(fails=()):
        called.append(rank())
        if rank() in fails:
            raise utils.UserError(f"rank {rank()} cannot")
        return rank()

    assert from_rank_0(call, each_machine=True) == rank() - here and len(called) == (here == 0)
    last = (world_size() - 1) // ranks * ranks  # the first of the last machine
    try:
        from_rank_0(partial(call, fails=(last,)), each_machine=True)
    except utils.UserError as error:
        assert str(error) == f"rank {last} cannot"
    else:
        raise AssertionError("one machine's error has not reached all")


def everything():
    assert_one_call_a_machine()
    return {
        "frozen": trained(True),
        "trained": trained(False),
        "sharded": trained(True, shard_proxies=True),
        "plain": trained(True, disent=False),
        "plain sharded": trained(True, disent=False, shard_proxies=True),
        "recalls": recalls(),
    }


def train_where_rank_1_has_no_data(flags):
    if os.environ["RANK"] == "1":
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
    train.main(flags)


def save_everything(out):
    init_processes()
    found = everything()
    if rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    _, first, *rest = sys.argv
    lacking = first == "lacking"
    utils.run(lambda: train_where_rank_1_has_no_data(rest) if lacking else save_everything(first))
