"""The recipe: what trains in which epoch, with which optimiser, on which batches."""

import shlex

import pytest
import torch
from torch.utils._pytree import tree_leaves

import losses
import train
from net import create_model
from recipe import (
    build_criterion,
    build_optimizer,
    build_training,
    loss_noise,
    parameter_groups,
    prepare_epoch,
    settle_loss,
    train_step,
)
from runs.results import AT_THE_HEADS, Epoch
from tests.conftest import TINY, checkpoint_of, fails, make_cub, metrics, run_folder
from tests.operations import Waits


def recipe(flags=""):
    args = train.build_parser().parse_args(shlex.split(TINY + flags))
    settle_loss(args)
    model = create_model(args.model, 8, disent=args.disent)
    criterion = build_criterion(args, 2)
    return args, model, criterion


@pytest.mark.parametrize("disent", ["True", "False"])
def test_parameter_groups_are_ordered_disjoint_and_complete(disent):
    args, model, criterion = recipe(f"--disent {disent} --lr 0.01")
    groups = parameter_groups(model, criterion, args.lr, 100)
    assert [group["lr"] for group in groups] == [0.01, 0.01, 1.0]
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*model.parameters(), *criterion.parameters()}
    names = {p: name for name, p in model.named_parameters()}
    assert all("embedding" in names[p] for p in groups[1]["params"])
    assert not any("embedding" in names[p] for p in groups[0]["params"])
    assert [p.shape for p in groups[2]["params"]] == [(2, 8)]


def test_the_tool_of_the_next_test_sees_waits():
    x = torch.ones(3)
    with Waits() as waits:
        _ = x.sum().item(), x[x > 0], bool((x > 0).all()), x.tolist(), x.cpu(), x.numpy(), x + 1
    assert len(waits.seen) == 6


@pytest.mark.parametrize("flags", ["", "--bn-freeze 0", "--optimizer sgd", "--optimizer adam",
                                   "--model bn_inception"])  # fmt: skip
def test_a_step_of_ddml_never_waits_for_the_device(monkeypatch, flags):
    monkeypatch.setattr(losses, "require_fit", lambda *args, **kwargs: None)  # looks on CPUs alone
    args, model, criterion = recipe(flags)
    optimizer, _ = build_optimizer(args, model, criterion)
    prepare_epoch(model, 0, 0, args.bn_freeze)
    epoch, labels = Epoch(0, None), torch.arange(4) % 2
    pixels = torch.randint(256, (4, args.image_size, args.image_size, 3), dtype=torch.uint8)
    with Waits() as waits:
        for measured in (False, True):
            noise = loss_noise((4, args.embedding_size), torch.device("cpu"))
            epoch.add(train_step(model, criterion, optimizer, model.prepare(pixels), labels, noise,
                                 measured=measured))  # fmt: skip
    assert not waits.seen
    epoch.fetch()
    assert epoch.totals["loss"] > 0


@pytest.mark.parametrize("flags", ["", "--loss SoftTriple", "--l2-norm 0 --gam 0.1", "--al 0"])
def test_shares_of_the_gradient_and_stds_are_those_of_the_heads(flags):
    """Against the gradient of each weighted term alone, by the chain rule from a fresh graph."""
    args, model, criterion = recipe(f"--al 0.5 {flags}")
    optimizer, _ = build_optimizer(args, model, criterion)
    images, labels, noise = torch.randn(4, 3, 32, 32), torch.arange(4) % 2, torch.randn(2, 4, 8)
    model.train()
    heads = [head.detach().requires_grad_() for head in model(images)]
    norms = []
    for name, weight in (("metric", 1), ("agnostic", args.al), ("specific", args.be),
                         ("split", args.gam)):  # fmt: skip
        (weight * criterion(*heads, labels, noise)[1][name]).backward()
        norms.append(sum(head.grad.square().sum() for head in heads if head.grad is not None)**0.5)
        for head in heads:
            head.grad = None
    values = train_step(model, criterion, optimizer, images, labels, noise, measured=True)
    shares = torch.stack([values[name] for name in AT_THE_HEADS[2:]])
    torch.testing.assert_close(shares, torch.stack(norms) / sum(norms), rtol=1e-4, atol=1e-7)
    assert shares.sum().item() == pytest.approx(1) and (shares[1] == 0) == (args.al == 0)
    for name, head in zip(("std", "std_specific"), heads):
        s = head[:, 8:].detach().double()
        assert values[name].item() == pytest.approx((s - 5).exp().log1p().mean().item(), rel=1e-5)
        assert not args.l2_norm or 0.0025 < values[name] < 0.018  # |s| <= 1


