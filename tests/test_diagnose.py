"""The measures of --diagnose against their formulas in NumPy, scikit-learn, and known answers."""

import base64
import csv
import json
import math
import shlex
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_distances
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

import dataset
import evaluate
import train
from loading.loader import Loading, batches, test_loader
from losses import class_proxies
from net import load_model
from recipe import build_criterion
from retrieval.diagnose import SIDES, equal_sample
from retrieval.probes import chance, halves, probe
from retrieval.structure import (
    alignment,
    density,
    effective_rank,
    entropy_and_slope,
    rho,
    spectrum,
    uniformity,
)
from runs import diagnosis
from tests.conftest import TINY, checkpoint_of, fails, made_once, make_cub, make_folder, run_folder
from tests.test_page import data_of


def made(n=300, classes=7, d=12, seed=0):
    """Embeddings in classes of unequal size; the last class has one image."""
    rng = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=rng).square() * classes).long()
    labels[-1] = classes
    x = torch.randn(classes + 1, d, generator=rng)[labels] + torch.randn(n, d, generator=rng)
    return F.normalize((x + 1) * torch.linspace(0.2, 3, d)), labels


def test_spectral_measures_equal_those_of_scipy_and_scikit_learn():
    x, _ = made()
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    uniform = np.full(12, 1 / 12)
    assert spectrum(x).tolist() == pytest.approx(s / s.sum())
    assert rho(spectrum(x)).item() == pytest.approx(entropy(uniform, s / s.sum()))
    assert rho(spectrum(x)[1:]).item() == pytest.approx(entropy(uniform[1:], s[1:]))
    centred = PCA().fit(x.double().numpy()).singular_values_
    assert spectrum(x, centred=True).tolist() == pytest.approx(centred / centred.sum())
    expected = math.exp(entropy(centred))
    assert effective_rank(spectrum(x, centred=True)).item() == pytest.approx(expected)
    assert abs(expected - effective_rank(spectrum(x)).item()) > 0.1  # centring matters


def test_density_and_alignment_equal_those_computed_pair_by_pair():
    x, labels = made()
    x, y = x.double().numpy(), labels.numpy()
    within, squares, means = [], [], []
    for c in range(7):  # the eighth has one image
        own = x[y == c]
        rows, columns = np.triu_indices(len(own), 1)
        within.append(cosine_distances(own)[rows, columns].mean())
        squares += [np.square(own[i] - own[j]).sum() for i, j in combinations(range(len(own)), 2)]
        means.append(own.mean(axis=0))
    between = cosine_distances(means)[np.triu_indices(7, 1)].mean()
    found = [number.item() for number in density(torch.tensor(x), labels)]
    assert found == pytest.approx([np.mean(within), between, np.mean(within) / between])
    assert alignment(torch.tensor(x), labels).item() == pytest.approx(np.mean(squares))


def test_uniformity_counts_each_pair_once():
    x, _ = made()
    pairs = [np.exp(-2 * np.square(a - b).sum()) for a, b in combinations(x.double().numpy(), 2)]
    assert uniformity(x).item() == pytest.approx(np.log(np.mean(pairs)))


def test_isotropic_rank_one_and_collapsed_embeddings_have_known_measures():
    d = 16
    isotropic = torch.cat([torch.eye(d), -torch.eye(d)])
    for centred in (False, True):
        p = spectrum(isotropic, centred)
        assert p.tolist() == pytest.approx([1 / d] * d)
        assert effective_rank(p).item() == pytest.approx(d)
    assert rho(p).item() == pytest.approx(0) == rho(p[1:]).item()

    direction = F.one_hot(torch.tensor(3), d).float()
    line = torch.stack([direction, -direction] * d)
    p = spectrum(line, centred=True)
    assert effective_rank(p).item() == pytest.approx(1) and p[0] == 1
    worst = -math.log(2**-23)  # what is below the rounding of float32 counts as that
    assert rho(p).item() == pytest.approx((d - 1) / d * worst - math.log(d))
    assert rho(p[1:]).item() == pytest.approx(worst - math.log(d - 1))

    labels = torch.arange(2 * d) % 2  # each class is one point, at both ends
    assert [number.item() for number in density(line, labels)] == [0, 2, 0]
    assert alignment(line, labels).item() == 0
    at_both_ends = alignment(line, torch.zeros_like(labels)).item()  # of one class
    assert at_both_ends == pytest.approx(4 * d / (2 * d - 1))
    same = d * (d - 1) / (2 * d - 1) / d  # the share of pairs that are of one class
    assert uniformity(line).item() == pytest.approx(math.log(same + (1 - same) * math.exp(-8)))


