"""Promises of losses.py beyond the reference numbers."""

import contextlib
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch.nn import functional as F

import sharded
from losses import DDML, LOSSES, PROXY_LOSSES, ProxyAnchor, class_proxies, standard_deviation
from tests.conftest import ROOT

B, C, D = 12, 7, 16


def batch(dtype=torch.float32, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    head, head_specific = torch.randn(2, B, 2 * D, generator=rng).to(device, dtype)
    labels = torch.randint(C, (B,), generator=rng).to(device)
    return head.requires_grad_(), head_specific.requires_grad_(), labels


def make_ddml(al=1.0, be=0.1, gam=1e-3):
    torch.manual_seed(0)
    return DDML(ProxyAnchor(C, D), al, be, gam)


def test_proxy_anchor_of_two_samples_by_hand():
    loss = ProxyAnchor(2, 2)
    loss.proxies.data.copy_(torch.eye(2))
    x, labels = torch.eye(2), torch.tensor([0, 0])  # cosines 1 and 0 to proxy 0, 0 and 1 to proxy 1
    attract = math.log(1 + math.exp(-32 * 0.9) + math.exp(32 * 0.1))  # proxy 0 alone has positives
    repel = math.log(1 + math.exp(32 * 0.1) + math.exp(32 * 1.1))  # of proxy 1
    assert loss(x, labels).item() == pytest.approx(attract + repel / 2, rel=1e-6)


def test_each_rank_starts_with_its_rows_of_the_unsharded_proxies(monkeypatch):
    torch.manual_seed(1)
    whole = ProxyAnchor(100, D).proxies
    assert whole.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.1)
    drawn = []
    for rows in (range(33), range(33, 90), range(90, 100)):
        monkeypatch.setattr(sharded, "rows_of_this_rank", lambda _, rows=rows: rows)
        torch.manual_seed(1)
        drawn.append(sharded.initial_proxies(100, D, block=40))
    assert torch.equal(torch.cat(drawn), whole)


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


def test_autocast_does_not_lower_the_precision_of_proxy_anchor_alone():
    (head, _, labels), loss = batch(), ProxyAnchor(C, 2 * D)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(head, labels)
    assert cast.item() == loss(head, labels).item()


def test_gradients_are_finite_when_every_sample_is_of_one_class():
    head, head_specific, _ = batch()
    loss, _ = make_ddml()(head, head_specific, torch.full((B,), 3))
    loss.backward()
    assert loss.isfinite() and head.grad.isfinite().all()


@pytest.mark.parametrize("s", [-1000.0, -60.0, -5.0, 0.0, 5.0, 1000.0])
def test_log_std_and_its_gradient_stay_finite_and_correct(s):
    x = torch.tensor(s, requires_grad=True)
    _, log_std = standard_deviation(x)
    log_std.backward()
    expected = s - 5 if s < -40 else math.log(s - 5) if s > 40 else math.log(
        math.log1p(math.exp(s - 5)))  # fmt: skip
    assert log_std.item() == pytest.approx(expected, rel=1e-5)
    assert 0 < x.grad <= 1


@pytest.mark.parametrize("s", [torch.arange(-120.0, 0, 7.5), torch.arange(0, 121.0, 7.5)])
def test_extreme_s_gives_the_same_in_float32_and_float64(s):
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
    std, exact = standard_deviation(s)[0], standard_deviation(s.double())[0]
    torch.testing.assert_close(std.double(), exact, rtol=2e-5, atol=1e-37)


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


