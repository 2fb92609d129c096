"""The backbones, each with what it is fed: a row of BACKBONES, or any of timm's models."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from losses import at_least_float32
from net.bn_inception import BNInception
from net.weights import OR_RANDOM, download
from storage import read_checkpoint
from utils import UserError, did_you_mean

TIMM = "timm/"


class Backbone(NamedTuple):
    network: nn.Module
    pool: Callable  # (network, input [B, 3, H, W]) -> features [B, F]
    imagenet: Callable | None = None  # () -> the network's state dict, downloaded
    order: str = "RGB"
    mean: tuple = (123.675, 116.28, 103.53)  # of pixels 0-255; ImageNet's, as most networks have
    std: tuple = (58.395, 57.12, 57.375)
    interpolation: str = "bilinear"
    unused: tuple = ()  # prefixes of entries of the ImageNet file that it lacks


def average_and_maximum(maps):
    """Global average plus global maximum, in float32 or better: [B, F, H, W] -> [B, F]."""
    maps = at_least_float32(maps).flatten(2)
    return maps.mean(dim=2) + maps.max(dim=2).values  # not amax: compiled, it lost its gradients


def bn_inception():
    url = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"
    sha256 = "52deb473314542a5c2f87e9e6f26f4ca42fe863d15f986414dbae8c2dfdd2353"
    return Backbone(
        BNInception(),
        lambda network, x: average_and_maximum(network.features(x)),
        lambda: read_checkpoint(download(url, sha256)),
        order="BGR", mean=(104, 117, 128), std=(1, 1, 1),
    )  # fmt: skip


def torchvision(name, unused=(), **facts):
    """One of torchvision.models: its layers up to average pooling; the classifier is never used."""
    from torchvision import models  # takes seconds, and only these need it

    url = models.get_model_weights(name)["IMAGENET1K_V1"].url

    def pool(network, x):
        for child, layer in network.named_children():
            if child == "avgpool":
                return average_and_maximum(x)
            x = layer(x)

    # its own initialisation takes a second and leaves random weights with a signal of 1e-12
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return Backbone(
        models.get_model(name, weights=None, **options), pool,
        lambda: read_checkpoint(download(url, url[-12:-4])), unused=unused, **facts,
    )  # fmt: skip


def timm_model(name):
    """Any timm model whose features are maps, pooled here, or tokens, pooled as the model does."""
    import timm  # takes a second, and only these need it

    if not timm.is_model(name):
        near = did_you_mean(f"{TIMM}{name}", [f"{TIMM}{known}" for known in timm.list_models()])
        near = near or "; timm.list_models() lists them"
        raise UserError(f"--model {TIMM}{name}: timm has no such model{near}")
    try:
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:  # it has no tokens of positions to adapt
        network = timm.create_model(name, num_classes=0)
    except RuntimeError as error:
        raise UserError(f"--model {TIMM}{name}: {error}") from error

    def pool(network, x):
        features = network.forward_features(x)
        if not torch.is_tensor(features):
            return features  # num_features refuses it
        if features.ndim == 3:
            tokens = features.to(next(network.parameters()).dtype)  # of autocast, float32
            return network.forward_head(tokens, pre_logits=True)
        if getattr(network, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        return average_and_maximum(features)

    def imagenet():
        try:
            return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except (OSError, RuntimeError) as error:
            raise UserError(f"--weights imagenet: timm cannot get those of {name} ({error}); pass "
                            f"a file with --weights PATH, {OR_RANDOM}") from error  # fmt: skip

    facts = network.pretrained_cfg
    classifiers = facts.get("classifier") or ()  # one name, or several
    classifiers = [classifiers] if isinstance(classifiers, str) else classifiers
    return Backbone(
        network, pool, imagenet,
        mean=tuple(255 * value for value in facts["mean"]),
        std=tuple(255 * value for value in facts["std"]),
        interpolation=facts["interpolation"],
        unused=tuple(f"{name}." for name in classifiers),
    )  # fmt: skip


BACKBONES = {
    "bn_inception": bn_inception,
    # its weights expect inputs in [-1, 1]
    "googlenet": partial(torchvision, "googlenet", ("aux1.", "aux2."), mean=3 * (127.5,),
                         std=3 * (127.5,)),
    "resnet18": partial(torchvision, "resnet18"),
    "resnet50": partial(torchvision, "resnet50"),
    "resnet101": partial(torchvision, "resnet101"),
}  # fmt: skip


def create_backbone(name):
    return timm_model(name.removeprefix(TIMM)) if name.startswith(TIMM) else BACKBONES[name]()
