"""BN-Inception (Ioffe & Szegedy, 2015), the Caffe-derived variant with 1,024 output channels.

Attribute names are the key names of the ImageNet file and of every published checkpoint.
"""

from functools import partial

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

    def __init__(self):
        super().__init__()
        self._add_conv("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add_conv("conv2_3x3_reduce", 64, 64, 1)
        self._add_conv("conv2_3x3", 64, 192, 3)
        channels = 192
        for block, one, (reduce3, out3), (reduce_double, out_double), _, projection in BLOCKS:
            name, stride = f"inception_{block}", 1 if one else 2
            if one:
                self._add_conv(f"{name}_1x1", channels, one, 1)
            self._add_conv(f"{name}_3x3_reduce", channels, reduce3, 1)
            self._add_conv(f"{name}_3x3", reduce3, out3, 3, stride)
            self._add_conv(f"{name}_double_3x3_reduce", channels, reduce_double, 1)
            self._add_conv(f"{name}_double_3x3_1", reduce_double, out_double, 3)
            self._add_conv(f"{name}_double_3x3_2", out_double, out_double, 3, stride)
            if projection:
                self._add_conv(f"{name}_pool_proj", channels, projection, 1)
            channels = (one or 0) + out3 + out_double + (projection or channels)
        self.last_linear = nn.Linear(channels, 1000)  # the ImageNet classifier: stored, never used

    def _add_conv(self, name, inputs, outputs, size, stride=1):
        self.add_module(name, nn.Conv2d(inputs, outputs, size, stride, padding=size // 2))
        # momentum 0.9 as in the Caffe port: the running statistics follow the last few batches
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.9))

    def _folded(self):
        """{layer: (weight, bias)} of convolutions whose BatchNorm is frozen. That is affine: folded
        in, it costs no pass over the maps; of all layers at once, few operations."""
        layers = [(name, conv, getattr(self, f"{name}_bn")) for name, conv in self.named_children()
                  if isinstance(conv, nn.Conv2d) and not getattr(self, f"{name}_bn").training]
        if not layers:
            return {}
        names, convs, norms = zip(*layers)

        def every(modules, name):
            return torch.cat([getattr(module, name) for module in modules])

        scale = every(norms, "weight") * (every(norms, "running_var") + norms[0].eps).rsqrt()
        bias = (every(convs, "bias") - every(norms, "running_mean")) * scale + every(norms, "bias")
        kind = bias.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            bias = bias.to(torch.get_autocast_dtype(kind))  # else it is converted layer by layer
        sizes = [conv.out_channels for conv in convs]
        weights = [conv.weight * part.view(-1, 1, 1, 1)
                   for conv, part in zip(convs, scale.split(sizes))]  # fmt: skip
        return dict(zip(names, zip(weights, bias.split(sizes))))

    def _conv(self, name, x, folded):
        """Convolution, BatchNorm, ReLU."""
        conv, bn = getattr(self, name), getattr(self, f"{name}_bn")
        frozen = name in folded
        x = F.conv2d(x, *folded[name], conv.stride, conv.padding) if frozen else bn(conv(x))
        return F.relu(x, inplace=True)

    def _block(self, conv, x, name, downsample, pool):
        branches = [] if downsample else [conv(f"{name}_1x1", x)]
        for chain in (("3x3_reduce", "3x3"), ("double_3x3_reduce", "double_3x3_1", "double_3x3_2")):
            y = x
            for layer in chain:
                y = conv(f"{name}_{layer}", y)
            branches.append(y)
        if downsample:
            branches.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
        else:
            pooled = F.max_pool2d if pool == "max" else F.avg_pool2d
            branches.append(conv(f"{name}_pool_proj", pooled(x, 3, 1, padding=1)))
        return torch.cat(branches, dim=1)

    def features(self, images):
        # convolutions and pooling halve an odd side to different sizes, which cannot be joined
        if min(images.shape[2:]) < 31 or any((side + 1) % 32 >= 8 for side in images.shape[2:]):
            raise ValueError("BN-Inception takes multiples of 32 and up to 6 pixels more")
        conv = partial(self._conv, folded=self._folded())
        x = F.max_pool2d(conv("conv1_7x7_s2", images), 3, 2, ceil_mode=True)
        x = conv("conv2_3x3_reduce", x)
        x = F.max_pool2d(conv("conv2_3x3", x), 3, 2, ceil_mode=True)
        for block, one, _, _, pool, _ in BLOCKS:
            x = self._block(conv, x, f"inception_{block}", downsample=one is None, pool=pool)
        return x
