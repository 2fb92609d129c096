"""The network as one file that runs without this repository, ONNX or torch.export's .pt2, and
beside it one that makes its input from a picture."""

import io
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from storage import write_atomically
from utils import UserError

MODEL_FILES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}  # what each needs

TOLERANCE = 1e-4  # measured: another order of sums gives 5e-6, a mean off by 1 of 255 gives 1e-3

# dataset.files.as_rgb and loading.augment.resize_and_crop, for who has neither
INPUT = '''"""From a picture to the input of the network beside this file, with Pillow and NumPy."""

import numpy as np
from PIL import Image, ImageOps


def load(path):
    """RGB pixels, uint8 [1, {size}, {size}, 3]; channel order, mean and scale are the network's."""
    image = Image.open(path)
    image.getexif()  # Pillow keeps it
    image.info.pop("exif", None)  # Pillow would fail to write odd tags anew
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # of 16 bits the upper 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "{background}")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    image = image.convert("RGB")
    sides = [int({shorter} * side / min(image.size)) for side in image.size]  # truncated
    image = image.resize(sides, Image.Resampling.{interpolation})
    left, top = (round((side - {size}) / 2) for side in sides)
    return np.array(image.crop((left, top, left + {size}, top + {size})))[None]
'''


def concatenate(embeddings):
    """[[N, d] of each network] -> [N, sum of d]; all L2-normalised. A cosine is the mean of the
    networks' cosines."""
    return torch.cat(embeddings, dim=1) / math.sqrt(len(embeddings))


class Embedder(nn.Module):
    """RGB pixels, uint8 [B, H, W, 3] -> the networks' embeddings [B, d], concatenated."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, pixels):
        return concatenate([model.embed(model.prepare(pixels)) for model in self.models])


def patches(size, count=8):
    """Images of coloured patches to compare networks on: uint8 RGB [count, size, size, 3]."""
    drawn = torch.randint(0, 256, (count, 3, 7, 7), generator=torch.Generator().manual_seed(0))
    return F.interpolate(drawn.byte(), (size, size)).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def save_model(models, path, size, background):
    """Write the networks as one, on the CPU and left in eval mode, for batches of any number of
    images of `size`; beside it *_input.py, which reads pictures as search.py does. UserError if
    torch cannot export them, or if the file's embeddings are not the networks'."""
    network, pixels = Embedder(models).eval(), patches(size)
    precisions = [model.precision for model in models]
    for model in models:
        model.precision = "fp32"  # who reads the file may choose another
    export = to_onnx if Path(path).suffix.lower() == ".onnx" else to_pt2
    two = pixels[:1].repeat(2, 1, 1, 1)  # a batch of one would be taken for the only size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sizes = [{0: torch.export.Dim("batch")}]
            data, run = export(torch.export.export(network, (two,), dynamic_shapes=sizes))
            errors = [run(x) - network(x) for x in (pixels, pixels[:1])]
    except Exception as error:  # exporters fail in a dozen ways
        reason = str(error).strip().split("\n")[0]
        names = ", ".join({model.name: None for model in models})
        raise UserError(f"{path}: torch cannot export {names}: {reason}") from error
    finally:
        for model, precision in zip(models, precisions):
            model.precision = precision
    largest = torch.cat(errors).abs().max().item()
    if not largest <= TOLERANCE:
        raise UserError(f"{path}: not written, its embeddings are off by {largest:.1e}")
    facts = {"size": size, "shorter": size * 256 // 224, "background": background,
             "interpolation": models[0].interpolation.upper()}  # fmt: skip
    beside = Path(path).with_name(f"{Path(path).stem}_input.py")
    write_atomically(beside.resolve(), INPUT.format(**facts).encode())
    write_atomically(Path(path).resolve(), data)
    width = sum(model.embedding_size for model in models)
    print(f"{path}: uint8 [B, {size}, {size}, 3] -> float32 [B, {width}]; on "
          f"{len(pixels)} drawn images at most {largest:.1e} from the network itself")  # fmt: skip
    print(f"{beside}: makes its input from a picture")


def to_pt2(program):
    """(the file's bytes, the function that they hold)."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def to_onnx(program):
    """(the file's bytes, the function that they hold)."""
    import onnxruntime  # only this needs it

    names = {"input_names": ["pixels"], "output_names": ["embedding"]}
    data = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    data = data.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
