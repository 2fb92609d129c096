"""From a PIL image to the network's input."""

import numpy as np
import torch
from torchvision.transforms import v2

BGR_MEAN = torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)


def to_input(image):
    """RGB PIL image -> float32 [3, H, W]: BGR, 0-255, minus the mean BN-Inception is used to."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).flip(0).float().sub_(BGR_MEAN)


def train_transform(size=224):
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), to_input])


def test_transform(size=224):
    return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), to_input])
