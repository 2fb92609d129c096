"""Every number computed with the published implementation, in tests/reference/ or in the folder
that DDML_REFERENCE names. tests/reference/README.md says what each one is."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recipe
from losses import DDML, ProxyAnchor, l2_normalize, standard_deviation
from net import create_model
from tests.reference.fill import fill_state_dict

HERE = Path(__file__).parent / "reference"
FOLDER = Path(os.environ.get("DDML_REFERENCE", HERE))
TRAJECTORIES = {"trajectory_bn_frozen.npz", "trajectory_bn_trained.npz"}
TRAJECTORIES |= {path.name for path in FOLDER.glob("trajectory_*.npz")}
FILES = ["losses.npz", "bn_inception.npz", *sorted(TRAJECTORIES)]


def test_the_reference_folder_has_something_to_check():
    assert any((FOLDER / name).exists() for name in FILES), f"nothing to check in {FOLDER}"


class Reference:
    """One .npz file; remembers what was read, so that no stored number goes unchecked."""

    def __init__(self, name):
        path = FOLDER / name
        if not path.exists():
            pytest.skip(f"{name} is not in {FOLDER}")
        with np.load(path) as file:
            self.arrays = dict(file)
        assert self.arrays, f"{path} is empty"
        self.unread = set(self.arrays)
        self.pairs = []  # (name, ours, expected, rtol, atol, floor)

    def read(self, key, dtype=torch.float64):
        self.unread.discard(key)
        value = torch.from_numpy(np.asarray(self.arrays[key]))
        return value.to(dtype) if dtype else value

    def number(self, key):
        self.unread.discard(key)
        return self.arrays[key].item()

    def compare(self, key, ours, rtol, atol, floor=0.0):
        expected = self.read(key)
        ours = ours.detach().double().reshape(-1)[: expected.numel()].reshape(expected.shape)
        self.pairs.append((key, ours, expected, rtol, atol, floor))


def close(ours, expected, rtol, atol, floor):
    """Elementwise: within the tolerance, and also within 0.5 % or `floor`, the rounding of float32.
    Without the second, `atol` alone would let small values pass that are 1 % off."""
    difference = (ours - expected).abs()
    size = expected.abs()
    return (difference <= atol + rtol * size) & (difference <= (5e-3 * size).clamp(min=floor))


def compare_losses(reference):
    for case in sorted({key.split("/")[0] for key in reference.arrays}):
        for dtype, rtol, atol in ((torch.float64, 1e-8, 1e-10), (torch.float32, 1e-4, 1e-5)):
            compare_loss_case(reference, case, dtype, rtol, atol)


def compare_loss_case(reference, case, dtype, rtol, atol):
    def read(name):
        return reference.read(f"{case}/{name}", dtype)

    def compare(**ours):
        # float64 checks small values; float32 only has to meet its tolerance
        floor = 1e-15 if dtype == torch.float64 else float("inf")
        for name, value in ours.items():
            reference.compare(f"{case}/{name}", value, rtol, atol, floor)

    labels = reference.read(f"{case}/labels", None)
    metric_loss = ProxyAnchor(*read("proxies").shape).to(dtype)
    metric_loss.proxies.data.copy_(read("proxies"))
    criterion = DDML(metric_loss, *read("al_be_gam").tolist())
    head, head_specific = read("mu_scale").requires_grad_(), read("mu_scale_specific")
    head_specific.requires_grad_()
    noise = read("eps_agnostic"), read("eps_specific")
    loss, terms = criterion(head, head_specific, labels, noise)
    loss.backward()
    compare(
        loss=loss,
        agnostic=terms["agnostic"],
        specific=terms["specific"],
        split=terms["split"],
        grad_mu_scale=head.grad,
        grad_mu_scale_specific=head_specific.grad,
        grad_proxies=metric_loss.proxies.grad,
        logits=logits(head, noise[0], metric_loss.proxies),
        logits_specific=logits(head_specific, noise[1], metric_loss.proxies),
    )

    metric_loss.proxies.grad = None
    embedding = read("pa_embedding").requires_grad_()
    loss = metric_loss(embedding, labels)
    loss.backward()
    compare(
        pa_loss=loss,
        pa_grad_embedding=embedding.grad,
        pa_grad_proxies=metric_loss.proxies.grad,
    )


def logits(head, noise, proxies):
    mu, s = head.chunk(2, dim=1)
    z = mu + standard_deviation(s)[0] * noise
    return 23 * l2_normalize(z) @ l2_normalize(proxies).T


def compare_network(reference):
    salt_file = FOLDER / "salt"
    salt = int(salt_file.read_text()) if salt_file.exists() else 0
    for case in sorted({key.split("/")[0] for key in reference.arrays}):
        model = create_model("bn_inception", 512, disent=case.startswith("disent"))
        model.load_state_dict(fill_state_dict(model.state_dict(), salt))
        model.eval()
        # float64 hardly rounds, so it checks small values too
        for dtype in (torch.float32, torch.float64):
            compare_network_case(reference, case, model.to(dtype), dtype, salt)


@torch.no_grad()
def compare_network_case(reference, case, model, dtype, salt):
    images = reference.read(f"{case}/image", dtype)
    with np.load(HERE / "bn_inception.npz") as ours:
        # the rounding of float32 is known for these images only
        known = f"{case}/image" in ours and np.array_equal(ours[f"{case}/image"], images)
    features = model.model.features(images)
    output = model(images)
    exact = dtype == torch.float64 and known and salt == 0
    reference.compare(f"{case}/feature_hw", torch.tensor(features.shape[2:]), 0, 0)
    for name, ours in (
        ("feature_mean", features.mean(dim=(2, 3))),
        ("feature_max", features.amax(dim=(2, 3))),
    ):
        largest = reference.read(f"{case}/{name}").abs().max().item()
        floor = 6e-8 * largest if exact else float("inf")
        reference.compare(f"{case}/{name}", ours, 1e-4, 1e-5 * largest, floor)
    heads = zip(("head", "head_specific"), output) if model.disent else [("head", output)]
    for name, ours in heads:
        largest = reference.read(f"{case}/{name}").abs().max().item()
        floor = 5e-7 * largest if exact else float("inf")
        reference.compare(f"{case}/{name}", ours, 1e-4, 1e-5, floor)


def compare_trajectory(reference):
    """A whole run, through the functions that train.py trains with."""
    number = reference.number
    al, be, gam = reference.read("al_be_gam").tolist()
    args = SimpleNamespace(
        **{name: number(name) for name in ("lr", "weight_decay", "lr_decay_step", "lr_decay_gamma",
                                           "embedding_size", "warm", "bn_freeze")},
        optimizer="adamw", loss="Proxy_Anchor", disent=True, mrg=0.1, alpha=32, proxy_lr_factor=100,
        al=al, be=be, gam=gam, shard_proxies=False,
    )  # fmt: skip
    model = create_model("bn_inception", args.embedding_size, disent=True)
    model.load_state_dict(fill_state_dict(model.state_dict(), number("salt")))
    model.double()
    criterion = recipe.build_criterion(args, number("num_classes")).double()
    criterion.metric_loss.proxies.data.copy_(reference.read("proxies"))
    optimizer, scheduler = recipe.build_optimizer(args, model, criterion)

    images, labels = reference.read("images") - 116, reference.read("labels", None)
    noise = list(zip(reference.read("noise_agnostic"), reference.read("noise_specific")))
    steps_per_epoch = number("steps_per_epoch")
    steps = []
    for epoch in range(number("epochs")):
        recipe.prepare_epoch(model, epoch, args.warm, args.bn_freeze)
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            steps.append(
                recipe.train_step(
                    model, criterion, optimizer, images[step], labels[step], noise[step]
                )
            )
        scheduler.step()

    terms = [[values[name] for name in ("agnostic", "specific", "split")] for values in steps]
    reference.compare("loss", torch.stack([values["loss"] for values in steps]), 1e-7, 0)
    reference.compare("terms", torch.tensor(terms), 1e-7, 0)
    after = model.state_dict() | {"proxies": criterion.metric_loss.proxies}
    for key in reference.arrays:
        if key.startswith("after/"):
            reference.compare(key, after[key.removeprefix("after/")], 1e-7, 1e-9, 1e-15)


@pytest.fixture(scope="module")
def computed():
    """Each file's comparisons, computed once."""
    done = {}

    def compute(name):
        if name not in done:
            reference = Reference(name)
            kind = {"losses.npz": compare_losses, "bn_inception.npz": compare_network}
            kind.get(name, compare_trajectory)(reference)
            done[name] = reference
        return done[name]

    return compute


