"""The embedding network: a backbone, its pooling, the one or two linear heads."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

from losses import l2_normalize
from net.backbones import BACKBONES, TIMM, create_backbone
from net.weights import load_strictly, load_weights, state_and_flags
from storage import read_checkpoint
from utils import UserError, did_you_mean


class EmbeddingNet(nn.Module):
    """disent: a head's columns are [mu | s], mean and raw scale of what DDML samples from.
    Heads are stored as `model.embedding*`, as in the published checkpoints.
    bf16: maps in bfloat16, the rest in float32; a bfloat16 head doubles the error of mu."""

    def __init__(self, name, embedding_size, disent, l2_norm, precision="fp32"):
        super().__init__()
        self.name, self.embedding_size = name, embedding_size
        self.disent, self.l2_norm, self.precision = disent, l2_norm, precision
        backbone = create_backbone(name)
        self.model = backbone.network  # by which all names in checkpoints begin
        self.backbone = backbone._replace(network=None)
        self.interpolation = backbone.interpolation
        self.compiled = False  # under --compile
        self.register_buffer("mean", torch.tensor(backbone.mean).float(), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).float(), persistent=False)
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
        """F of the features [B, F]; UserError if the backbone cannot take images of this size."""
        shadow = copy.deepcopy(self.model).eval().to("meta")  # computes shapes alone
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
        """The backbone's features [B, F]."""
        bf16 = self.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
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


def compile_modules(model, others, mode):
    """--compile, of the network and `others`; weights keep their names."""
    settings = {"dynamic": False, "mode": None if mode is True else mode}
    for module in (model, *others):
        module.compile(**settings)
    model.embed, model.compiled = torch.compile(model.embed, **settings), True


CHOICES = f"{', '.join(BACKBONES)} or {TIMM}NAME"


def model_name(name):
    """--model's type: a row of BACKBONES, or timm/NAME."""
    if name not in BACKBONES and not name.startswith(TIMM):
        raise UserError(f"--model {name}: choose from {CHOICES}{did_you_mean(name, BACKBONES)}")
    return name


def create_model(name, embedding_size, disent=False, l2_norm=True, weights=None, precision="fp32"):
    """weights: None or "none" (random), "imagenet" (downloaded), or the path of a file."""
    model = EmbeddingNet(model_name(name), embedding_size, disent, l2_norm, precision)
    if weights not in (None, "none"):
        load_weights(model, weights)
    return model


def network_from(checkpoint, path, **flags):
    """A checkpoint's network in eval mode; `flags` replace those that it was trained with."""
    state, stored = state_and_flags(checkpoint, path)
    names = ("embedding_size", "disent", "l2_norm", "precision")
    chosen = stored | {name: value for name, value in flags.items() if value is not None}
    model = create_model(chosen["model"], **{name: chosen[name] for name in names})
    load_strictly(model, state, path)
    return model.eval()


def load_model(path, precision=None):
    """The network in a checkpoint's file, ours or a published one: see `network_from`."""
    return network_from(read_checkpoint(path), path, precision=precision)