def test_entropy_and_slope_equal_their_formula_point_by_point():
    x, labels = made()
    proxies = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    found = entropy_and_slope(x, labels, proxies, pairs=20, points=11, seed=3)
    rng, P = np.random.default_rng(3), F.normalize(proxies).double().numpy()
    starts, entropies, slopes = rng.integers(300, size=20), [], []
    for start in starts:
        end = rng.choice([i for i in range(300) if labels[i] != labels[start]])
        points = []
        for t in np.linspace(0, 1, 11):
            between = (1 - t) * x[start].double().numpy() + t * x[end].double().numpy()
            weights = np.exp(23 * P @ between / np.linalg.norm(between))
            points.append(weights / weights.sum())
        entropies.append([entropy(p) for p in points])
        slopes.append(max(abs(max(b) - max(a)) / 0.1 for a, b in zip(points, points[1:])))
    assert found["entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert found["entropy along"] == pytest.approx(np.mean(entropies, axis=0), rel=1e-4)
    assert found["slope"] == pytest.approx(np.mean(slopes), rel=1e-4)


def test_halfway_between_two_proxies_both_classes_are_equally_likely():
    along = entropy_and_slope(torch.eye(2), torch.arange(2), torch.eye(2), pairs=4)["entropy along"]
    assert along[25] == pytest.approx(math.log(2)) == max(along) and along[0] < 1e-6 > along[-1]


def test_both_sides_of_a_sample_have_classes_of_the_same_sizes():
    rng = np.random.default_rng(0)
    sides = [torch.tensor(rng.permutation(np.repeat(np.arange(len(sizes)), sizes)))
             for sizes in ([1, 9, 30, 12, 25, 40], [7, 50, 11, 20, 2, 1, 33, 8])]  # fmt: skip
    first, second = equal_sample(sides)
    counts = [sorted(filter(None, labels[rows].bincount().tolist()))
              for labels, rows in zip(sides, (first, second))]  # fmt: skip
    assert counts[0] == counts[1] and len(counts[0]) == 5 and min(counts[0]) > 1
    assert len(set(first)) == len(first) == len(second)
    assert [rows.tolist() for rows in equal_sample(sides)] == [first.tolist(), second.tolist()]
    assert equal_sample(sides, seed=1)[0].tolist() != first.tolist()
    few = [labels[rows].bincount() for labels, rows in zip(sides, equal_sample(sides, most=45))]
    assert few[0].sum() == few[1].sum() <= 45 and max(few[0]) <= 20 and sum(few[0] > 0) >= 2


def features_with(codes, noise, d=10):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(codes.shape[1], d))
    return codes @ weights + noise * rng.normal(size=(len(codes), d))


def test_a_probe_finds_a_linear_factor_and_scores_chance_on_an_absent_one():
    rng = np.random.default_rng(0)
    names, numbers = rng.choice(list("abcd"), 800), rng.normal(size=800)
    absent = rng.normal(size=(800, 10))
    there = features_with(np.eye(4)[np.unique(names, return_inverse=True)[1]], 0.05)
    assert probe(there, names) == 100 and abs(probe(absent, names) - 25) < 6
    assert probe(features_with(numbers[:, None], 0.05), numbers) > 99
    assert -3 < probe(absent, numbers) < 3 and chance(numbers) == 0
    ring = np.column_stack([np.cos(9 * numbers), np.sin(9 * numbers)])
    assert probe(ring, numbers) < 20  # it is there, but not linearly


