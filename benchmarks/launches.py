"""What a GPU would be asked to do, counted on the CPU: launches and waits of a training step of
bn_inception, of a save, and of a batch of crops under --cache gpu; waits of each loss.

A launch is an operation but a view, an empty tensor or a wait. On a GPU one that takes a list, such
as `_foreach_copy_`, is a few kernels. A wait is an operation whose result the host needs."""

import shlex
from collections import Counter
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import report
from loading.augment import random_numbers
from loading.cache import start_of_each
from loading.crops import DeviceBatches
from loading.loader import Loading
from losses import LOSSES
from recipe import build_training, loss_noise, prepare_epoch, settle_loss, train_step
from runs.checkpoint import capture, largest_of
from tests.operations import Waits
from train import build_parser

B, CLASSES = 4, 100
NOT_LAUNCHED = ("empty", "new_empty", "_local_scalar_dense")  # nothing, or a copy to the host
CUB = "--dataset cub --disent True --al 1.0 --be 0.1 --gam 0.00001 --weights none "


class Launches(TorchDispatchMode):
    """In a `with`: `names` {operation: how often}, and `nbytes` of operands and results."""

    def __init__(self):
        super().__init__()
        self.names, self.nbytes = Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name, kind = operation.overloadpacket.__name__, operation.namespace
        if kind == "aten" and not operation.is_view and not name.startswith(NOT_LAUNCHED):
            self.names[name] += 1
            tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, out)))
            self.nbytes += sum(x.nbytes for x in tensors)
        return out


def trained(flags):
    """(Training of the CUB command after a step, a function that makes another), on the CPU."""
    args = build_parser().parse_args(shlex.split(CUB + flags))
    settle_loss(args)
    training = build_training(args, CLASSES, torch.device("cpu"), None)
    prepare_epoch(training.model, 1, args.warm, args.bn_freeze)
    pixels = torch.randint(256, (B, 64, 64, 3), dtype=torch.uint8)

    def step():
        noise = loss_noise((B, args.embedding_size), training.device)
        return train_step(training.model, training.criterion, training.optimizer,
                          training.model.prepare(pixels), torch.arange(B), noise)  # fmt: skip

    step()
    return training, step


def counted(function):
    """The Launches of a call, with `waits`, as on a GPU: there, labels are not looked at."""
    with mock.patch("losses.require_fit"), Waits() as waits, Launches() as launches:
        function()
    launches.waits = len(waits.seen)
    return launches


def counted_loss(name):
    """Of a loss, forward and backward, after a first call."""
    choice, labels = LOSSES[name], torch.arange(45).repeat_interleave(4)
    loss = choice.make(CLASSES, 512, choice.margin, choice.scale)

    def call():
        x = F.normalize(torch.randn(len(labels), 512)).requires_grad_()
        loss(x, labels).backward()

    call()
    return counted(call)


def a_batch_of_crops():
    """--cache gpu: 180 crops of images of CUB's usual size, a quarter of them upright, as on a GPU;
    fake tensors have no values and need none."""
    sizes = np.array([(500, 375) if i % 4 else (375, 500) for i in range(180)])
    numbers = random_numbers(0, 0, len(sizes)).tolist()
    with FakeTensorMode(), mock.patch.object(torch.Tensor, "pin_memory", lambda x: x):
        pixels = torch.empty(int(3 * sizes.prod(axis=1).sum()), dtype=torch.uint8, device="cuda")
        loading = Loading(224, 0, pixels.device)
        kept = DeviceBatches(None, np.zeros(180, int), pixels, start_of_each(sizes), sizes, loading)
        crops = [kept.crop(*key) for key in enumerate(numbers)]
        return counted(lambda: kept.batch(crops))


def rows():
    training, step = trained("--precision bf16")
    save = counted(lambda: (capture(training), largest_of(training).item()))
    found = {"step, bf16": counted(step), "save": save, "crops of a batch": a_batch_of_crops()}
    found |= {f"--loss {name}": counted_loss(name) for name in LOSSES}
    return [{"what": what, "launches": seen.names.total(), "waits": seen.waits,
             "GB": seen.nbytes / 1e9} for what, seen in found.items()]  # fmt: skip


if __name__ == "__main__":
    report(rows(), __doc__)
