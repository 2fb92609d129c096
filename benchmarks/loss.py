"""Forward and backward of all DDML terms beside pytorch-metric-learning's plain Proxy-Anchor."""

import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss

from benchmarks.timing import alternate, peak_mb, report
from losses import DDML, ProxyAnchor

B, D = 180, 512


def measure(num_classes, rounds):
    torch.manual_seed(0)
    head, head_specific = (torch.nn.functional.normalize(torch.randn(B, 2 * D)) for _ in range(2))
    noise, labels = torch.randn(2, B, D), torch.randint(num_classes, (B,))
    ours = DDML(ProxyAnchor(num_classes, D), al=1.0, be=0.1, gam=1e-5)
    peer = ProxyAnchorLoss(num_classes, D, margin=0.1, alpha=32)
    inputs = [head.requires_grad_(), head_specific.requires_grad_()]
    proxies = ours.metric_loss.proxies.detach()
    rows, grad = torch.randn(3 * B, D), torch.randn(3 * B, num_classes)

    def run_ours():
        for x in (*inputs, ours.metric_loss.proxies):
            x.grad = None
        ours(*inputs, labels, noise)[0].backward()

    mu = head.detach()[:, :D].clone().requires_grad_()

    def run_peer():
        mu.grad = peer.proxies.grad = None
        peer(mu, labels).backward()

    def run_products():
        """The three matrix products that no implementation can do without."""
        rows @ proxies.T, grad @ proxies, grad.T @ rows

    seconds = alternate({"ours": run_ours, "peer": run_peer, "products": run_products}, rounds)
    return {
        "classes": num_classes,
        "ours ms": 1e3 * seconds["ours"],
        "PML Proxy-Anchor ms": 1e3 * seconds["peer"],
        "products alone ms": 1e3 * seconds["products"],
        "ours / PML": seconds["ours"] / seconds["peer"],
        "ours / products": seconds["ours"] / seconds["products"],
        "peak MB": peak_mb(),
    }


if __name__ == "__main__":
    report([measure(100, 60), measure(11318, 15)], __doc__)
