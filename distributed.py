"""The processes of one run, as torchrun starts them; without torchrun there is one.

W processes make the step that one would: heads are gathered in order of rank, every rank computes
the loss of the gathered batch and backpropagates loss / W, and gradients are summed, then clipped.
"""

import contextlib
import os

import torch
import torch.distributed as dist

from utils import UserError, choose_device


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def init_processes(gpu_id=None):
    """Joins the processes that torchrun has started, if it has; returns this one's device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return choose_device(gpu_id)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > count:
            raise UserError(f"--nproc-per-node {here}: more processes than the {count} GPUs here")
        device = choose_device(int(os.environ["LOCAL_RANK"]))
    store, this, count = next(dist.rendezvous("env://"))
    # torchrun keeps its store over restarts: new processes would find the addresses of the old ones
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=this, world_size=count)
    return device


def job():
    """Identifies torchrun's job, the same after a restart; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return run_id and f"{run_id} {os.getppid()}"


def restarts():
    """How often torchrun has started this process anew, after one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def from_rank_0(function, for_others=lambda result: result, each_machine=False):
    """Rank 0 calls `function`, the others return for_others(its result). With `each_machine` the
    first rank of each machine calls it, for the others there. All ranks get an error."""
    if world_size() == 1:
        return function()
    first = rank() - int(os.environ["LOCAL_RANK"]) if each_machine else 0
    outcome = [None, f"rank {first} has failed" if rank() == first else None]
    try:
        if rank() == first:
            result = function()
            outcome = [for_others(result), None]
    except UserError as error:
        outcome = [None, str(error)]
    finally:  # a bug on that rank ends the others too
        outcomes = [outcome]
        if each_machine:
            outcomes *= world_size()
            dist.all_gather_object(outcomes, outcome)
        else:
            dist.broadcast_object_list(outcome)
    for _, error in outcomes:
        if error:
            raise UserError(error)
    return result if rank() == first else outcomes[first][0]


@contextlib.contextmanager
def rank_0_first():
    """In a `with`: the other ranks wait, and find what rank 0 has downloaded or drawn."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def split_rows(items):
    """[each rank's rows], contiguous; where W does not divide them, some ranks have one more."""
    ends = [number * len(items) // world_size() for number in range(world_size() + 1)]
    return [items[start:stop] for start, stop in zip(ends, ends[1:])]


def rows_of_this_rank(items):
    return split_rows(items)[rank()]


def round_robin(items):
    """This rank's share of work whose results are all-reduced: every W-th item."""
    return items[rank() :: world_size()]


def all_reduce(x, op="sum"):
    """x, reduced in place over all ranks."""
    if world_size() > 1:
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def all_reduce_max(number):
    """The greatest of all ranks' gathered numbers: what one rank knows, all act on."""
    return int(all_reduce(torch.tensor(int(number)), "max"))


def barrier():
    """Wait for all ranks, on the CPU."""
    all_reduce_max(0)


def all_reduce_gradients(parameters):
    """Sums gradients over ranks, in one call. The same parameters must have one in every rank."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    # as they lie in memory, the same in all ranks; in another order each would be a copy of its own
    flat = all_reduce(torch.cat([g.as_strided((g.numel(),), (1,)) for g in gradients]))
    totals = flat.split([g.numel() for g in gradients])
    totals = [total.as_strided(g.shape, g.stride()) for total, g in zip(totals, gradients)]
    torch._foreach_copy_(gradients, totals)


class AllReduceSum(torch.autograd.Function):
    """The sum of all ranks' x; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.clone())


def all_gather(x, count=None):
    """Differentiable all-gather in order of rank: own rows in [count, ...] zeros, all-reduced."""
    if world_size() == 1:
        return x
    gathered = x.new_zeros(count or int(all_reduce(torch.tensor(len(x)))), *x.shape[1:])
    rows_of_this_rank(gathered).copy_(x)
    return AllReduceSum.apply(gathered)
