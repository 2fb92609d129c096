"""A training step and an embedding on the CPU, beside the same network on plain NCHW maps."""

import torch

from benchmarks.timing import alternate, peak_mb, report
from losses import DDML, ProxyAnchor
from net import create_model, place
from train import prepare_epoch, train_step

B, SIZE = 16, 224


def make_sides(placed):
    torch.manual_seed(0)
    model = create_model("bn_inception", 512, disent=True)
    model = place(model, torch.device("cpu")) if placed else model
    criterion = DDML(ProxyAnchor(100, 512), al=1.0, be=0.1, gam=1e-5)
    images, labels = torch.randn(B, 3, SIZE, SIZE), torch.arange(B)
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-4)

    def step():
        prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
        train_step(model, criterion, optimizer, images, labels)

    def embed():
        model.eval()
        with torch.inference_mode():
            model.embed(images)

    return step, embed


def measure(name, ours, peer, rounds):
    seconds = alternate({"ours": ours, "peer": peer}, rounds)
    return {
        "what": name,
        "ours images/s": B / seconds["ours"],
        "NCHW images/s": B / seconds["peer"],
        "ours / NCHW": seconds["peer"] / seconds["ours"],
        "peak MB": peak_mb(),
    }


if __name__ == "__main__":
    ours, peer = make_sides(placed=True), make_sides(placed=False)
    report([
        measure(name, *pair, rounds=7)
        for name, pair in zip(("training step", "embedding"), zip(ours, peer))
    ], __doc__)  # fmt: skip
