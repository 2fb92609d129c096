"""recall_at_k against a brute-force float64 count, and the cases that shortcuts get wrong."""

import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch.nn import functional as F

import evaluate
from dataset.images import ImageSet
from evaluate import describe, recall_at_k
from net import create_model
from retrieval import metrics
from retrieval.embed import embed
from retrieval.metrics import precision_at_r
from retrieval.search import exact_products, nearest
from tests import forked
from tests.operations import Operations, Waits

KS = (1, 2, 4, 8, 100)


def brute_force(embeddings, labels, ks, gallery=None, gallery_labels=None):
    """Query by query, in float64."""
    itself = gallery is None
    if itself:
        gallery, gallery_labels = embeddings, labels
    # elementwise rather than as a matrix product: equal rows have equal similarities
    similarity = (embeddings.double()[:, None] * gallery.double()[None]).sum(dim=2)
    hits = dict.fromkeys(ks, 0)
    for i, row in enumerate(similarity):
        same = gallery_labels == labels[i]
        found = same.clone()
        if itself:
            found[i] = False
        if found.any():
            ahead = int((row[~same] >= row[found].max()).sum())
            for k in ks:
                hits[k] += ahead < k
    return {k: count / len(labels) for k, count in hits.items()}


def random_set(n=90, classes=9, d=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    centres = torch.randn(classes, d, generator=rng)
    x = F.normalize(0.5 * centres[labels] + torch.randn(n, d, generator=rng))
    return x, labels


@pytest.mark.parametrize("chunk_size", [1, 7, 90, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_recall_at_k_agrees_with_brute_force_for_any_chunk_size(chunk_size, dtype):
    x, labels = random_set()
    x = x.to(dtype)
    expected = brute_force(x, labels, KS)
    assert 0 < expected[1] < expected[8] < 1
    assert recall_at_k(x, labels, KS, chunk_size=chunk_size) == expected


@pytest.mark.parametrize("metric", [partial(recall_at_k, ks=KS), precision_at_r])
def test_synchronisations_with_the_device_do_not_grow_with_the_tiles(metric):
    x, labels = F.normalize(torch.randn(200, 16)), torch.arange(200) // 5
    counts = set()
    for chunk_size in (8, 256):
        with Waits() as waits:
            metric(x, labels, chunk_size=chunk_size)
        counts.add(len(waits.seen))
    assert len(counts) == 1 and 0 < counts.pop() < 13


@pytest.mark.parametrize("chunk_size", [1, 17, 64, 1024])
def test_exact_duplicates_across_classes_count_as_ahead(chunk_size):
    x, labels = random_set(60, d=333)
    x = torch.cat([x, x[:40], x[:20]])
    labels = torch.cat([labels, (labels[:40] + 1) % 9, labels[:20]])
    assert recall_at_k(x, labels, KS, chunk_size=chunk_size) == brute_force(x, labels, KS)


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_a_collapsed_embedding_scores_near_zero(chunk_size):
    x = F.normalize(torch.ones(60, 333) + torch.arange(333)).contiguous()
    labels = torch.arange(60) % 6
    assert recall_at_k(x, labels, (1, 49, 51), chunk_size=chunk_size) == {1: 0, 49: 0, 51: 1}


def test_similarities_that_only_float64_tells_apart_are_ordered():
    query = torch.tensor([1.0, 0.0], dtype=torch.float64)
    angles = torch.tensor([1e-5, 2e-5, 1.0], dtype=torch.float64)
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([1, 0, 0])
    result = recall_at_k(query[None], torch.tensor([0]), (1, 2), gallery, labels)
    assert result == {1: 0.0, 2: 1.0}
    result = recall_at_k(query[None], torch.tensor([1]), (1, 2), gallery, labels)
    assert result == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_an_almost_collapsed_embedding_of_any_length_is_counted_exactly(scale):
    """Differences far below what a float32 product of 4,096 terms resolves."""
    noise, labels = random_set(60, d=4096)
    x = scale * F.normalize(1 + 1e-4 * noise)
    unit = x if scale == 1 else F.normalize(x.double())
    assert recall_at_k(x, labels, KS) == brute_force(unit, labels, KS)


def test_chance_is_the_recall_of_a_random_order():
    images = ImageSet([("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")])
    assert "4 images of 2 classes (R@1 by chance: 50.0 %)" in describe("x", images)


def test_recall_at_1_agrees_with_pytorch_metric_learning():
    x, labels = random_set(200)
    peer = AccuracyCalculator(
        include=("precision_at_1",), k=1, knn_func=CustomKNN(CosineSimilarity())
    )
    expected = peer.get_accuracy(x, labels)["precision_at_1"]
    assert recall_at_k(x, labels, (1,))[1] == pytest.approx(expected)


def brute_force_at_r(x, labels, gallery=None, gallery_labels=None):
    """By the definition: each query's list, sorted; among equals, matches come last."""
    itself = gallery is None
    if itself:
        gallery, gallery_labels = x, labels
    similarity = (x.double()[:, None] * gallery.double()[None]).sum(dim=2)
    totals = {"MAP@R": 0.0, "R-Precision": 0.0}
    for i, row in enumerate(similarity.tolist()):
        order = [(-value, int(gallery_labels[j] == labels[i])) for j, value in enumerate(row)
                 if not (itself and i == j)]  # fmt: skip
        hits = [hit for _, hit in sorted(order)]
        R = sum(hits)
        if R:
            totals["R-Precision"] += sum(hits[:R]) / R
            at = [sum(hits[: j + 1]) / (j + 1) for j in range(R) if hits[j]]
            totals["MAP@R"] += sum(at) / R
    return {name: pytest.approx(total / len(labels), abs=1e-12) for name, total in totals.items()}


@pytest.mark.parametrize("chunk_size", [1, 7, 90, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_precision_at_r_agrees_with_brute_force_with_duplicates_and_lone_images(chunk_size, dtype):
    x, labels = random_set()
    labels[:3] = torch.tensor([50, 51, 52])
    x = torch.cat([x, x[:40], x[:20]]).to(dtype)
    labels = torch.cat([labels, (labels[:40] + 1) % 9, labels[:20]])
    expected = brute_force_at_r(x, labels)
    assert precision_at_r(x, labels, chunk_size=chunk_size) == expected
    arguments = x[:30], labels[:30], x[25:], labels[25:]
    assert precision_at_r(*arguments, chunk_size=chunk_size) == brute_force_at_r(*arguments)


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4])
def test_precision_at_r_of_near_ties_that_only_float64_tells_apart(chunk_size, scale):
    noise, labels = random_set(90, d=512)
    x = F.normalize((1 + scale * noise).double())
    expected = brute_force_at_r(x, labels)
    assert precision_at_r(x, labels, chunk_size=chunk_size) == expected
    assert expected["R-Precision"].expected > 0.05


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1024])
@pytest.mark.parametrize("kept", [1, 500, 2**22])
def test_precision_at_r_of_large_and_small_classes_together(chunk_size, kept):
    x, labels = random_set(150)
    labels[:] = torch.tensor([0] * 80 + [1] * 40 + [2] * 5 + [3 + i // 2 for i in range(25)])
    x = F.normalize(x + F.one_hot(labels, 16))
    found = precision_at_r(x, labels, chunk_size=chunk_size, kept=kept)
    assert found == brute_force_at_r(x, labels)
    arguments = x[::3], labels[::3], x[1::2], labels[1::2]
    found = precision_at_r(*arguments, chunk_size=chunk_size, kept=kept)
    assert found == brute_force_at_r(*arguments)


def test_precision_at_r_agrees_with_pytorch_metric_learning():
    x, labels = random_set(200)
    names = {"MAP@R": "mean_average_precision_at_r", "R-Precision": "r_precision"}
    peer = AccuracyCalculator(
        include=tuple(names.values()), k="max_bin_count", knn_func=CustomKNN(CosineSimilarity())
    )
    expected = peer.get_accuracy(x, labels)
    for name, value in precision_at_r(x, labels).items():
        assert value == pytest.approx(expected[names[name]])


def test_precision_at_r_of_a_collapsed_and_of_a_perfect_embedding():
    labels = torch.arange(60) % 6
    collapsed = F.normalize(torch.ones(60, 333) + torch.arange(333)).contiguous()
    assert precision_at_r(collapsed, labels) == {"MAP@R": 0, "R-Precision": 0}
    perfect = F.one_hot(labels).float()
    assert precision_at_r(perfect, labels) == {
        "MAP@R": pytest.approx(1), "R-Precision": pytest.approx(1),
    }  # fmt: skip
    assert precision_at_r(torch.ones(1, 4), torch.tensor([0])) == {"MAP@R": 0, "R-Precision": 0}


def retrieved(x, labels):
    """All that retrieval computes with products."""
    neighbours = nearest(x[:20], x, 5, torch.arange(20))
    return recall_at_k(x, labels, KS), precision_at_r(x, labels), *(y.tolist() for y in neighbours)


def test_autocast_changes_no_result_of_retrieval():
    x, labels = random_set()
    expected = retrieved(x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        assert retrieved(x, labels) == expected
        assert (x @ x.T).dtype == torch.bfloat16


MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.mark.parametrize("owner, name, value", [
    (torch.backends.cuda.matmul, "allow_tf32", True),
    (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    (torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
])  # fmt: skip
def test_retrieval_multiplies_in_float32_and_restores_the_precision_set(owner, name, value):
    setattr(owner, name, value)
    as_set, seen = [setting.fp32_precision for setting in MATMUL], []

    def look(operation, *_):
        if operation is torch.ops.aten.mm.default:
            seen.append([setting.fp32_precision for setting in MATMUL])

    with Operations(look):
        retrieved(*random_set())
    after = [setting.fp32_precision for setting in MATMUL]
    assert len(seen) > 3 and all(each == ["ieee", "ieee"] for each in seen)
    assert after == as_set and set(as_set) & {"tf32", "bf16"}


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_exact_products_leave_torchs_older_precision_api_readable(precision):
    torch.set_float32_matmul_precision(precision)
    with exact_products():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "high")


def test_singleton_classes_count_as_misses_and_are_reported(capsys):
    x, labels = random_set(30)
    labels[:3] = torch.tensor([50, 51, 52])
    assert recall_at_k(x, labels, KS) == brute_force(x, labels, KS)
    assert recall_at_k(x, labels, KS)[100] == 27 / 30
    assert "3 of 30 queries have no match" in capsys.readouterr().err


def test_k_above_the_gallery_size_finds_every_match():
    x, labels = random_set(20, classes=3)
    assert recall_at_k(x, labels, (10**6,)) == {10**6: 1.0}


def test_a_lone_image_is_a_miss():
    assert recall_at_k(torch.ones(1, 4), torch.tensor([0]), (1, 5)) == {1: 0.0, 5: 0.0}


@pytest.mark.parametrize("chunk_size", [1, 8, 1024])
def test_query_against_a_gallery_excludes_nothing(chunk_size):
    x, labels = random_set(80)
    arguments = x[:30], labels[:30], KS, x[25:], labels[25:]
    assert recall_at_k(*arguments, chunk_size=chunk_size) == brute_force(*arguments)


def test_an_embedding_that_is_not_finite_is_refused():
    x, labels = random_set()
    x[4, 2] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        recall_at_k(x, labels, KS)


def test_embeddings_labels_and_a_gallery_that_do_not_fit_are_refused():
    x, labels = torch.ones(48, 4), torch.zeros(48).long()
    for arguments, both in [
        ((x, labels[:10], KS), r"\(48, 4\) and labels \(10,\)"),
        ((x[0], labels[:4], KS), r"\(4,\) and labels \(4,\)"),
        ((x, labels, KS, x, labels[:9]), r"\(48, 4\) and labels \(9,\)"),
        ((x, labels, KS, x), r"\(48, 4\) and labels None"),
        ((x, labels, KS, None, labels), r"None and labels \(48,\)"),
        ((x, labels, KS, x[:, :3], labels), "embeddings of 4 and a gallery of 3 dimensions"),
    ]:
        with pytest.raises(ValueError, match=both):
            recall_at_k(*arguments)
    assert recall_at_k(x, labels.int(), (1,)) == {1: 1.0}
    for arguments, reason in [
        ((x[:0], labels[:0], KS), "are empty"),
        ((x, labels / 2, KS), "not class numbers"),
        ((x, ["a"] * 48, KS), "not arrays of numbers"),
        ((x, labels, ()), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            recall_at_k(*arguments)


def test_recall_is_by_cosine_for_embeddings_of_any_length_and_for_arrays():
    x, labels = random_set()
    longer = x * torch.linspace(0.1, 30, len(x))[:, None]
    expected = brute_force(F.normalize(longer.double()), labels, KS)
    assert brute_force(longer, labels, KS) != expected
    assert recall_at_k(longer, labels, KS) == expected
    assert recall_at_k(longer.numpy(), labels.numpy(), KS) == expected
    assert recall_at_k(1e-30 * longer, labels, KS) == expected
    queries = longer[:30], labels[:30], KS, x[30:], labels[30:]
    assert recall_at_k(*queries) == recall_at_k(x[:30], *queries[1:])


def peak_at_sop_size():
    """In the child: prints the megabytes that recalls take at most."""
    gallery = F.normalize(torch.randn(60502, 512))
    labels = torch.arange(60502) // 5
    recall_at_k(gallery[:64], labels[:64], (1,), gallery[:64], labels[:64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recall_at_k(gallery[:1200], labels[:1200], (1, 10, 100, 1000), gallery, labels)
    ones = F.normalize(torch.ones(60502, 512))
    recall_at_k(ones[:100], labels[:100], (1,), ones, labels)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def test_memory_at_sop_size_stays_below_512_mb(here):
    """Peak resident memory in a process of its own; 1,200 queries are two rows of tiles."""
    process = forked.start(peak_at_sop_size)
    process.join(60)
    assert process.exitcode == 0, Path("err").read_text()
    assert float(Path("out").read_text()) < 512


def test_evaluate_has_recall_at_k_of_retrieval_metrics():
    assert evaluate.recall_at_k is metrics.recall_at_k


def test_embeddings_are_unit_rows_in_the_order_of_the_batches():
    model = create_model("toy", 8, disent=True).train()
    pixels, labels = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8), torch.arange(7) % 3
    index = torch.randperm(7)
    parts = index.split(3)
    embeddings, found = embed(model, [(pixels[part], labels[part], part) for part in parts])
    assert embeddings.shape == (7, 8) and torch.equal(found, labels[index])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
    expected = model.eval().embed(model.prepare(pixels))
    torch.testing.assert_close(embeddings, expected[index])
