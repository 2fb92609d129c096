"""Random crops of images that lie in a device's memory, made there, Pillow's to the last bit."""

import math

import PIL
import torch

from loading.augment import draw

# Pillow resizes in two passes, rounded to bytes; from 13 on, of tall crops the rows come first
TALL_BY_ROWS = int(PIL.__version__.split(".")[0]) >= 13
PIXELS = 2**23  # resized at a time, in about 500 MB


def triangle(x):
    return (1 - x.abs()).clamp(min=0)


def cubic(x):
    """Keys' kernel, a = -0.5."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


KERNELS = {"bilinear": (triangle, 1), "bicubic": (cubic, 2)}  # and how far they reach


def taps(lengths, longest, size, interpolation):
    """[B, size, longest] what each of lengths [B] pixels weighs in each of `size` that they are
    resized to, 0 beyond: in float64, whole multiples of 2^-22 as in Pillow."""
    kernel, reach = KERNELS[interpolation]
    count = 2 * math.ceil(reach * max(longest / size, 1)) + 1  # no pixel has more neighbours
    steps = torch.arange(max(size, count), device=lengths.device)
    scale = lengths.double()[:, None, None] / size
    stretch = scale.clamp(min=1)
    centre = (steps[:size, None] + 0.5) * scale  # [B, size, 1]
    first = (centre - reach * stretch + 0.5).clamp(min=0).long()
    end = (centre + reach * stretch + 0.5).long().minimum(lengths[:, None, None])
    at = first + steps[:count]  # [B, size, count]
    weights = kernel((at - centre + 0.5) / stretch) * (at < end)
    weights = weights / weights.sum(-1, keepdim=True) * 2**22
    weights = (weights.abs() + 0.5).floor().copysign(weights)
    wide = weights.new_zeros(*first.shape[:2], longest + count).scatter_(2, at, weights)
    return wide[..., :longest]


def resized(maps, lengths, size, interpolation):
    """uint8 [B, n, m, 3], of whose rows the first lengths [B] count -> [B, size, m, 3]."""
    weights = taps(lengths, maps.shape[1], size, interpolation)
    # in two parts of 11 bits: their products with bytes, and the sums, are whole numbers that
    # float32 holds, even where the factors are rounded to TensorFloat-32
    high = (weights / 2**12).round()
    parts = torch.cat([high, weights - high * 2**12], dim=1).float()
    high, low = (parts @ maps.flatten(2).float()).int().chunk(2, dim=1)
    return ((high * 2**12 + low + 2**21) >> 22).clamp_(0, 255).byte().unflatten(2, (-1, 3))


def resized_crops(pixels, crops, longest, size, interpolation="bilinear"):
    """uint8 [B, size, size, 3]: augment.crop_and_flip of every crop, (first byte, width of the
    image, height, width, flip), int64 [B, 5], no side above `longest`, of images that lie in
    `pixels` [bytes]. Never waits for the device."""
    start, stride, height, width, flip = crops.unbind(1)
    tall = (height > size) & (height - size > 2 * (width - size)) & TALL_BY_ROWS
    steps = torch.arange(longest, device=crops.device)
    lengths = torch.where(tall, height, width), torch.where(tall, width, height)
    strides = torch.where(tall, 3 * stride, 3), torch.where(tall, 3, 3 * stride)
    first, second = (  # [B, longest] bytes from the first; beyond the crop, where nothing weighs
        steps.minimum(length[:, None] - 1) * step[:, None] for length, step in zip(lengths, strides)
    )
    at = start[:, None, None] + first[:, :, None] + second[:, None]
    maps = pixels.unfold(0, 3, 1)[at]
    for length in lengths:  # each pass leaves what it has resized in the second dimension
        maps = resized(maps, length, size, interpolation).transpose(1, 2)
    tall, flip = tall[:, None, None, None], flip[:, None, None, None]
    maps = torch.where(tall, maps, maps.transpose(1, 2))
    return torch.where(flip > 0, maps.flip(2), maps)


class DeviceBatches:
    """`train_loader`'s batches, by its sampler `keys`, of RGB images that lie on a device: `pixels`
    [bytes], where each of them begins `starts` [N + 1], (width, height) `sizes` [N, 2]."""

    def __init__(self, keys, labels, pixels, starts, sizes, loading):
        self.batch_sampler, self.pixels = keys, pixels
        self.images = list(zip(starts.tolist(), sizes.tolist(), labels.tolist()))
        self.size, self.interpolation = loading.size, loading.interpolation

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for keys in self.batch_sampler:
            yield self.batch([self.crop(*key) for key in keys])

    def crop(self, index, numbers):
        """What `resized_crops` takes, then label and index."""
        start, (width, height), label = self.images[index]
        (left, top, right, bottom), flip = draw(numbers, (width, height))
        first = start + 3 * (top * width + left)
        return first, width, bottom - top, right - left, flip, label, index

    def batch(self, crops):
        """(pixels, labels, index). The largest crops are made first, as many at a time as there is
        room for."""
        longest = [max(crop[2:4]) for crop in crops]
        order = sorted(range(len(crops)), key=longest.__getitem__, reverse=True)
        # the last column is not of the crop beside it: `order`, in the same copy to the device
        table = torch.tensor([(*crop, row) for crop, row in zip(crops, order)])
        if self.pixels.is_cuda:
            table = table.pin_memory().to(self.pixels.device, non_blocking=True)
        made = self.pixels.new_empty(len(crops), self.size, self.size, 3)
        done = 0
        while done < len(crops):
            most = longest[order[done]]
            rows = table[done : done + max(1, PIXELS // max(most, self.size) ** 2), -1]
            made[rows] = resized_crops(
                self.pixels, table[rows, :5], most, self.size, self.interpolation
            )
            done += len(rows)
        return made, table[:, 5], table[:, 6]
