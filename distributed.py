"""The processes of one run, as torchrun starts them. Without torchrun there is one, and all of this
does nothing.

A step of W processes is a step of one: each takes its rows of the batch through the network, the
heads of all are gathered in order of rank, every process computes the loss of the whole batch, and
gradients are summed before they are clipped: each differentiates a W-th of that loss. With
--shard-proxies it computes the loss from its part of the proxies, and sums over classes go over the
processes.
"""

import atexit
import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils import UserError, choose_device


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def join(gpu_id):
    """The device of this process, which joins those that torchrun has started with it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return choose_device(gpu_id)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > count:
            raise UserError(f"--nproc-per-node {here}: more processes than the {count} GPUs here")
        device = choose_device(int(os.environ["LOCAL_RANK"]))
    store, this, count = next(dist.rendezvous("env://"))
    # torchrun keeps its store: a restarted process would look for the former ones at the addresses
    # that they have left there
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=this, world_size=count)
    atexit.register(dist.destroy_process_group)
    return device


def job():
    """What tells torchrun's job, restarts included, from others; None without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return run_id and f"{run_id} {os.getppid()}"


def restarts():
    """How often torchrun has started this process anew, after one of the former ones had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def from_first(function):
    """What `function()` returns in the process of rank 0, in all of them. If it fails there, the
    others end with it."""
    if world() == 1:
        return function()
    outcome = [None]
    try:
        if rank() == 0:
            outcome = [(function(),)]
    finally:
        dist.broadcast_object_list(outcome)
    if outcome[0] is None:
        raise UserError("the first process has failed, and says why")
    return outcome[0][0]


def once_a_machine(function):
    """`from_first`, where one machine has all processes; else what it returns in each of them."""
    alike = os.environ.get("LOCAL_WORLD_SIZE") == str(world())
    return from_first(function) if alike else function()


@contextlib.contextmanager
def first_alone():
    """In a `with`, rank 0 goes first: what it downloads or draws, the others find."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def most(value):
    """The greatest `value`, a whole number, of all processes: by which they decide alike."""
    return int(all_reduced(torch.tensor(int(value)), "max"))


def parts_of(items):
    """Every process's `part` of them."""
    ends = [number * len(items) // world() for number in range(world() + 1)]
    return [items[start:stop] for start, stop in zip(ends, ends[1:])]


def part(items):
    """This process's share of a batch: rows in order of rank, of some processes one more."""
    return parts_of(items)[rank()]


def turns(items):
    """Every W-th of the items, for work that is to be added up."""
    return items[rank() :: world()]


def all_reduced(x, op="sum"):
    """x, reduced in place over all processes."""
    if world() > 1:
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def sum_gradients(parameters):
    """In one call; a parameter that has no gradient has none in any process. Where each process has
    its own part of a parameter (--shard-proxies), that part's gradient is complete."""
    if world() == 1:
        return
    whole = [p for p in parameters if not getattr(p, "is_part", False)]
    gradients = [p.grad for p in whole if p.grad is not None]
    flat = all_reduced(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(total.view_as(gradient))


class Sum(torch.autograd.Function):
    """The sum of all processes' x; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return all_reduced(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_reduced(gradient.clone())


def gather(x, count=None):
    """The whole of what each process has a `part` of, rows in order of rank: its own beside zeros,
    summed. A row's gradient is the sum of all processes'."""
    if world() == 1:
        return x
    whole = x.new_zeros(count or int(all_reduced(torch.tensor(len(x)))), *x.shape[1:])
    part(whole).copy_(x)
    return Sum.apply(whole)


def to_first(x):
    """[C, ...] of all processes' parts, in the memory of rank 0; None in the others."""
    C = int(all_reduced(torch.tensor(len(x))))
    if rank():
        dist.send(x.cpu(), 0)
        return None
    whole = torch.empty(C, *x.shape[1:], dtype=x.dtype)
    mine, *others = parts_of(whole)
    mine.copy_(x)
    for process, rows in enumerate(others, start=1):
        dist.recv(rows, process)
    return whole


def part_from_first(x):
    """This process's part of x [C, ...], whose values rank 0 has and whose shape the others."""
    mine = torch.empty_like(part(x), device="cpu")
    if rank():
        dist.recv(mine, 0)
        return mine
    for process, rows in enumerate(parts_of(x)[1:], start=1):
        dist.send(rows, process)
    return mine.copy_(part(x))


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the maps [B, C, H, W] of all processes (torch's SyncBatchNorm needs CUDA)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        kind, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        sums, pixels = x.sum(dim=(0, 2, 3)), x.numel() // x.shape[1]
        sums = Sum.apply(torch.cat([sums, sums.new_full((1,), pixels)]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = x - mean[:, None, None]
        variance = Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(kind)


def share_batch_norm(model):
    """Where BatchNorm is trained (--bn-freeze 0), over all processes."""
    if world() == 1:
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm  # its parameters, buffers and names stay
        elif isinstance(module, _BatchNorm):
            raise UserError(f"--bn-freeze 0: {type(module).__name__} layers cannot be trained in "
                            "several processes")  # fmt: skip
