"""From a PIL image to the network's input.

Pixels are bytes until they are on the device: floats would be four times as much to carry there.
"""

import functools

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

BGR_MEAN = (104, 117, 128)  # what BN-Inception is used to


class CropAndFlip:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip with its defaults, by Pillow alone:
    what torchvision does around Pillow takes a quarter as long again."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        flip = torch.rand(1) < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def to_bytes(image):
    """RGB PIL image -> uint8 [H, W, 3], the channels in the order BGR."""
    data = bytearray(image.tobytes("raw", "BGR"))
    return torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 3)


def to_input(pixels, memory_format=torch.contiguous_format):
    """uint8 [B, H, W, 3] -> the network's input, float32 [B, 3, H, W]: 0-255 minus the mean."""
    images = pixels.float().sub_(bgr_mean(pixels.device))
    return images.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


@functools.cache  # a copy for every batch would wait for the device
def bgr_mean(device):
    return torch.tensor(BGR_MEAN, dtype=torch.float32, device=device)


def train_transform(size=224):
    return v2.Compose([CropAndFlip(size), to_bytes])


def test_transform(size=224):
    return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), to_bytes])
