"""From a PIL image to pixels, uint8 RGB [size, size, 3]: drawn apart from applied.

Pixels are bytes until they are on the device: floats would be four times as much to carry there.
"""

import math

import torch
from PIL import Image

from utils import generator

AUGMENTATION = 1  # its stream of random numbers, beside the sampler's and the loss's


def draw(seed, epoch, index, occurrence, size):
    """(box, flip) for an image of `size` (width, height): a function of its arguments alone
    (differs: the script draws from the state of workers and process). The box, (left, top, right,
    bottom), is that of torchvision's RandomResizedCrop: an area of 8 to 100 %, a ratio of 3/4 to
    4/3, and, after ten that do not fit, the largest such box in the centre."""
    rng = generator(seed, AUGMENTATION, epoch, index, occurrence)

    def uniform(low, high):
        return torch.empty(1).uniform_(low, high, generator=rng)

    def integer(stop):
        return torch.randint(stop, (1,), generator=rng).item()

    width, height = size
    low, high = torch.log(torch.tensor((3 / 4, 4 / 3)))
    for _ in range(10):
        area = width * height * uniform(0.08, 1).item()
        ratio = torch.exp(uniform(low, high)).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = integer(height - h + 1), integer(width - w + 1)
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
        top, left = (height - h) // 2, (width - w) // 2
    return (left, top, left + w, top + h), bool(torch.rand(1, generator=rng) < 0.5)


def crop_and_flip(image, box, flip, size, interpolation="bilinear"):
    """What `draw` gives, applied to an RGB image: pixels [size, size, 3]."""
    image = image.crop(box).resize((size, size), resampling(interpolation))
    return to_pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def resize_and_crop(image, size=224, interpolation="bilinear"):
    """An RGB image as it is tested and embedded: pixels [size, size, 3] of its centre, the shorter
    side resized to 256/224 of `size`."""
    shorter = size * 256 // 224
    sides = [int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(sides, resampling(interpolation))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_pixels(image.crop((left, top, left + size, top + size)))


def resampling(name):
    return Image.Resampling[name.upper()]


def to_pixels(image):
    """RGB PIL image -> uint8 [H, W, 3]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3)
