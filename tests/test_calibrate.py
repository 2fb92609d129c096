"""The threshold of --calibrate against counting pair by pair, and its promise on other classes."""

import base64
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

import dataset
import evaluate
import train
from dataset.images import ImageSet, digest_of_contents, digests_of_files
from loading.loader import Loading, batches, test_loader
from net import load_model
from retrieval import calibrate as calibrate_module
from retrieval.calibrate import BINS, calibrate, check_pairs, count_pairs, resampled
from retrieval.embed import embed
from tests.conftest import (
    TINY,
    checkpoint_of,
    fails,
    made_once,
    make_cub,
    make_folder,
    make_inshop,
    run_folder,
)
from tests.test_held_out import HELD
from tests.test_page import data_of
from utils import UserError


def made(classes=9, images=7, d=16, noise=0.8, seed=0):
    """Embeddings whose classes are in groups of similar ones, in mixed order."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * images)[torch.randperm(classes * images, generator=rng)]
    labels = labels % classes
    group = torch.randint(max(2, classes // 3), (classes,), generator=rng)
    centres = torch.randn(classes, d, generator=rng) + torch.randn(classes, d, generator=rng)[group]
    x = centres[labels] + noise * torch.randn(len(labels), d, generator=rng)
    return F.normalize(x), labels


def with_ties(seed=0):
    """Embeddings of four entries of 1/2 or -1/2: cosines are exact, and most pairs tie."""
    rng = torch.Generator().manual_seed(seed)
    x, labels = torch.randint(2, (60, 4), generator=rng) - 0.5, torch.arange(60) % 5
    alike = torch.rand(60, generator=rng) < 0.6
    x[alike] = x[labels[alike]]  # those are nearly all of their class
    return x, labels


def pairs_by_hand(x, labels, queries=None):
    """(cosines of genuine pairs, of impostors), in float64."""
    x, y, N = x.double().numpy(), labels.numpy(), len(x)
    pairs = [(i, j) for i in range(N if queries is None else queries)
             for j in range(i + 1 if queries is None else queries, N)]  # fmt: skip
    i, j = np.array(pairs).T
    cosines, same = (x[i] * x[j]).sum(axis=1), y[i] == y[j]
    return cosines[same], cosines[~same]


@pytest.mark.parametrize("queries", [None, 20])
@pytest.mark.parametrize("make, fmr", [(made, 0.01), (made, 0.2), (with_ties, 0.3)])
def test_threshold_rates_and_area_equal_those_counted_pair_by_pair(make, fmr, queries):
    x, labels = make()
    found, counts = calibrate(x, labels, fmr, queries)
    genuine, impostor = pairs_by_hand(x, labels, queries)
    assert found["pairs"] == {"one class": len(genuine), "different classes": len(impostor)}
    edges = np.arange(-BINS // 2, BINS // 2) / (BINS // 2)
    matching, missed = (np.array([wrong.mean() for wrong in rows]) for rows in (
        impostor >= edges[:, None], genuine < edges[:, None]))  # fmt: skip
    at = np.flatnonzero(matching <= fmr)[0]
    crossing = np.abs(matching - missed).argmin()
    assert found["threshold"] == edges[at] and found["fmr"] == fmr
    assert found["measured_fmr"] == pytest.approx(matching[at])
    assert found["fnmr"] == pytest.approx(missed[at])
    assert found["eer"] == pytest.approx((matching[crossing] + missed[crossing]) / 2)
    truth = [1] * len(genuine) + [0] * len(impostor)
    exact = roc_auc_score(truth, np.concatenate([genuine, impostor]))
    assert found["auc"] == pytest.approx(exact, abs=1e-12 if make is with_ties else 1e-4)
    assert all(each.sum() == number for each, number in zip(counts.values(), (
        len(genuine), len(impostor))))  # fmt: skip


def test_the_calibration_of_four_images_by_hand():
    x = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]])
    found, _ = calibrate(x, torch.tensor([0, 0, 1, 1]), 0.25)
    # one class: 0.6, 0; different classes: 0, -1, 0.8, -0.6
    assert found["pairs"] == {"one class": 2, "different classes": 4}
    assert found["threshold"] == 1 / 4096  # the smallest above the impostor with 0
    assert (found["measured_fmr"], found["fnmr"]) == (0.25, 0.5)
    assert found["auc"] == (3 + 2.5) / 8  # 0.6 is above three impostors; 0 above two, and ties


def test_the_counts_do_not_depend_on_groups_and_tiles(monkeypatch):
    x, labels = made(classes=11)
    whole = count_pairs(x, labels)
    monkeypatch.setattr(calibrate_module, "TILE", 200)  # two or three rows
    assert all((a == b).all() for a, b in zip(whole, count_pairs(x, labels)))
    for queries in (None, 30):
        genuine, impostor, sides = count_pairs(x, labels, queries)
        assert len(genuine) == 11 and sides.shape == (2, len(impostor)) == (2, 66)
        assert not impostor[sides[0] == sides[1]].any()  # a class with itself
        few, impostor_of_few, _ = count_pairs(x, labels, queries, groups=3)
        assert len(few) == 3
        assert (few.sum(axis=0) == genuine.sum(axis=0)).all()
        assert (impostor_of_few.sum(axis=0) == impostor.sum(axis=0)).all()


def test_a_class_drawn_twice_counts_as_two_classes_without_pairs_between_them():
    x, labels = made(classes=5, images=4)
    counts = count_pairs(x, labels)
    # which class has which row of the counts
    own = {tuple(row): i for i, row in enumerate(counts[0])}
    drawn = np.random.default_rng(0).multinomial(5, np.full(5, 1 / 5), 20)
    genuine, impostor = resampled(*counts, resamples=20)
    order = [own[tuple(count_pairs(x[labels == c], labels[labels == c])[0].sum(axis=0))]
             for c in range(5)]  # fmt: skip
    assert sorted(order) == [0, 1, 2, 3, 4] and drawn.max() > 2
    for w, *found in zip(drawn, genuine, impostor):
        copies = [c for c in range(5) for _ in range(w[order[c]])]
        expected = [[], []]
        for k, c in enumerate(copies):
            mine = x[labels == c].double().numpy()
            expected[0] += [mine[i] @ mine[j] for i in range(4) for j in range(i)]
            for other in copies[:k]:
                if other != c:
                    expected[1] += [*(mine @ x[labels == other].double().numpy().T).flatten()]
        for number, cosines in zip(found, expected):
            bins = np.floor((np.array(cosines) + 1) * BINS / 2).astype(int)
            assert (np.bincount(bins, minlength=BINS) == number).all()


def test_the_false_match_rate_on_other_classes_lies_in_the_interval():
    """Calibrated on half of the unseen classes, measured on the other half."""
    held = 0
    for seed in range(10):
        x, labels = made(classes=60, images=6, noise=1.2, seed=seed)
        half = labels < 30
        found, _ = calibrate(x[half], labels[half], 0.01)
        _, others = pairs_by_hand(x[~half], labels[~half])
        low, high = found["intervals"]["measured_fmr"]
        assert low <= found["measured_fmr"] <= 0.01 <= high < 0.03
        held += low <= (others >= found["threshold"]).mean() <= high
    assert held >= 8


@pytest.fixture(scope="module")
def held_out_once(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_cub(folder / "data", classes=16)
        train.main(shlex.split(HELD + "--epochs 1 --val-classes 0.5 --fold 1"))
    return folder


@pytest.fixture
def held_out(here, held_out_once):
    shutil.copytree(held_out_once, here, dirs_exist_ok=True)
    return run_folder(here)


def run_calibrate(path, flags=""):
    """What calibration.json holds."""
    evaluate.main(shlex.split(f"'{path}' --workers 0 --calibrate --json r.json {flags}"))
    found = json.loads((Path(path) / "calibration.json").read_text())
    assert json.loads(Path("r.json").read_text())["calibration"] == found
    return found


def test_a_run_with_held_out_classes_is_calibrated_on_them(held_out, capsys):
    found = run_calibrate(held_out, "--fmr 0.05 --page p.html")
    out, best = capsys.readouterr().out, checkpoint_of(held_out, "best")
    _, val = dataset.load("cub", "data", "train").hold_out(0.5, 1)
    assert found["computed_on"] == {
        "dataset": "cub", "data_root": "./data", "split": "held-out classes", "images": 40,
        "classes": 4, "digest": digest_of_contents(val, digests_of_files(val.paths)),
        "trained_on": {"classes": 0, "images": 0}, "checkpoint": best.name, "epoch": 0,
    }  # fmt: skip
    cpu = torch.device("cpu")
    x, labels = embed(load_model(best), batches(test_loader(val, 8, Loading(32, 0, cpu)), cpu))
    genuine, impostor = pairs_by_hand(x, labels)
    assert found["measured_fmr"] == (impostor >= found["threshold"]).mean() <= 0.05 == found["fmr"]
    assert found["fnmr"] == pytest.approx((genuine < found["threshold"]).mean())
    assert "calibration on held-out classes of cub: 40 images of 4 classes, 180 pairs of one" in out
    assert f"two pictures with a cosine of {found['threshold']:.4f} or more count as the" in out
    assert "only 4 classes: the intervals are too narrow" in out
    assert "same images" not in out and "trained on" not in out
    picture = held_out / f"{best.stem}_calibration.png"
    assert Image.open(picture).width > 1000
    for page in (held_out / "page.html", Path("p.html")):
        section = data_of(page)["sections"][f"Calibration of {best.name}, epoch 0"]
        assert base64.b64decode(section["picture"]) == picture.read_bytes()
        assert "\n".join(section["lines"]) in out


def test_a_line_says_when_calibration_and_test_use_the_same_images(held_out, capsys):
    line = "calibration and test use the same images, so the threshold is optimistic"
    shutil.copytree("data/CUB_200_2011/images/101.Bird_8", "own/test/101.Bird_8")
    shutil.copytree("data/CUB_200_2011/images/001.Bird_0", "own/test/001.Bird_0")
    shutil.copytree("data/CUB_200_2011/images/006.Bird_5", "own/test/new")  # of another fold
    found = run_calibrate(held_out, "--dataset folder --data-root own")
    out = capsys.readouterr().out
    assert line in out and "test: 1 of 3 classes, 10 of 30 images were trained on." in out
    assert found["computed_on"]["split"] == "test images" and found["fmr"] == 0.01
    assert found["computed_on"]["trained_on"] == {"classes": 1, "images": 10}


def test_queries_are_paired_with_the_gallery_alone(held_out):
    make_inshop(Path("data"))
    found = run_calibrate(held_out, "--dataset Inshop --fmr 0.1")
    assert found["pairs"] == {"one class": 3 * 2 * 4, "different classes": 7 * 12 - 24}


def test_a_run_that_is_continued_or_overwritten_loses_its_calibration(held_out):
    run_calibrate(held_out, "--fmr 0.05")
    train.main(shlex.split(HELD + "--val-classes 0.5 --fold 1 --epochs 2 --resume"))
    assert not (held_out / "calibration.json").exists()
    run_calibrate(held_out, "--fmr 0.05")
    train.main(shlex.split(HELD + "--val-classes 0.5 --fold 1 --epochs 1 --overwrite"))
    assert not [*held_out.glob("calibration.json*")]


@pytest.mark.parametrize("flags, line", [
    ("--fmr 0.1",              "--fmr: needs --calibrate"),
    ("--calibrate --fmr 1",    "--fmr: invalid share (above 0, below 1) value: '1'"),
    ("--calibrate --fmr 0",    "--fmr: invalid share (above 0, below 1) value: '0'"),
    ("--calibrate --fmr 1e-4", "pairs of different classes here cannot tell a rate below 0.0017"),
    ("{run} --calibrate",      "--calibrate: takes one network"),
    ("--calibrate --dataset folder --data-root one",     "10 images of 1 class have no pair of d"),
    ("--calibrate --dataset folder --data-root singles", "3 images of 3 classes have no pair of o"),
])  # fmt: skip
def test_a_calibration_that_is_impossible_ends_in_one_line(held_out, capsys, flags, line):
    make_folder(Path("one/test"), ["auk"], per_class=10)
    make_folder(Path("singles/test"), ["auk", "wren", "x"], per_class=1)
    argv = f"'{held_out}' {flags.format(run=shlex.quote(str(held_out)))} --workers 0"
    assert line in fails(argv, capsys, evaluate.main)
    assert not (held_out / "calibration.json").exists()


def test_a_network_that_was_trained_on_all_classes_needs_other_images(here, capsys):
    make_folder(here / "photos", ["auk", "wren", "x", "y"])
    make_folder(here / "new/test", ["a", "b"], first=9)
    flags = "--dataset folder --data-root photos --train-on all --epochs 1"
    train.main(shlex.split(f"{TINY} {flags}"))
    folder = run_folder(here)
    line = fails(f"'{folder}' --workers 0 --calibrate --data-root photos", capsys, evaluate.main)
    assert "was trained on all classes of folder" in line and "name other images" in line
    assert run_calibrate(folder, "--data-root new --fmr 0.1")["computed_on"]["data_root"] == "new"


def test_equal_embeddings_have_no_threshold():
    with pytest.raises(UserError, match="does not tell them apart"):
        calibrate(torch.eye(4)[[0] * 8], torch.arange(8) % 2, 0.01)


def test_check_pairs_knows_the_number_of_pairs_that_is_counted():
    x, labels = made(classes=5)
    for queries in (None, 12):
        items = [(f"{i}.jpg", str(label)) for i, label in enumerate(labels.tolist())]
        images = ImageSet(items, queries=queries)
        genuine, impostor = pairs_by_hand(x, labels, queries)
        check_pairs(images, 1 / len(impostor))
        with pytest.raises(UserError, match=f"the {len(impostor)} pairs of different classes"):
            check_pairs(images, 0.9 / len(impostor))
