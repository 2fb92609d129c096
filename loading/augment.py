"""From a PIL image to pixels, uint8 RGB [size, size, 3]: drawn apart from applied.

Pixels are bytes until they are on the device: floats would be four times as much to carry there.
"""

import math

import torch
from PIL import Image

from utils import generator

AUGMENTATION = 1  # its stream of random numbers, beside the sampler's and the loss's
TRIES, WIDEST = 10, math.log(4 / 3)


def random_numbers(seed, epoch, count):
    """[count, 23], uniform in [0, 1): what `draw` takes for each place in an epoch, a function of
    seed and epoch (differs: the script draws from the state of workers and process)."""
    rng = generator(seed, AUGMENTATION, epoch)
    return torch.rand(count, 3 + 2 * TRIES, generator=rng)


def draw(numbers, size):
    """(box, flip) by 23 of the random numbers for an image of `size` (width, height). The box,
    (left, top, right, bottom), is that of torchvision's RandomResizedCrop: an area of 8 to 100 %, a
    ratio of 3/4 to 4/3, and, after ten that do not fit, the largest such box in the centre."""
    (width, height), (down, across, coin) = size, numbers[:3]
    for i in range(3, len(numbers), 2):
        area = width * height * (0.08 + (1 - 0.08) * numbers[i])
        ratio = math.exp((2 * numbers[i + 1] - 1) * WIDEST)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
        top, left = (height - h) // 2, (width - w) // 2
    return (left, top, left + w, top + h), coin < 0.5


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