def test_a_probe_and_its_chance_equal_those_of_scikit_learn_on_held_out_images():
    rng = np.random.default_rng(0)
    names = rng.choice(list("abc"), 401, p=[0.5, 0.3, 0.2])
    x = features_with(np.eye(3)[np.unique(names, return_inverse=True)[1]], 3)
    fitted, held_out = halves(names)
    assert sorted([*fitted, *held_out]) == list(range(401))
    for name in "abc":
        assert abs(sum(names[fitted] == name) - sum(names[held_out] == name)) <= 1
    scale = StandardScaler().fit(x[fitted])
    model = LogisticRegression(max_iter=1000).fit(scale.transform(x[fitted]), names[fitted])
    expected = model.score(scale.transform(x[held_out]), names[held_out])
    assert 0.4 < expected < 0.95 and probe(x, names) == pytest.approx(100 * expected)
    dummy = DummyClassifier().fit(x[fitted], names[fitted]).score(x[held_out], names[held_out])
    assert chance(names) == pytest.approx(100 * dummy)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_cub(folder / "data", classes=8)
        train.main(shlex.split(TINY + "--epochs 1 --l2-norm 0"))
        paths = sorted((folder / "data").rglob("Bird*.jpg"))
        with open(folder / "data/factors.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "brightness", "parity", "constant", "name"])
            for i, path in enumerate(paths):
                bright = np.asarray(Image.open(path).convert("RGB")).mean()
                row = [path.relative_to(folder / "data"), bright, "even odd".split()[i % 2], 1]
                rows.writerow([*row, path.name + path.parent.name])
    return folder


@pytest.fixture
def trained(here, trained_once):
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return run_folder(here)


def test_a_diagnosis_goes_to_the_terminal_json_a_picture_and_the_page_of_its_run(trained, capsys):
    last = checkpoint_of(trained)
    evaluate.main(shlex.split(f"'{last}' --workers 0 --diagnose --factors data/factors.csv "
                              "--json r.json --page p.html"))  # fmt: skip
    said = capsys.readouterr()
    found = json.loads(Path("r.json").read_text())["diagnosis"]
    assert "N = 40 images of 4 classes" in said.out and "not centred, not squared" in said.out
    assert (found["images"], found["classes"], found["dimensions"]) == (40, 4, 8)
    for side in SIDES:
        assert f"constant has 1 value in 40 {side} images" in said.err
        assert f"name has 40 values in 40 {side} images" in said.err
    names = {"class": "class", "brightness": "number", "parity": "class"}
    assert {(row["of"], row["kind"]) for row in found["probes"]} == set(names.items())
    assert len(found["probes"]) == 5  # the class is probed on unseen classes alone
    (brightness,) = (row["pixels"] for row in found["probes"]
                     if row["of"] == "brightness" and row["side"] == "unseen")  # fmt: skip
    assert brightness > 90

    picture = last.with_name(f"{last.stem}_diagnosis.png")
    assert Image.open(picture).width > 1000
    for page in (trained / "page.html", Path("p.html")):
        (title, section), = data_of(page)["sections"].items()
        assert title == f"Diagnosis of {last.name}, epoch 0"
        assert base64.b64decode(section["picture"]) == picture.read_bytes()
        assert "\n".join(section["lines"]) in said.out
    assert data_of(trained / "page.html")["title"] == trained.name  # else as the run left it

    best = checkpoint_of(trained, "best")
    evaluate.main(shlex.split(f"'{trained}' --workers 0 --diagnose"))
    said = capsys.readouterr().out
    assert f"{best}: entropy and slope are left out" in said and "\nslope" not in said
    assert len(data_of(trained / "page.html")["sections"]) == 2


def test_the_measures_are_those_of_the_networks_heads_on_the_images_of_each_side(trained):
    last = checkpoint_of(trained)
    evaluate.main(shlex.split(f"'{last}' --workers 0 --diagnose --json r.json --metrics"))
    written = json.loads(Path("r.json").read_text())
    heads, model = written["diagnosis"]["heads"], load_model(last)
    assert heads["retrieval"]["unseen"]["R@1"] == written["R@1"]  # all images are in the sample
    assert heads["retrieval"]["unseen"]["MAP@R"] == pytest.approx(written["MAP@R"])
    gap = written["diagnosis"]["gap"]["retrieval"]["R@1"]
    assert gap == heads["retrieval"]["training"]["R@1"] - written["R@1"]
    checkpoint = torch.load(last)
    flags = train.build_parser().parse_args([])
    vars(flags).update(checkpoint["args"])
    criterion = build_criterion(flags, 4)
    criterion.load_state_dict(checkpoint["criterion_state_dict"])
    proxies = class_proxies(criterion.metric_loss)
    for side, split in SIDES.items():
        images = dataset.load("cub", "data", split)
        cpu = torch.device("cpu")
        (batch,) = batches(test_loader(images, 40, Loading(32, 0, cpu)), cpu)
        with torch.inference_mode():
            outputs = model(model.prepare(batch[0]))
        for name, head in zip(("retrieval", "specific"), outputs):
            x, found = F.normalize(head[:, :8]), heads[name][side]
            assert found["rho"] == pytest.approx(rho(spectrum(x)).item(), rel=1e-3)
            assert found["spectrum"] == pytest.approx(spectrum(x).tolist(), rel=1e-3)
            assert found["std"] == pytest.approx(F.softplus(head[:, 8:] - 5).mean().item())
            expected = entropy_and_slope(x, images.labels, proxies)["entropy"]
            assert found["entropy"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("flags, said", [
    ("--disent False --loss SoftTriple", "slope"),
    ("--disent False --loss Contrastive", "--loss Contrastive has no proxies"),
    ("--val-classes 0.5 --fold 1", "N = 20 images of 2 classes"),  # of those that it trained on
])  # fmt: skip
def test_plain_losses_and_held_out_classes_are_diagnosed(here, capsys, flags, said):
    make_cub(here / "data", classes=8)
    train.main(shlex.split(f"{TINY} --epochs 1 {flags}"))
    capsys.readouterr()
    last = checkpoint_of(run_folder(here))
    evaluate.main(shlex.split(f"'{last}' --workers 0 --diagnose --json r.json"))
    assert said in capsys.readouterr().out
    heads = json.loads(Path("r.json").read_text())["diagnosis"]["heads"]
    assert len(heads) == 2 - ("False" in flags)


def test_the_diagnosis_reads_training_images_as_the_run_did(here, capsys, monkeypatch):
    torn = min(make_folder(here / "data").glob("*/*"))
    torn.write_bytes(b"torn")
    flags = TINY.replace("cub", "folder")
    train.main(shlex.split(f"{flags} --epochs 1 --skip-unreadable --background green"))
    seen, diagnose = {}, diagnosis.diagnose
    monkeypatch.setattr(diagnosis, "diagnose", lambda model, both, *rest: (
        seen.update(both) or diagnose(model, both, *rest)))  # fmt: skip
    evaluate.main(shlex.split(f"'{run_folder(here)}' --workers 0 --diagnose"))
    assert [images.background for images in seen.values()] == ["#008000"] * 2
    assert len(seen["train"]) == 15


def test_a_diagnosis_that_is_impossible_ends_in_one_line(trained, capsys):
    def line(flags):
        return fails(f"'{trained}' --workers 0 --diagnose {flags}", capsys, evaluate.main)

    assert "--factors x.csv: no such file" in line("--factors x.csv")
    table = Path("data/factors.csv")
    whole = table.read_text()
    for text, reason in (
        (whole.replace("path", "file", 1), "the header must name the column path"),
        ("path\n", "and a column for each factor"),
        (whole.replace(",1,", ",", 1), "line 2: must have 5 fields"),
        ("\n".join(whole.splitlines()[:-3]), "no row for 3 of the 40 unseen images, such as data"),
    ):
        table.write_text(text)
        assert reason in line(f"--factors {table}")
    damaged = torch.load(checkpoint_of(trained))
    damaged["model_state_dict"]["model.embedding.weight"][0] = math.nan
    torch.save(damaged, "nan.pth")
    found = fails("nan.pth --workers 0 --diagnose", capsys, evaluate.main)
    assert "embeddings are not all finite" in found
    make_cub(Path("other"), "cars/car_ims")
    assert "--diagnose: compares" in line("--dataset folder --data-root other/cars/car_ims")
    flags = f"'{trained}' --workers 0 --factors {table}"
    assert "--factors: needs --diagnose" in fails(flags, capsys, evaluate.main)
