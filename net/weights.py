"""Reading weights, strictly: a missing, extra or misshapen tensor is refused by name."""

import hashlib
import socket
from pathlib import Path

import torch

from cli import UserError
from utils import read_checkpoint

IMAGENET_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"
IMAGENET_SHA256 = "52deb473314542a5c2f87e9e6f26f4ca42fe863d15f986414dbae8c2dfdd2353"
CONNECT_SECONDS = 20  # the host is often down, and torch.hub would wait for minutes


def download_imagenet():
    """Path of the ImageNet file, from torch.hub's cache or else its host; SHA-256 checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(IMAGENET_URL).name
    elsewhere = (
        "get that file elsewhere and pass it as --weights PATH, "
        "or train from random weights with --weights none"
    )
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(CONNECT_SECONDS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # torch.hub compares the file's SHA-256 with as long a prefix as it is given: all of it
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), hash_prefix=IMAGENET_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--weights imagenet: not in {path}, and {IMAGENET_URL} failed ({error}); "
                + elsewhere
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != IMAGENET_SHA256:
        raise UserError(
            f"--weights imagenet: {path} is damaged (its SHA-256 is {digest}, not "
            f"{IMAGENET_SHA256}); delete it to download it again, or {elsewhere}"
        )
    return path


def load_weights(model, weights):
    """Load "imagenet", the ImageNet file, a published checkpoint or one of ours into `model`."""
    path = download_imagenet() if weights == "imagenet" else weights
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("model_state_dict", checkpoint)
    if "model_state_dict" not in checkpoint and "conv1_7x7_s2.weight" in checkpoint:
        state = from_imagenet(checkpoint, model.state_dict())
    load_strictly(model, state, path)


def from_imagenet(file, expected):
    """The ImageNet file under our names. It has no `model.` prefix, no heads, may lack the
    counters of BatchNorm, and stores some tensors with a leading dimension of 1."""
    state = {}
    for name, tensor in file.items():
        name = f"model.{name}"
        shape = getattr(tensor, "shape", None)
        if name in expected and shape == (1, *expected[name].shape):
            tensor = tensor.squeeze(0)
        state[name] = tensor
    for name, tensor in expected.items():
        if name.startswith("model.embedding") or name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    return state


def load_strictly(model, state, path):
    """`model.load_state_dict`, with every key that does not fit named in one line (differs: the
    script loads what fits)."""
    if not isinstance(state, dict):
        raise UserError(f"{path}: model_state_dict is not a dictionary of tensors")
    expected = model.state_dict()
    misshapen = []
    for name in expected.keys() & state.keys():
        shape = getattr(state[name], "shape", None)
        if shape != expected[name].shape or state[name].is_complex():
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
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:  # sparse, quantised or empty shells of tensors
        raise UserError(f"{path}: tensors that cannot be loaded ({error})") from error


def _some(keys, most=20):
    keys = sorted(map(str, keys))
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
