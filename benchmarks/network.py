"""A training step and an embedding on the CPU, beside a plain network's: the same layers, one by
one on NCHW maps, and a training step without train.py's guards."""

import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_value_

from benchmarks.timing import alternate, peak_mb, report
from losses import DDML, ProxyAnchor
from net import EmbeddingNet, create_model, place
from net.bn_inception import BNInception
from train import build_optimizer, build_parser, prepare_epoch, train_step

B, SIZE = 16, 224


class Plain(BNInception):
    """Convolution, batch norm, ReLU and pooling: each a pass of its own, in the paper's order."""

    def _apply_conv(self, name, x, max_pool=False):
        conv, bn = getattr(self, name), getattr(self, f"{name}_bn")
        x = F.relu(bn(conv(x)), inplace=True)
        return F.max_pool2d(x, 3, 2, ceil_mode=True) if max_pool else x

    def _pool_and_project(self, name, x, pool):
        pooled = F.max_pool2d if pool == "max" else F.avg_pool2d
        return self._apply_conv(name, pooled(x, 3, 1, padding=1))


def plain_step(model, criterion, optimizer, images, labels):
    optimizer.zero_grad()
    loss, _ = criterion(*model(images), labels)
    loss.backward()
    clip_grad_value_([*model.parameters(), *criterion.parameters()], 10)
    optimizer.step()


def make_side(model, make_optimizer, train):
    """(a training step, an embedding) of `model`: functions without arguments."""
    criterion = DDML(ProxyAnchor(100, 512), al=1.0, be=0.1, gam=1e-5)
    optimizer = make_optimizer(model, criterion)
    images, labels = torch.randn(B, 3, SIZE, SIZE), torch.arange(B)

    def step():
        prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
        train(model, criterion, optimizer, images, labels)

    def embed():
        model.eval()
        with torch.inference_mode():
            model.embed(images)

    return step, embed


def our_side():
    def optimizer(model, criterion):
        return build_optimizer(build_parser().parse_args([]), model, criterion)[0]

    model = create_model("bn_inception", 512, disent=True)
    return make_side(place(model, torch.device("cpu")), optimizer, train_step)


def plain_side():
    def optimizer(model, criterion):
        return torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-4)

    return make_side(EmbeddingNet(Plain(), 512, disent=True, l2_norm=True), optimizer, plain_step)


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
    ours, peer = our_side(), plain_side()
    report([
        measure(name, *pair, rounds=7)
        for name, pair in zip(("training step", "embedding"), zip(ours, peer))
    ], __doc__)  # fmt: skip
