"""--cache gpu: random crops of images in a device's memory, equal to Pillow's to the last bit."""

import math

import PIL
import torch

from loading.augment import draw

# Pillow resizes in two passes, each rounded to bytes; since 13, rows come first in tall crops
TALL_BY_ROWS = int(PIL.__version__.split(".")[0]) >= 13
PIXELS = 2**24  # resized at a time, in about 500 MB


def triangle(x):
    return (1 - x.abs()).clamp(min=0)


def cubic(x):
    """Keys' kernel, a = -0.5."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


KERNELS = {"bilinear": (triangle, 1), "bicubic": (cubic, 2)}  # kernel, radius


def taps(lengths, width, size, interpolation):
    """[B, 2 * size, width]: the weight of each of lengths [B] pixels in each of `size` new ones, 0
    beyond the length, which is less than `width`. In units of 2^-22, as in Pillow, a weight has 23
    bits: above, what is left in units of 2^-10, 11 bits; below, the rest over these units."""
    kernel, radius = KERNELS[interpolation]
    count = 2 * math.ceil(radius * max(width / size, 1)) + 1  # no pixel has more neighbours
    steps = torch.arange(max(size, count), device=lengths.device)
    scale = lengths.double()[:, None, None] / size
    stretch = scale.clamp(min=1)
    centre = (steps[:size, None] + 0.5) * scale  # [B, size, 1]
    first = (centre - radius * stretch + 0.5).clamp(min=0).long()
    end = (centre + radius * stretch + 0.5).long().minimum(lengths[:, None, None])
    at = first + steps[:count]  # [B, size, count]
    weights = kernel((at - centre + 0.5) / stretch) * (at < end)
    weights = weights / weights.sum(-1, keepdim=True) * 2**22
    weights = (weights.abs() + 0.5).floor().copysign(weights) / 2**12
    high = weights.round()
    kind = torch.half if lengths.is_cuda else torch.float
    parts = torch.cat([high / 2**10, weights - high], dim=1).to(kind)
    at = at.clamp(max=width - 1).repeat(1, 2, 1)  # where the weight is 0
    return parts.new_zeros(*parts.shape[:2], width).scatter_(2, at, parts)


def product(weights, maps):
    """[B, n, k] @ [B, k, m], exact: half precision holds both, and float32 all sums."""
    if maps.is_cuda:
        return torch.bmm(weights, maps, out_dtype=torch.float32)
    return weights @ maps


def resized(maps, weights):
    """uint8 [B, n, m, 3] and `taps` of its rows [B, 2 * size, n] -> [B, size, m, 3]."""
    maps = maps.to(weights.dtype, memory_format=torch.contiguous_format)
    high, low = product(weights, maps.flatten(2)).chunk(2, dim=1)
    made = torch.add(high, low.floor_(), alpha=2**-10).add_(0.5).clamp_(0, 255)
    return made.byte().unflatten(2, (-1, 3))


def resized_crops(pixels, crops, longest, size, interpolation="bilinear"):
    """crop_and_flip of images in `pixels` [bytes] -> uint8 [B, size, size, 3], without waiting for
    the device. crops: (first byte, image's width, height, width, flip), int64 [B, 5], with sides up
    to `longest`."""
    start, stride, height, width, flip = crops.unbind(1)
    tall = (height > size) & (height - size > 2 * (width - size)) & TALL_BY_ROWS
    steps = torch.arange(longest // 8 * 8 + 8, device=crops.device)  # GPUs multiply eights faster
    lengths = torch.where(tall, height, width), torch.where(tall, width, height)
    strides = torch.where(tall, 3 * stride, 3), torch.where(tall, 3, 3 * stride)
    first, second = (  # [B, longest] bytes; beyond the crop its last pixel, of weight 0
        steps.minimum(length[:, None] - 1) * step[:, None] for length, step in zip(lengths, strides)
    )
    maps = pixels.unfold(0, 3, 1)[(start[:, None] + first)[:, :, None] + second[:, None]]
    for weights in taps(torch.cat(lengths), len(steps), size, interpolation).chunk(2):
        maps = resized(maps, weights).transpose(1, 2)
    tall, flip = tall[:, None, None, None], flip[:, None, None, None]
    maps = torch.where(tall, maps, maps.transpose(1, 2))
    return torch.where(flip > 0, maps.flip(2), maps)


class DeviceBatches:
    """train_loader's batches, with its sampler, from RGB images in a device's memory: `pixels`
    [bytes], the first byte of each image `starts` [N + 1], (width, height) `sizes` [N, 2]."""

    def __init__(self, sampler, labels, pixels, starts, sizes, loading):
        self.batch_sampler, self.pixels = sampler, pixels
        self.images = list(zip(starts.tolist(), sizes.tolist(), labels.tolist()))
        self.size, self.interpolation = loading.size, loading.interpolation

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for keys in self.batch_sampler:
            yield self.batch([self.crop(*key) for key in keys])

    def crop(self, index, numbers):
        """A row of `crops` for resized_crops, then label and index."""
        start, (width, height), label = self.images[index]
        (left, top, right, bottom), flip = draw(numbers, (width, height))
        first = start + 3 * (top * width + left)
        return first, width, bottom - top, right - left, flip, label, index

    def batch(self, crops):
        """(pixels, labels, index). Crops are made in groups of at most PIXELS, largest first."""
        longest = [max(crop[2:4]) for crop in crops]
        order = sorted(range(len(crops)), key=longest.__getitem__, reverse=True)
        # the last column is `order`, to be in the same copy to the device
        table = torch.tensor([(*crop, row) for crop, row in zip(crops, order)])
        if self.pixels.is_cuda:
            table = table.pin_memory().to(self.pixels.device, non_blocking=True)
        size, done = self.size, 0
        made = self.pixels.new_empty(len(crops), size, size, 3)
        while done < len(crops):
            side = longest[order[done]]
            rows = table[done : done + max(1, PIXELS // max(side, size) ** 2), -1]
            made[rows] = resized_crops(self.pixels, table[rows, :5], side, size, self.interpolation)
            done += len(rows)
        return made, table[:, 5], table[:, 6]
