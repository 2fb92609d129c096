"""BatchNorm over all ranks, for --bn-freeze 0. (torch's SyncBatchNorm needs CUDA, and waits for it
three times a layer: it indexes by a mask.)"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distributed import AllReduceSum, world_size
from utils import UserError


class SharedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, of maps [B, C, H, W] of which each rank has some rows."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        # moments about the running mean, which all ranks know: one all-reduce, and little cancels
        x = x - self.running_mean[:, None, None]
        sums = [x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))]
        pixels = x.new_full((1,), x.numel() // x.shape[1])
        moments = AllReduceSum.apply(torch.cat([*sums, pixels]))
        count = moments[-1]
        mean, square = (moments[:-1] / count).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.add_(mean, alpha=self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(dtype)


def share_batch_norm(module):
    """Replace the BatchNorm layers in `module`; their parameters keep their names."""
    if world_size() == 1:
        return
    for name, layer in module.named_children():
        if type(layer) is nn.BatchNorm2d:
            shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum)
            shared.load_state_dict(layer.state_dict())
            setattr(module, name, shared)
        elif isinstance(layer, _BatchNorm):
            raise UserError(f"--bn-freeze 0: {type(layer).__name__} layers cannot be trained in "
                            "several processes")  # fmt: skip
        else:
            share_batch_norm(layer)
