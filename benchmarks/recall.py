"""Recall@K and MAP@R, exact, beside a full chunked float32 product of the embeddings."""

import torch
from torch.nn import functional as F

from benchmarks.timing import alternate, extra_mb, report
from retrieval.metrics import precision_at_r, recall_at_k

D = 512


def measure(name, images, per_class, noise, ks, rounds):
    torch.manual_seed(0)
    labels = torch.arange(images) // per_class
    centres = torch.randn(int(labels[-1]) + 1, D)
    x = F.normalize(centres[labels] + noise * torch.randn(images, D))
    result, memory = extra_mb(lambda: recall_at_k(x, labels, ks))

    def product():
        for rows in x.split(1024):
            rows @ x.T

    _, memory_at_r = extra_mb(lambda: precision_at_r(x, labels))
    seconds = alternate({
        "ours": lambda: recall_at_k(x, labels, ks),
        "MAP@R": lambda: precision_at_r(x, labels),
        "product": product,
    }, rounds, 0)  # fmt: skip
    return {
        "size of": name,
        "images": images,
        "R@1": result[1],
        "ours s": seconds["ours"],
        "product s": seconds["product"],
        "ours / product": seconds["ours"] / seconds["product"],
        "MAP@R s": seconds["MAP@R"],
        "MAP@R / ours": seconds["MAP@R"] / seconds["ours"],
        "MB beyond embeddings": memory,
        "of MAP@R": memory_at_r,
    }


if __name__ == "__main__":
    report([
        measure("Cars", 8131, 83, 3.6, (1, 2, 4, 8, 16, 32), 5),
        measure("SOP", 60502, 5, 2.2, (1, 10, 100, 1000), 3),
    ], __doc__)  # fmt: skip
