"""Reading weights, strictly: a missing, extra or misshapen tensor is refused by name."""

import hashlib
import socket
from pathlib import Path

import torch

from storage import read_checkpoint
from utils import UserError

CONNECT_SECONDS = 20  # BN-Inception's host is often down, and torch.hub would wait for minutes


def download(url, sha256):
    """Path of an ImageNet file, from torch.hub's cache or else its host. `sha256` may be the first
    digits alone, as in the names of torchvision's files."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    elsewhere = (
        "get that file elsewhere and pass it as --weights PATH, "
        "or train from random weights with --weights none"
    )
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(CONNECT_SECONDS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--weights imagenet: not in {path}, and {url} failed ({error}); {elsewhere}"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise UserError(
            f"--weights imagenet: {path} is damaged (its SHA-256 is {digest}, not "
            f"{sha256}); delete it to download it again, or {elsewhere}"
        )
    return path


def load_weights(model, weights):
    """Load "imagenet", a file with a backbone's weights alone, a published checkpoint or one of
    ours into `model`."""
    if weights == "imagenet":
        if model.backbone.imagenet is None:
            raise UserError(f"--weights imagenet: there are none for {model.name}")
        state = model.backbone.imagenet()
    else:
        checkpoint = read_checkpoint(weights)
        state = checkpoint.get("model_state_dict", checkpoint)
    if isinstance(state, dict) and not any(str(name).startswith("model.") for name in state):
        state = from_backbone(state, model)
    load_strictly(model, state, weights)


def from_backbone(file, model):
    """A backbone's own file under our names: without `model.`, heads and, where the backbone has
    none, the classifier; BN-Inception's may lack counters and has tensors of shape [1, ...]."""
    expected, state = model.state_dict(), {}
    for name, tensor in file.items():
        if model.backbone.unused and str(name).startswith(model.backbone.unused):
            continue
        name = f"model.{name}"
        shape = getattr(tensor, "shape", None)
        if name in expected and shape == (1, *expected[name].shape):
            tensor = tensor.squeeze(0)
        state[name] = tensor
    for name, tensor in expected.items():
        if name.startswith("model.embedding") or name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    return state


def load_strictly(module, state, path):
    """`module.load_state_dict`, with every key that does not fit named in one line (differs: the
    script loads what fits)."""
    if not isinstance(state, dict):
        raise UserError(f"{path}: model_state_dict is not a dictionary of tensors")
    expected = module.state_dict()
    misshapen = []
    for name in expected.keys() & state.keys():
        shape = getattr(state[name], "shape", None)
        if shape != expected[name].shape:
            found = tuple(shape) if shape is not None else type(state[name]).__name__
            misshapen.append(f"{name} {found} instead of {tuple(expected[name].shape)}")
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "misshapen": misshapen,
    }
    listed = [f"{kind} {_some(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise UserError(f"{path}: not the weights of this network: {'; '.join(listed)}")
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:  # sparse, quantised or empty shells of tensors
        raise UserError(f"{path}: tensors that cannot be loaded ({error})") from error


def _some(keys, most=20):
    keys = sorted(map(str, keys))
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
