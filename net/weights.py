"""Reading weights, strictly: a missing, extra or misshapen tensor is refused by name."""

import hashlib
import socket
from pathlib import Path

import torch

from storage import read_checkpoint
from utils import UserError

CONNECT_SECONDS = 20  # BN-Inception's host is often down, and torch.hub would wait for minutes
OR_RANDOM = "or train from random weights with --weights none --warm 0 --bn-freeze 0"


def download(url, sha256):
    """Path of an ImageNet file in torch.hub's cache; sha256: hex digits, or the first of them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    elsewhere = f"get that file elsewhere and pass it as --weights PATH, {OR_RANDOM}"
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(CONNECT_SECONDS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            reason = f"not in {path}, and {url} failed ({error})"
            raise UserError(f"--weights imagenet: {reason}; {elsewhere}") from error
        finally:
            socket.setdefaulttimeout(timeout)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise UserError(f"--weights imagenet: {path} is damaged (its SHA-256 is {digest}, not "
                        f"{sha256}); delete it to download it again, or {elsewhere}")  # fmt: skip
    return path


def load_weights(model, weights):
    """weights: "imagenet", or the path of a backbone's weights or of a checkpoint."""
    if weights == "imagenet":
        if model.backbone.imagenet is None:
            raise UserError(f"--weights imagenet: there are none for {model.name}")
        state = model.backbone.imagenet()
    else:
        checkpoint = read_checkpoint(weights)
        state = checkpoint.get("model_state_dict", checkpoint)
    if not any(str(name).startswith("model.") for name in state):
        state = from_backbone(state, model)
    load_strictly(model, state, weights)


def from_backbone(file, model):
    """A backbone's own file under our names, with our heads, and without the classifier if `model`
    has none; BN-Inception's file lacks counters and has tensors of shape [1, ...]."""
    used = (name for name in file if not str(name).startswith(model.backbone.unused))
    state = {f"model.{name}": file[name] for name in used}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.embedding") or name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
        if getattr(state.get(name), "shape", None) == (1, *tensor.shape):
            state[name] = state[name].squeeze(0)
    return state


def load_strictly(module, state, path):
    """load_state_dict; what does not fit is named. (differs: the script loads what fits)"""
    expected = module.state_dict()
    misshapen = []
    for name in expected.keys() & state.keys():
        shape = getattr(state[name], "shape", None)
        if shape != expected[name].shape:
            found = tuple(shape) if shape is not None else type(state[name]).__name__
            misshapen.append(f"{name} {found} instead of {tuple(expected[name].shape)}")
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    listed = [f"{kind} {some(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise UserError(f"{path}: not the weights of this network: {'; '.join(listed)}")
    module.load_state_dict(state)


def some(keys, limit=20):
    keys = sorted(map(str, keys))
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def state_and_flags(checkpoint, path):
    """(state dict, {flag: value}); without stored flags, as published, the shapes tell them."""
    state, stored = checkpoint.get("model_state_dict"), checkpoint.get("args", {})
    if not isinstance(state, dict) or not isinstance(stored, dict):
        raise UserError(f"{path}: not a checkpoint: it has no model_state_dict, or odd flags")
    disent = "model.embedding_specific.weight" in state
    shape = getattr(state.get("model.embedding.weight"), "shape", ())
    if len(shape) != 2:
        raise UserError(f"{path}: not a checkpoint: it has no model.embedding.weight")
    flags = {"model": "bn_inception", "l2_norm": True, "precision": "fp32",
             "embedding_size": shape[0] // 2 if disent else shape[0]}  # fmt: skip
    return state, flags | stored | {"disent": disent}
