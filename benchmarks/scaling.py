"""Memory of a process, and traffic and time of its step, against classes and processes, on the CPU:
the proxies whole in each process, or in parts (--shard-proxies)."""

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import extra_mb, report
from distributed import all_reduce, init_processes, rank, rows_of_this_rank, world_size
from recipe import build_criterion, build_optimizer, train_step
from utils import run

B, D, FEATURES = 180, 512, 16
CLASSES, PROCESSES = (10_000, 30_000), (1, 2, 4)
FLAGS = {"embedding_size": D, "loss": "Proxy_Anchor", "mrg": 0.1, "alpha": 32, "al": 1.0, "be": 0.1,
         "gam": 1e-5, "disent": True, "optimizer": "adamw", "lr": 1e-4, "proxy_lr_factor": 100,
         "weight_decay": 1e-4, "lr_decay_step": 10, "lr_decay_gamma": 0.5}  # fmt: skip


class Heads(nn.Module):
    """A network so small that what is measured is the loss and its proxies."""

    disent = True

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, 2 * D) for _ in range(2))

    def heads(self):
        return self.layers

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class Traffic(TorchDispatchMode):
    """Bytes of the operands and results of all operations but views: what is read and written."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, out)))
            self.nbytes += sum(x.nbytes for x in tensors)
        return out


def two_steps(C, sharded):
    """(criterion, optimiser, traffic and seconds, both counting, of the second step)."""
    args = argparse.Namespace(**FLAGS, shard_proxies=sharded)
    torch.manual_seed(0)
    model, criterion = Heads(), build_criterion(args, C)
    optimizer, _ = build_optimizer(args, model, criterion)
    images, labels, noise = torch.randn(B, FEATURES), torch.randint(C, (B,)), torch.randn(2, B, D)
    for _ in range(2):
        start = time.perf_counter()
        with Traffic() as traffic:
            mine = rows_of_this_rank(images), rows_of_this_rank(labels)
            train_step(model, criterion, optimizer, *mine, noise, B)
    return criterion, optimizer, traffic.nbytes, time.perf_counter() - start


def measure(C, sharded):
    """A row of the table, each figure the greatest of all processes."""
    (criterion, optimizer, traffic, seconds), peak = extra_mb(lambda: two_steps(C, sharded))
    (proxies,) = criterion.parameters()
    moments = [x for x in optimizer.state[proxies].values() if x.ndim]
    held = [sum(x.nbytes for x in kept) / 2**20 for kept in ([proxies, proxies.grad], moments)]
    found = torch.tensor([*held, peak, traffic / 2**20, seconds])
    return {
        "classes": C,
        "processes": world_size(),
        "proxies": f"{len(proxies):,} each" if sharded else "all in each",
        **dict(zip(("with gradient MB", "moments MB", "peak MB", "traffic MB", "step s"),
                   all_reduce(found, "max").tolist())),
    }  # fmt: skip


def measure_processes(count):
    """The rows of `count` processes, which torchrun starts."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m",
               "benchmarks.scaling"]  # fmt: skip
    # what is freed is given back at once: a peak is what is held, not what malloc keeps
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    printed = subprocess.run([sys.executable, "-m", *command], check=True, text=True,
                             stdout=subprocess.PIPE, env=environment).stdout  # fmt: skip
    return json.loads(printed.splitlines()[-1])


def measure_here():
    """In each process: prints the rows, once."""
    init_processes()
    two_steps(100, False)  # what the first step alone takes
    rows = [measure(C, sharded) for C in CLASSES for sharded in (False, True)[: world_size()]]
    if rank() == 0:
        print(json.dumps(rows))


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run(measure_here)
    else:
        report([row for count in PROCESSES for row in measure_processes(count)], __doc__)