def test_the_loss_never_synchronises_with_the_device(monkeypatch):
    """The meta device holds no values: whatever asks for one, as a synchronisation does, fails."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    criterion = make_ddml().to("meta")
    head, head_specific, labels = batch(device="meta")
    loss, _ = criterion(head, head_specific, labels)
    loss.backward()
    assert criterion.metric_loss.proxies.grad.shape == (C, D)


def test_the_whole_loss_compiles_as_one_graph():
    torch._dynamo.reset()
    criterion, inputs, noise = make_ddml(), batch(), torch.randn(2, B, D)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    loss, _ = compiled(*inputs, noise)
    loss.backward()
    gradient = inputs[0].grad.clone()
    inputs[0].grad = None
    expected, _ = criterion(*inputs, noise)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, inputs[0].grad)


def test_ddml_around_the_librarys_proxy_anchor_equals_ddml_around_ours():
    ours, inputs, noise = make_ddml(), batch(), torch.randn(2, B, D)
    peer = DDML(ProxyAnchorLoss(C, D, margin=0.1, alpha=32), 1.0, 0.1, 1e-3)
    peer.metric_loss.proxies.data.copy_(ours.metric_loss.proxies.data)
    torch.testing.assert_close(peer(*inputs, noise), ours(*inputs, noise))


# --- every value of --loss --------------------------------------------------------------------

LIBRARY = {
    "Proxy_NCA": lambda: pml.ProxyNCALoss(C, D, softmax_scale=32),
    "NormSoftmax": lambda: pml.NormalizedSoftmaxLoss(C, D, temperature=0.05),
    "CosFace": lambda: pml.CosFaceLoss(C, D, margin=0.35, scale=64),
    "ArcFace": lambda: pml.ArcFaceLoss(C, D, margin=28.6, scale=64),
    "SoftTriple": lambda: pml.SoftTripleLoss(C, D, centers_per_class=10, la=20, margin=0.01),
    "Contrastive": lambda: pml.ContrastiveLoss(neg_margin=0.5),
    "Triplet": lambda: pml.TripletMarginLoss(margin=0.1),
    "MultiSimilarity": lambda: pml.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
    "NPair": lambda: pml.NPairsLoss(),
}
MINERS = {
    "Triplet": miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard"),
    "MultiSimilarity": miners.MultiSimilarityMiner(epsilon=0.1),
}


def make_loss(name):
    torch.manual_seed(0)
    choice = LOSSES[name]
    return choice.make(C, D, choice.margin, choice.scale)


@pytest.mark.parametrize("name", LIBRARY)
def test_each_loss_equals_the_librarys_with_its_settings(name):
    x, labels = F.normalize(torch.randn(B, D)), torch.randint(C, (B,))
    ours, theirs = make_loss(name), LIBRARY[name]()
    theirs.load_state_dict((ours.loss if name in MINERS else ours).state_dict())
    pairs = MINERS[name](x, labels) if name in MINERS else None
    assert ours(x, labels).item() == theirs(x, labels, pairs).item() != 0


@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_the_terms_of_ddml_give_gradients_to_every_proxy_and_both_heads(name):
    head, head_specific, labels = batch()
    criterion = DDML(make_loss(name), 1.0, 0.1, 1e-3)
    criterion.metric_loss.forward = lambda mu, labels: mu.new_zeros(())
    criterion(head, head_specific, labels)[0].backward()
    (proxies,) = criterion.parameters()
    assert (proxies.grad != 0).all() and head.grad.all() and head_specific.grad.all()


def test_several_centres_of_a_class_average_to_one_proxy():
    loss = pml.SubCenterArcFaceLoss(num_classes=4, embedding_size=6, sub_centers=3)
    P = class_proxies(loss)
    assert P.shape == (4, 6)
    centers = F.normalize(loss.W.T).reshape(4, 3, 6)
    torch.testing.assert_close(P, centers.mean(dim=1))
    DDML(loss, 1, 1, 1)(torch.randn(8, 12), torch.randn(8, 12), torch.arange(8) % 4)


@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_each_class_proxy_has_its_least_loss_with_its_own_label(name):
    loss = make_loss(name)
    if name == "SoftTriple":  # centres of a class that are near each other
        centers = torch.randn(C, 1, D) + 0.1 * torch.randn(C, 10, D)
        loss.fc.data = centers.flatten(0, 1).T.contiguous()
    P = class_proxies(loss)
    assert P.shape == (C, D)
    values = [[loss(F.normalize(x[None]), torch.tensor([c])).item() for c in range(C)] for x in P]
    assert torch.tensor(values).argmin(dim=1).tolist() == list(range(C))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(PROXY_LOSSES)))
def test_a_loss_without_proxies_is_refused_by_ddml(name):
    with pytest.raises(ValueError, match="has no proxies"):
        DDML(make_loss(name), 1.0, 0.1, 1e-3)


@pytest.mark.parametrize("name, disent", [
    *((name, False) for name in LOSSES), *((name, True) for name in PROXY_LOSSES)
])  # fmt: skip
def test_ten_steps_on_a_toy_problem_lower_the_loss(name, disent):
    labels = torch.arange(4 * C) % C
    points = torch.randn(C, 8)[labels] + 0.2 * torch.randn(4 * C, 8)
    criterion = DDML(make_loss(name), 1.0, 0.1, 1e-3) if disent else make_loss(name)
    heads = torch.nn.ModuleList(torch.nn.Linear(8, 2 * D if disent else D) for _ in range(2))
    optimizer = torch.optim.Adam([*heads.parameters(), *criterion.parameters()], lr=0.02)
    noise, values = torch.randn(2, 4 * C, D), []
    for _ in range(11):
        if disent:
            value, _ = criterion(heads[0](points), heads[1](points), labels, noise)
        else:
            value = criterion(F.normalize(heads[0](points)), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.98 * values[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_half_precision_never_reaches_a_loss_in_ddml_or_its_parameters(name, dtype):
    criterion, noise = DDML(make_loss(name), 1.0, 0.1, 1e-3), torch.randn(2, B, D)
    head, head_specific, labels = batch(dtype)
    with torch.autocast("cpu", dtype):
        value, _ = criterion(head, head_specific, labels, noise)
    assert value.dtype == torch.float32
    assert value.item() == criterion(head.float(), head_specific.float(), labels, noise)[0].item()
    assert all(p.dtype == torch.float32 for p in criterion.parameters())


def test_losses_py_alone_in_an_empty_folder_works(tmp_path, monkeypatch):
    (tmp_path / "losses.py").write_text((ROOT / "losses.py").read_text())
    monkeypatch.setattr(sys, "path", [
        str(tmp_path), *(path for path in sys.path if Path(path).resolve() != ROOT)
    ])  # fmt: skip
    with monkeypatch.context() as patch:
        for name in [path.stem for path in ROOT.glob("*")]:
            patch.delitem(sys.modules, name, raising=False)
        alone = importlib.import_module("losses")
    assert alone.__file__ == str(tmp_path / "losses.py")
    criterion = alone.DDML(alone.ProxyAnchor(3, 4), 1, 1, 1)
    loss, terms = criterion(*torch.randn(2, 5, 8), torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    assert sorted(terms) == ["agnostic", "metric", "specific", "split"]


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("x, labels, both", [
    (torch.ones(8, 16), torch.zeros(7).long(), r"\(8, 16\) and labels \(7,\)"),
    (torch.ones(8, 15), torch.zeros(8).long(), r"\(8, 15\) .* 4 proxies of 16"),
    (torch.ones(16), torch.zeros(16).long(), r"\(16,\) and labels"),
    (torch.ones(8, 16), torch.full((8,), 4), "labels from 4 to 4 do not fit 4 proxies"),
    (torch.ones(8, 16), torch.full((8,), -1), "labels from -1 to -1 do not fit 4 proxies"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_named_in_the_error(x, labels, both):
    loss = ProxyAnchor(4, 16)
    with pytest.raises(ValueError, match=both):
        loss(x, labels)
    head, good = torch.cat([x, x], dim=-1), torch.ones(len(labels), 32)
    for heads in ((head, good), (good, head)):
        with pytest.raises(ValueError, match="do not fit"):
            DDML(loss, 1, 1, 1)(*heads, labels)


def test_heads_noise_and_labels_of_a_wrong_shape_or_type_are_refused():
    loss, labels, head = DDML(ProxyAnchor(4, 16), 1, 1, 1), torch.arange(8) % 4, torch.ones(8, 32)
    for arguments in [
        (head[:, :31], head, labels), (head, head[:, :31], labels), (head, head, labels / 2),
        (head, head, labels, torch.ones(2, 16)), (head, head, labels, torch.ones(2, 7, 16)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="fit|not class numbers"):
            loss(*arguments)


@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_int32_labels_give_the_loss_of_int64_labels(name):
    criterion, noise = DDML(make_loss(name), 1, 1, 1), torch.randn(2, B, D)
    head, head_specific, labels = batch()
    values = [criterion(head, head_specific, y, noise)[0] for y in (labels, labels.int())]
    assert torch.equal(*values)
