"""Promises of losses.py beyond the reference numbers."""

import contextlib
import math

import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch.nn import functional as F

from losses import DDML, ProxyAnchor, log_standard_deviation, softplus

B, C, D = 12, 7, 16


def batch(dtype=torch.float32, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    head, head_specific = torch.randn(2, B, 2 * D, generator=rng).to(device, dtype)
    labels = torch.randint(C, (B,), generator=rng).to(device)
    return head.requires_grad_(), head_specific.requires_grad_(), labels


def make_ddml(al=1.0, be=0.1, gam=1e-3):
    torch.manual_seed(0)
    return DDML(ProxyAnchor(C, D), al, be, gam)


def test_proxy_anchor_equals_pytorch_metric_learning():
    loss = ProxyAnchor(C, D).double()
    peer = ProxyAnchorLoss(C, D, margin=0.1, alpha=32).double()
    peer.proxies.data.copy_(loss.proxies.data)
    x, labels = torch.randn(B, D, dtype=torch.float64), torch.randint(C, (B,))
    torch.testing.assert_close(loss(x, labels), peer(x, labels), rtol=1e-8, atol=0)


def test_proxy_anchor_of_two_samples_by_hand():
    loss = ProxyAnchor(2, 2)
    loss.proxies.data.copy_(torch.eye(2))
    x, labels = torch.eye(2), torch.tensor([0, 0])  # cosines 1 and 0 to proxy 0, 0 and 1 to proxy 1
    attract = math.log(1 + math.exp(-32 * 0.9) + math.exp(32 * 0.1))  # proxy 0 alone has positives
    repel = math.log(1 + math.exp(32 * 0.1) + math.exp(32 * 1.1))  # of proxy 1
    assert loss(x, labels).item() == pytest.approx(attract + repel / 2, rel=1e-6)


def test_total_is_the_weighted_sum_of_the_terms():
    criterion = make_ddml(al=0.5, be=2.0, gam=0.25)
    total, terms = criterion(*batch())
    assert list(terms) == ["metric", "agnostic", "specific", "split"]
    expected = terms["metric"] + 0.5 * terms["agnostic"] + 2 * terms["specific"]
    torch.testing.assert_close(total, expected + 0.25 * terms["split"])


def test_agnostic_term_is_cross_entropy_against_the_uniform_distribution():
    criterion, (head, head_specific, labels) = make_ddml(), batch()
    eps = torch.zeros(B, D)
    _, terms = criterion(head, head_specific, labels, (eps, eps))
    logits = 23 * F.normalize(head[:, :D]) @ F.normalize(criterion.metric_loss.proxies).T
    uniform = torch.full((B, C), 1 / C)
    torch.testing.assert_close(terms["agnostic"], F.cross_entropy(logits, uniform))


def test_noise_is_drawn_agnostic_first_when_none_is_given():
    criterion, inputs = make_ddml(), batch()
    torch.manual_seed(5)
    drawn, _ = criterion(*inputs)
    torch.manual_seed(5)
    given, _ = criterion(*inputs, noise=(torch.randn(B, D), torch.randn(B, D)))
    assert drawn.item() == given.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_a_float32_loss_without_overflow(dtype):
    head, head_specific, labels = batch(dtype)
    criterion = make_ddml().to(dtype)
    loss, _ = criterion(head * 300, head_specific * 300, labels)
    anchor = criterion.metric_loss(head[:, :D] * 300, labels)
    assert anchor.dtype == torch.float32 and anchor.isfinite()
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert head.grad.isfinite().all() and head_specific.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision_of_the_loss():
    criterion, inputs = make_ddml(), batch()
    noise = torch.randn(2, B, D)
    plain, _ = criterion(*inputs, noise)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = criterion(*inputs, noise)
        anchor = criterion.metric_loss(inputs[0][:, :D], inputs[2])
    assert cast.item() == plain.item()
    assert anchor.item() == criterion.metric_loss(inputs[0][:, :D], inputs[2]).item()


def test_gradients_are_finite_when_every_sample_is_of_one_class():
    head, head_specific, _ = batch()
    loss, _ = make_ddml()(head, head_specific, torch.full((B,), 3))
    loss.backward()
    assert loss.isfinite() and head.grad.isfinite().all()


@pytest.mark.parametrize("s", [-1000.0, -60.0, -5.0, 0.0, 5.0, 1000.0])
def test_log_std_and_its_gradient_stay_finite_and_right(s):
    x = torch.tensor(s, requires_grad=True)
    log_std = log_standard_deviation(x, softplus(x - 5)[0])
    log_std.backward()
    expected = s - 5 if s < -40 else math.log(s - 5) if s > 40 else math.log(
        math.log1p(math.exp(s - 5)))  # fmt: skip
    assert log_std.item() == pytest.approx(expected, rel=1e-5)
    assert 0 < x.grad <= 1


@pytest.mark.parametrize("s", [torch.arange(-120.0, 0, 7.5), torch.arange(0, 121.0, 7.5)])
def test_extreme_s_is_as_right_in_float32_as_in_float64(s):
    d = len(s)
    noise = torch.randn(2, B, d, generator=torch.Generator().manual_seed(0))
    head = torch.cat([torch.linspace(-1, 1, d), s]).repeat(B, 1)

    def compute(dtype):
        heads = [head.to(dtype, copy=True).requires_grad_() for _ in range(2)]
        criterion = DDML(ProxyAnchor(C, d), al=1.0, be=1.0, gam=1.0).to(dtype)
        criterion.metric_loss.proxies.data.copy_(torch.eye(C, d))
        loss, terms = criterion(*heads, torch.arange(B) % C, noise)
        loss.backward()
        return *(x.grad for x in heads), terms["split"].detach()

    for ours, exact in zip(compute(torch.float32), compute(torch.float64)):
        # exp carries the rounding of s - 5, a number of up to 125
        atol = 1e-6 * exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=atol)
    std, exact = softplus(s - 5)[0], softplus(s.double() - 5)[0]
    torch.testing.assert_close(std.double(), exact, rtol=2e-5, atol=1e-37)


def test_gradients_in_closed_form_are_those_of_the_values():
    head, head_specific, labels = batch(torch.float64)
    criterion = make_ddml(al=0.5, be=2.0, gam=0.25).double()
    proxies, noise = criterion.metric_loss.proxies, torch.randn(2, B, D, dtype=torch.float64)

    def values(*_):
        loss, terms = criterion(head, head_specific, labels, noise)
        return loss, *terms.values()

    assert torch.autograd.gradcheck(values, (head, head_specific, proxies))


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_a_weight_of_zero_leaves_its_term_out_of_the_gradients(weights):
    head, head_specific, labels = batch()
    make_ddml(*weights)(head, head_specific, labels)[0].backward()
    assert head.grad.isfinite().all() and head_specific.grad.isfinite().all()
    assert (head.grad[:, D:] != 0).any() == bool(weights[0])
    assert (head_specific.grad != 0).any() == any(weights[1:])


def test_extreme_cosines_do_not_overflow_with_a_large_alpha():
    loss = ProxyAnchor(C, D, alpha=1000)
    x = loss.proxies.detach().clone().requires_grad_()
    value = loss(x, torch.arange(C).roll(1))
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()


def test_the_loss_never_waits_for_the_device(monkeypatch):
    """The meta device holds no values: whatever asks for one, as a synchronisation does, fails."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    criterion = make_ddml().to("meta")
    head, head_specific, labels = batch(device="meta")
    loss, _ = criterion(head, head_specific, labels)
    loss.backward()
    assert criterion.metric_loss.proxies.grad.shape == (C, D)