@pytest.mark.parametrize("name", FILES)
def test_every_stored_number_is_reproduced(computed, name):
    reference = computed(name)
    assert not reference.unread, f"not checked: {sorted(reference.unread)}"
    for key, ours, expected, *tolerance in reference.pairs:
        wrong = ~close(ours, expected, *tolerance)
        worst = (ours - expected).abs().max().item()
        assert not wrong.any(), f"{name} {key}: {wrong.sum()} values differ, by up to {worst}"


@pytest.mark.skipif(FOLDER != HERE, reason="how sensitive the test is, is shown on tests/reference")
@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("name", FILES)
def test_an_error_of_one_percent_in_any_stored_number_is_found(computed, name, factor):
    found = {}  # of an array compared in two precisions, one must find it
    for key, ours, expected, *tolerance in computed(name).pairs:
        if key == "feature_hw":
            continue
        caught = ~close(ours, expected * factor, *tolerance) | (expected == 0)
        found[key] = caught | found.get(key, torch.zeros_like(caught))
    for key, caught in found.items():
        assert caught.all(), f"{name} {key}: {(~caught).sum()} values could be 1 % off"


def test_key_names_and_shapes_are_those_of_a_published_checkpoint():
    listed = json.loads((HERE / "checkpoint_keys.json").read_text())
    state = create_model("bn_inception", 512, disent=True).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == listed