def test_measuring_at_the_heads_changes_no_bit_of_a_run_and_costs_one_step_an_epoch(
    here, monkeypatch
):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--LOG_DIR measured"))
    original = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: original(*args[:-1]))
    train.main(shlex.split(TINY + "--LOG_DIR not"))
    sides = [next(here.glob(f"{name}/*/*")) for name in ("measured", "not")]
    assert set(AT_THE_HEADS) < metrics(sides[0])[0].keys() and "std" not in metrics(sides[1])[0]
    first, second = (torch.load(checkpoint_of(side)) for side in sides)
    for part in ("model_state_dict", "criterion_state_dict", "optimizer_state_dict"):
        for a, b in zip(tree_leaves(first[part]), tree_leaves(second[part]), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_plain_loss_has_nothing_measured_at_its_heads(here):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--disent False --epochs 1"))
    assert not set(AT_THE_HEADS) & metrics(run_folder(here))[0].keys()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_warm_up_trains_heads_alone_and_then_everything_even_frozen_batchnorm():
    _, model, _ = recipe()
    prepare_epoch(model, epoch=0, warm=1, bn_freeze=True)
    assert trainable(model) == {name for name, _ in model.named_parameters() if "embedding" in name}
    prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_without_warm_up_frozen_batchnorm_keeps_its_weights_too():
    _, model, _ = recipe()
    prepare_epoch(model, epoch=3, warm=0, bn_freeze=True)
    frozen = {name for name, _ in model.named_parameters() if ".bn." in name}
    assert trainable(model) == {name for name, _ in model.named_parameters()} - frozen


@pytest.mark.parametrize("flags", ["", "--IPC 4"])
def test_main_wires_the_recipe_into_every_step(here, monkeypatch, flags):
    """What each step of a run is given, and what the flags change of it."""
    make_cub(here / "data")
    steps = []
    original = train.train_step

    def spy(model, criterion, optimizer, images, labels, noise, batch_size, measured):
        before = model.model.conv.weight.detach().clone()
        values = original(model, criterion, optimizer, images, labels, noise, batch_size, measured)
        steps.append({
            "lr": [group["lr"] for group in optimizer.param_groups],
            "moved": not torch.equal(before, model.model.conv.weight),
            "images": images, "labels": labels, "noise": noise, "loss": values["loss"].item(),
            "shares": values.get("share_split"),
            "loss flags": (criterion.metric_loss.margin, criterion.metric_loss.alpha,
                           criterion.al, criterion.be, criterion.gam, model.l2_norm),
        })  # fmt: skip
        return values

    monkeypatch.setattr(train, "train_step", spy)
    command = TINY + "--epochs 3 --lr 0.01 --lr-decay-step 1 --lr-decay-gamma 0.5 --mrg 0.2 "
    command += f"--alpha 16 --l2-norm 0 {flags} "
    train.main(shlex.split(command))

    assert [step["lr"] for step in steps[::2]] == [
        [0.01, 0.01, 1.0], [0.005, 0.005, 0.5], [0.0025, 0.0025, 0.25],
    ]  # fmt: skip
    assert [step["moved"] for step in steps] == [False, False, True, True, True, True]
    assert all(step["loss flags"] == (0.2, 16, 1, 0.1, 1e-5, False) for step in steps)
    records = metrics(run_folder(here))
    assert [record["lr"] for record in records] == [0.01, 0.005, 0.0025]
    for record, first, second in zip(records, steps[::2], steps[1::2], strict=True):
        assert record["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
        assert first["shares"] is None and record["share_split"] == second["shares"]
    for name in ("images", "noise"):
        assert len({step[name].sum().item() for step in steps}) == 6
    if flags:
        assert all(step["labels"].bincount().tolist() == [4, 4] for step in steps)

    first = steps[0]
    steps.clear()
    train.main(shlex.split(command + "--seed 2 --epochs 1"))
    assert not torch.equal(first["images"], steps[0]["images"])
    assert not torch.equal(first["noise"], steps[0]["noise"])


def test_weights_differ_between_seeds():
    first, second = (build_training(recipe(f"--seed {seed}")[0], 2, torch.device("cpu"), None)
                     for seed in "12")  # fmt: skip
    assert not torch.equal(first.model.model.embedding.weight, second.model.model.embedding.weight)
    first, second = (side.criterion.metric_loss.proxies for side in (first, second))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("flags, alpha, mrg, factor", [
    ("--loss SoftTriple",                                      20, 0.01, 100),
    ("--loss CosFace --alpha 8 --mrg 0.2 --proxy-lr-factor 3", 8,  0.2,  3),
])  # fmt: skip
def test_a_loss_gives_its_own_values_to_the_flags_that_are_left_to_it(flags, alpha, mrg, factor):
    args, model, criterion = recipe(flags)
    assert (args.alpha, args.mrg, args.proxy_lr_factor) == (alpha, mrg, factor)
    optimizer, _ = build_optimizer(args, model, criterion)
    assert optimizer.param_groups[2]["lr"] == pytest.approx(factor * args.lr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_on_cuda_equals_the_step_on_the_cpu_and_never_synchronises():
    losses = []
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4) % 2
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        args, model, criterion = recipe()
        model.to(device), criterion.to(device)
        optimizer, _ = build_optimizer(args, model, criterion)
        prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
        inputs = images.to(device), labels.to(device)
        train_step(model, criterion, optimizer, *inputs, torch.zeros(2, 4, 8, device=device))
        try:
            torch.cuda.set_sync_debug_mode("error")
            noise = loss_noise((4, 8), device)
            values = train_step(model, criterion, optimizer, *inputs, noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(values["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_deterministic_stops_at_what_is_not(here, capsys, monkeypatch):
    def not_deterministic(*args):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))

    make_cub(here / "data")
    monkeypatch.setattr(train, "train_step", not_deterministic)
    line = fails(TINY + "--deterministic", capsys)
    assert "error: --deterministic: put_ does not have a deterministic implementation; " in line
