"""A training step and an embedding on the CPU, beside a plain network's: the same layers, one by
one on NCHW maps, and a training step without train.py's guards."""

import torch
from torch.nn.utils import clip_grad_value_

from benchmarks.timing import alternate, peak_mb, report
from losses import DDML, ProxyAnchor
from net import create_model
from net.backbones import BACKBONES, bn_inception
from net.bn_inception import BNInception
from recipe import build_optimizer, prepare_epoch, settle_loss, train_step
from train import build_parser

B, SIZE = 16, 224


class Plain(BNInception):
    """Convolution, batch norm and ReLU: each a pass of its own over the maps."""

    def _folded(self):
        return {}


def plain_step(model, criterion, optimizer, images, labels):
    optimizer.zero_grad()
    loss, _ = criterion(*model(images), labels)
    loss.backward()
    clip_grad_value_([*model.parameters(), *criterion.parameters()], 10)
    optimizer.step()


def make_side(model, make_optimizer, train, memory_format):
    """(a training step, an embedding) of `model`: functions without arguments."""
    criterion = DDML(ProxyAnchor(100, 512), al=1.0, be=0.1, gam=1e-5)
    optimizer = make_optimizer(model, criterion)
    images = torch.randn(B, 3, SIZE, SIZE).contiguous(memory_format=memory_format)
    labels = torch.arange(B)

    def step():
        prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
        train(model, criterion, optimizer, images, labels)

    def embed():
        model.eval()
        with torch.inference_mode():
            model.embed(images)

    return step, embed


def make_sides():
    """Ours, and the plain one, of the same heads."""

    def our_optimizer(model, criterion):
        args = build_parser().parse_args([])
        settle_loss(args)
        return build_optimizer(args, model, criterion)[0]

    def plain_optimizer(model, criterion):
        return torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-4)

    BACKBONES["plain"] = lambda: bn_inception()._replace(network=Plain())
    ours, plain = (create_model(name, 512, disent=True) for name in ("bn_inception", "plain"))
    plain.to(memory_format=torch.contiguous_format)
    return (
        make_side(ours, our_optimizer, train_step, torch.channels_last),
        make_side(plain, plain_optimizer, plain_step, torch.contiguous_format),
    )


def measure(name, ours, peer, rounds):
    seconds = alternate({"ours": ours, "peer": peer}, rounds)
    return {
        "what": name,
        "ours images/s": B / seconds["ours"],
        "plain images/s": B / seconds["peer"],
        "ours / plain": seconds["peer"] / seconds["ours"],
        "peak MB": peak_mb(),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    ours, peer = make_sides()
    report([
        measure(name, *pair, rounds=7)
        for name, pair in zip(("training step", "embedding"), zip(ours, peer))
    ], __doc__)  # fmt: skip
