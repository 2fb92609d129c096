"""The embedding network: a backbone, its pooling, the one or two linear heads."""

import contextlib
import copy

import torch
from torch import nn

from net.backbones import BACKBONES, TIMM, at_least_float32, create_backbone
from net.weights import load_strictly, load_weights
from storage import read_checkpoint
from utils import UserError, did_you_mean


def l2_normalize(x):
    """Rows of unit length, x / sqrt(sum x^2 + 1e-12); a zero row stays zero."""
    wide = at_least_float32(x)  # 1e-12 is 0 in half
    return (wide / (wide.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()).to(x.dtype)


class EmbeddingNet(nn.Module):
    """The network's input [B, 3, H, W] -> what the loss reads; `embed` gives what retrieval reads,
    and `prepare` makes the input.

    With `disent` a head's columns are [mu | s]: the mean, and the raw scale of the
    distribution that DDML samples from (AAAI 2025). The heads are stored as
    `model.embedding*`, beside the backbone's layers, as in the published checkpoints.

    Of `precision`, bf16 is the network's own affair: the backbone's maps are bfloat16, from its
    input to the last of them. Parameters, pooling and heads stay float32: a head in bfloat16 would
    double the error of mu. tf32 is a setting of the process (`utils.set_precision`).
    """

    def __init__(self, name, embedding_size, disent, l2_norm, precision="fp32"):
        super().__init__()
        self.name, self.embedding_size = name, embedding_size
        self.disent, self.l2_norm, self.precision = disent, l2_norm, precision
        self.backbone = create_backbone(name)
        self.interpolation = self.backbone.interpolation
        self.model = self.backbone.network
        self.register_buffer("mean", torch.tensor(self.backbone.mean).float(), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).float(), persistent=False)
        size = getattr(self.model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
        width = 2 * embedding_size if disent else embedding_size
        self.model.embedding = nn.Linear(self.num_features(size), width)
        if disent:
            self.model.embedding_specific = nn.Linear(width, width)
        for head in self.heads():
            nn.init.kaiming_normal_(head.weight, mode="fan_out")
            nn.init.zeros_(head.bias)
        for parameter in self.parameters():
            if parameter.ndim == 4:  # as `prepare` lays out its images
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def heads(self):
        """The layers that train from the first epoch on, while the backbone waits (--warm)."""
        names = ("embedding", "embedding_specific") if self.disent else ("embedding",)
        return [getattr(self.model, name) for name in names]

    def num_features(self, size):
        """F, the columns that the backbone gives for images of this size; UserError if it cannot
        take them. Computes nothing: tensors on the meta device are shapes."""
        shadow = copy.deepcopy(self.model).eval().to("meta")
        try:
            features = self.backbone.pool(shadow, torch.zeros(1, 3, size, size, device="meta"))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise UserError(f"--image-size {size}: not for {self.name}: {reason}") from error
        if not torch.is_tensor(features) or features.ndim != 2:
            raise UserError(f"--model {self.name}: its features are neither maps nor tokens")
        return features.shape[1]

    def prepare(self, pixels):
        """RGB pixels, uint8 [B, H, W, 3] -> the network's input: its order, scale and mean."""
        if self.backbone.order == "BGR":
            pixels = pixels.flip(dims=(3,))
        images = pixels.to(self.mean.dtype, copy=True).sub_(self.mean).div_(self.std)
        return images.permute(0, 3, 1, 2)  # channels last in memory

    def pool(self, images):
        maps = contextlib.nullcontext()
        if self.precision == "bf16":
            maps = torch.autocast(images.device.type, torch.bfloat16)
        with maps:
            features = self.backbone.pool(self.model, images)
        return features.to(self.model.embedding.weight.dtype)

    def forward(self, images):
        """(head [B, 2d], head_specific [B, 2d]) with disent, head [B, d] without."""
        head = self.model.embedding(self.pool(images))
        if not self.disent:
            return l2_normalize(head) if self.l2_norm else head
        specific = self.model.embedding_specific(head)  # reads the un-normalised head
        return (l2_normalize(head), l2_normalize(specific)) if self.l2_norm else (head, specific)

    def embed(self, images):
        """The retrieval embedding: mu [B, d], L2-normalised."""
        mu = self.model.embedding(self.pool(images))[:, : self.embedding_size]
        return l2_normalize(mu)


def compile_backbone(model, mode=True):
    """Put backbone and pooling, which take the time, through torch.compile, to train and to embed,
    in one of its modes or, with True, the usual one. The function is compiled, the module stays:
    its weights keep their names."""
    pool = torch.compile(model.pool, dynamic=False, mode=None if mode is True else mode)

    def compiled(images):
        try:
            return pool(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).split("\n\n")[0]
            raise UserError(f"--compile: torch cannot compile {model.name}: {reason}") from error

    model.pool = compiled


CHOICES = f"{', '.join(BACKBONES)} or {TIMM}NAME"


def model_name(name):
    """--model's type: a row of BACKBONES, or timm/NAME."""
    if name not in BACKBONES and not name.startswith(TIMM):
        near = did_you_mean(name, BACKBONES)
        raise UserError(f"--model {name}: choose from {CHOICES}{near}")
    return name


def create_model(
    name, embedding_size, disent=False, l2_norm=True, weights=None, precision="fp32"
):  # fmt: skip
    """Build a network; `weights` is None or "none" (random), "imagenet" (downloaded), or a
    checkpoint's path; `precision` as in EmbeddingNet."""
    model = EmbeddingNet(model_name(name), embedding_size, disent, l2_norm, precision)
    if weights not in (None, "none"):
        load_weights(model, weights)
    return model


def network_of(checkpoint, path):
    """(state dict, {flag: value}) of a checkpoint's network: its flags are those stored, or, in a
    published one, what the weights' shapes tell."""
    state, stored = checkpoint.get("model_state_dict"), checkpoint.get("args", {})
    if not isinstance(state, dict) or not isinstance(stored, dict):
        raise UserError(f"{path}: not a checkpoint: it has no model_state_dict, or odd flags")
    disent = "model.embedding_specific.weight" in state
    flags = {"model": "bn_inception", "l2_norm": True, "precision": "fp32"}
    shape = getattr(state.get("model.embedding.weight"), "shape", ())
    if len(shape) == 2:
        flags["embedding_size"] = shape[0] // 2 if disent else shape[0]
    flags |= stored | {"disent": disent}
    kinds = {"model": str, "embedding_size": int, "l2_norm": bool, "precision": str}
    for name, kind in kinds.items():
        if not isinstance(flags.get(name), kind):
            raise UserError(f"{path}: not a checkpoint: it does not tell the network's {name}")
    return state, flags


def load_model(path, precision=None):
    """The network of a checkpoint, one of ours or a published one, to embed with (eval mode), in
    the precision that it was trained with, or another one."""
    state, flags = network_of(read_checkpoint(path), path)
    names = ("model", "embedding_size", "disent", "l2_norm")
    precision = precision or flags["precision"]
    model = create_model(*(flags.get(name) for name in names), precision=precision)
    load_strictly(model, state, path)
    return model.eval()
