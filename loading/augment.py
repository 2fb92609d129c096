"""From a PIL image to pixels, uint8 RGB [size, size, 3]: a quarter of the bytes of floats."""

import math

import numpy as np
import torch
from PIL import Image

from utils import AUGMENTATION, generator

TRIES, MAX_LOG_RATIO = 10, math.log(4 / 3)


def random_numbers(seed, epoch, count):
    """[count, 23], uniform in [0, 1): what `draw` takes for each image of an epoch."""
    # differs: the script draws from the state of workers and process
    return torch.rand(count, 3 + 2 * TRIES, generator=generator(seed, AUGMENTATION, epoch))


def draw(numbers, size):
    """(box, flip) from 23 random numbers and the image's size (width, height). The box (left, top,
    right, bottom) is torchvision's RandomResizedCrop."""
    (width, height), (down, across, coin) = size, numbers[:3]
    for i in range(3, len(numbers), 2):
        area = width * height * (0.08 + (1 - 0.08) * numbers[i])
        ratio = math.exp((2 * numbers[i + 1] - 1) * MAX_LOG_RATIO)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
        top, left = (height - h) // 2, (width - w) // 2
    return (left, top, left + w, top + h), coin < 0.5


def crop_and_flip(image, box, flip, size, interpolation="bilinear"):
    """Training: an RGB image, cropped and flipped as drawn -> pixels [size, size, 3]."""
    image = image.crop(box).resize((size, size), Image.Resampling[interpolation.upper()])
    return to_pixels(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


def resize_and_crop(image, size=224, interpolation="bilinear"):
    """Evaluation: the shorter side resized to size * 256/224, the centre -> [size, size, 3]."""
    shorter = size * 256 // 224
    sides = [int(shorter * side / min(image.size)) for side in image.size]
    image = image.resize(sides, Image.Resampling[interpolation.upper()])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_pixels(image.crop((left, top, left + size, top + size)))


def to_pixels(image):
    """RGB PIL image -> uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(image))
