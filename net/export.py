"""The network as one file that runs without this repository: ONNX, or torch.export's .pt2."""

import io
import math
import warnings
from pathlib import Path

import torch
from torch import nn

from storage import write_atomically
from utils import UserError

MODEL_FILES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}  # what each needs

TOLERANCE = 1e-3  # measured: another order of sums gives 5e-6, a mean off by 1 of 255 gives 2e-3


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


@torch.no_grad()
def save_model(models, path, pixels):
    """Write the networks as one, on the CPU and left in eval mode, for batches of any size.
    UserError if that fails, or if the file's embeddings of `pixels`, uint8 RGB [B, H, W, 3], are
    others."""
    network, pixels = Embedder(models).eval(), pixels.cpu()
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
    write_atomically(Path(path).resolve(), data)
    shape = ", ".join(map(str, pixels.shape[1:]))
    width = sum(model.embedding_size for model in models)
    print(f"{path}: uint8 [B, {shape}] -> float32 [B, {width}]; on "
          f"{len(pixels)} images at most {largest:.1e} from the network itself")  # fmt: skip


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
