"""Loading batches on one core, with and without --cache, beside Pillow and torchvision as usual.

`on device` is --cache gpu in the memory of the CPU: it makes the crops of `cached` by tensors.
A batch is timed until it is ready for the device. Ours is of bytes then, which become floats there.
"""

import contextlib
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.timing import alternate, peak_mb, report
from dataset.images import ImageSet
from loading.cache import keep_on_device, read_from_memory
from loading.loader import Loading, good, test_loader, train_loader

IMAGES, BATCH, HEIGHT, WIDTH = 64, 32, 375, 500  # the usual size in CUB, there of 97 KB a file
CPU = torch.device("cpu")


def write_photo(path, seed):
    """A JPEG with the spectrum of a photograph: amplitudes fall with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    planes = []
    for slope in (1.25, 1.6, 1.6, 1.6):  # what all channels share, and each channel's own
        noise = rng.normal(size=(HEIGHT, WIDTH)) + 1j * rng.normal(size=(HEIGHT, WIDTH))
        plane = np.fft.ifft2(noise / frequency**slope).real
        planes.append(plane / plane.std())
    pixels = 120 + 45 * np.stack([planes[0] + 0.3 * plane for plane in planes[1:]], axis=-1)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=93)


def usual(split):
    """As such pipelines are written: Pillow's image through torchvision.transforms."""
    crop = (
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        if split == "train"
        else [transforms.Resize(256), transforms.CenterCrop(224)]
    )
    bgr = transforms.Lambda(lambda x: x[[2, 1, 0]] * 255)
    mean = transforms.Normalize((104, 117, 128), [1, 1, 1])
    return transforms.Compose([*crop, transforms.ToTensor(), bgr, mean])


class Usual(torch.utils.data.Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), 0


def batches_of(loader):
    return loader if isinstance(getattr(loader, "dataset", None), Usual) else good(loader)


def measure(split, items, cache, rounds):
    paths = [path for path, _ in items]
    images = ImageSet(items)
    loading = Loading(224, 0, CPU)

    def load(loading):
        if split == "train":
            return train_loader(images, BATCH, 0, loading)
        return test_loader(images, BATCH, loading)

    peer = torch.utils.data.DataLoader(Usual(paths, usual(split)), BATCH, split == "train")
    cached = load(loading._replace(read=cache))
    loaders = {"ours": load(loading), "cached": cached, "usual": peer}
    if split == "train":
        with contextlib.redirect_stdout(sys.stderr):
            kept = keep_on_device(images, load(loading), None, loading._replace(workers=1))
            loaders["on device"] = kept[0]
    sides = {
        name: lambda loader=loader: sum(len(batch[1]) for batch in batches_of(loader))
        for name, loader in loaders.items()
    }
    seconds = alternate(sides, rounds)
    return {
        "transforms": split,
        "KB a file": Path(paths[0]).stat().st_size / 1000,
        "ours images/s": IMAGES / seconds["ours"],
        "cached images/s": IMAGES / seconds["cached"],
        "usual images/s": IMAGES / seconds["usual"],
        "ours / usual": seconds["usual"] / seconds["ours"],
        "cached / ours": seconds["ours"] / seconds["cached"],
        "on device / cached": seconds["cached"] / seconds.get("on device", math.nan),
        "peak MB": peak_mb(),
    }


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        items = [(str(Path(folder, f"{i}.jpg")), "photos") for i in range(IMAGES)]
        for i, (path, _) in enumerate(items):
            write_photo(path, seed=i)
        with contextlib.redirect_stdout(sys.stderr):
            cache = read_from_memory([path for path, _ in items], workers=1)
        report([measure(split, items, cache, rounds=15) for split in ("train", "test")], __doc__)


if __name__ == "__main__":
    main()
