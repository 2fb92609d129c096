"""BN-Inception (Ioffe & Szegedy, 2015), the Caffe-derived variant with 1,024 output channels.

Attribute names are the key names of the ImageNet file and of every published checkpoint.
"""

import torch
from torch import nn
from torch.nn import functional as F

# A block's four branches read its input and are concatenated in this order; a block without 1x1
# and projection halves the resolution: its last 3x3 convolutions and its pooling have stride 2.
BLOCKS = [
    # name  1x1   3x3: reduce, out  double 3x3: reduce, out  pool   projection
    ("3a",   64,  (64,   64),       (64,   96),              "avg",  32),
    ("3b",   64,  (64,   96),       (64,   96),              "avg",  64),
    ("3c", None,  (128, 160),       (64,   96),              "max", None),
    ("4a",  224,  (64,   96),       (96,  128),              "avg", 128),
    ("4b",  192,  (96,  128),       (96,  128),              "avg", 128),
    ("4c",  160,  (128, 160),       (128, 160),              "avg", 128),
    ("4d",   96,  (128, 192),       (160, 192),              "avg", 128),
    ("4e", None,  (128, 192),       (192, 256),              "max", None),
    ("5a",  352,  (192, 320),       (160, 224),              "avg", 128),
    ("5b",  352,  (192, 320),       (192, 224),              "max", 128),
]  # fmt: skip


class BNInception(nn.Module):
    """`features`: images [B, 3, H, W] (BGR, 0-255, mean-subtracted) -> [B, 1024, H/32, W/32]."""

    num_features = 1024

    def __init__(self):
        super().__init__()
        self._conv("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._conv("conv2_3x3_reduce", 64, 64, 1)
        self._conv("conv2_3x3", 64, 192, 3)
        channels = 192
        for block, one, (reduce3, out3), (reduce_double, out_double), _, projection in BLOCKS:
            name, stride = f"inception_{block}", 1 if one else 2
            if one:
                self._conv(f"{name}_1x1", channels, one, 1)
            self._conv(f"{name}_3x3_reduce", channels, reduce3, 1)
            self._conv(f"{name}_3x3", reduce3, out3, 3, stride)
            self._conv(f"{name}_double_3x3_reduce", channels, reduce_double, 1)
            self._conv(f"{name}_double_3x3_1", reduce_double, out_double, 3)
            self._conv(f"{name}_double_3x3_2", out_double, out_double, 3, stride)
            if projection:
                self._conv(f"{name}_pool_proj", channels, projection, 1)
            channels = (one or 0) + out3 + out_double + (projection or channels)
        self.last_linear = nn.Linear(channels, 1000)  # the ImageNet classifier: stored, never used

    def _conv(self, name, inputs, outputs, size, stride=1):
        self.add_module(name, nn.Conv2d(inputs, outputs, size, stride, padding=size // 2))
        # momentum 0.9 as in the Caffe port: the running statistics follow the last few batches
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.9))

    def _folded(self, name):
        """(weight [O, I, k, k], bias [O]) of one convolution: `name` and its frozen BatchNorm.

        All four parameters get their gradients through them, without a pass over the maps.
        """
        conv, bn = getattr(self, name), getattr(self, f"{name}_bn")
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        bias = (conv.bias - bn.running_mean) * scale + bn.bias
        return conv.weight * scale.view(-1, 1, 1, 1), bias

    def _apply_conv(self, name, x, max_pool=False):
        conv, bn = getattr(self, name), getattr(self, f"{name}_bn")
        if bn.training:
            x = bn(conv(x))
        else:
            x = F.conv2d(x, *self._folded(name), conv.stride, conv.padding)
        if max_pool:  # the maximum is the same before ReLU, which then has a quarter of the map
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return F.relu(x, inplace=True)

    def _pool_and_project(self, name, x, pool):
        if pool == "max":
            return self._apply_conv(name, F.max_pool2d(x, 3, 1, padding=1))
        if getattr(self, f"{name}_bn").training:
            return self._apply_conv(name, F.avg_pool2d(x, 3, 1, padding=1))
        # The average of a projection is the projection of the average, and has fewer channels.
        # The bias comes last: the zeros around the map, which are averaged too, have none.
        weight, bias = self._folded(name)
        x = F.avg_pool2d(F.conv2d(x, weight), 3, 1, padding=1)
        return F.relu(x.add_(bias.view(-1, 1, 1)), inplace=True)

    def _block(self, x, name, downsample, pool):
        branches = [] if downsample else [self._apply_conv(f"{name}_1x1", x)]
        for chain in (
            ("3x3_reduce", "3x3"),
            ("double_3x3_reduce", "double_3x3_1", "double_3x3_2"),
        ):
            y = x
            for layer in chain:
                y = self._apply_conv(f"{name}_{layer}", y)
            branches.append(y)
        if downsample:
            branches.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
        else:
            branches.append(self._pool_and_project(f"{name}_pool_proj", x, pool))
        return torch.cat(branches, dim=1)

    def features(self, images):
        x = self._apply_conv("conv1_7x7_s2", images, max_pool=True)
        x = self._apply_conv("conv2_3x3_reduce", x)
        x = self._apply_conv("conv2_3x3", x, max_pool=True)
        for block, one, _, _, pool, _ in BLOCKS:
            x = self._block(x, f"inception_{block}", downsample=one is None, pool=pool)
        return x
