"""Several checkpoints as one: each, their mean, and the concatenation of their embeddings."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import evaluate
import train
from net import load_model
from tests.conftest import TINY, fails, made_once, make_cub, make_folder
from tests.test_page import data_of

FOLDS = TINY.replace("--batch-size 8", "--batch-size 4") + "--val-classes 0.5 --epochs 1 "


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """Two folds of different widths and image sizes."""
    with made_once(tmp_path_factory) as folder:
        make_cub(folder / "data", classes=12)
        train.main(shlex.split(FOLDS + "--LOG_DIR a --metrics"))
        train.main(shlex.split(FOLDS + "--LOG_DIR b --fold 1 --embedding-size 6 --image-size 40"))
    return folder


@pytest.fixture
def folds(here, trained_once):
    """The paths of their chosen checkpoints."""
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return [str(next(Path(name).rglob("*_best.pth"))) for name in "ab"]


def run_evaluate(paths, flags=""):
    """(what --json writes, embeddings and labels that --export writes)."""
    evaluate.main([*paths, *shlex.split(f"--workers 0 --json r.json --export e.npz {flags}")])
    with np.load("e.npz") as file:
        return json.loads(Path("r.json").read_text()), file["embeddings"], file["labels"]


def by_hand(x, labels):
    """R@1 and MAP@R in per cent, by their definitions."""
    similarity = x.astype(float) @ x.T
    np.fill_diagonal(similarity, -np.inf)
    hits = labels[(-similarity).argsort(axis=1)[:, :-1]] == labels[:, None]
    R = hits.sum(axis=1)
    precision = hits.cumsum(axis=1) / np.arange(1, len(x))
    within = np.arange(len(x) - 1) < R[:, None]
    return {"R@1": 100 * hits[:, 0].mean(),
            "MAP@R": 100 * ((precision * hits * within).sum(axis=1) / R).mean()}  # fmt: skip


def test_each_the_mean_and_the_concatenation_are_what_exported_embeddings_say(folds, capsys):
    alone = [run_evaluate([path], "--metrics") for path in folds]  # a flag of the first alone
    capsys.readouterr()
    found, x, labels = run_evaluate(folds)
    out = capsys.readouterr().out.splitlines()
    titles = [*folds, "mean of 2", "concatenation of 2"]
    assert [line for line in out if line in titles] == titles
    assert x.shape == (60, 8 + 6) and np.allclose(np.linalg.norm(x, axis=1), 1)
    assert np.allclose(x, np.concatenate([each[1] for each in alone], axis=1) / 2**0.5)
    assert {name: found[name] for name in ("R@1", "MAP@R")} == pytest.approx(by_hand(x, labels))
    for path, (single, embeddings, _), each in zip(folds, alone, found["separated"], strict=True):
        metrics = single["chosen"]["metrics"]
        assert each == {"checkpoint": path, "epoch": 0, "metrics": metrics}
        assert {name: metrics[name] for name in ("R@1", "MAP@R")} == pytest.approx(
            by_hand(embeddings, labels)
        )
    for name, value in found["mean"].items():
        assert value == pytest.approx(sum(single[name] for single, *_ in alone) / 2)
    assert found["checkpoint"] == folds and found["last"] is found["epoch"] is None
    assert found["chosen_by"] == "MAP@R of held-out classes"
    printed = dict(line.split(" : ") for line in out[out.index("concatenation of 2") + 1 : -1])
    assert printed == {name: f"{value:.3f}" for name, value in found["chosen"]["metrics"].items()}


def test_a_page_of_several_is_of_their_concatenation_and_has_a_row_for_each(folds):
    found, *_ = run_evaluate(folds, "--page p.html --ks 1 2")
    data = data_of("p.html")
    rows = [*(each["metrics"] for each in found["separated"]), found["mean"],
            found["chosen"]["metrics"]]  # fmt: skip
    titles = [*folds, "mean of 2", "concatenation of 2"]
    assert data["metrics"] == [list(row) for row in zip(titles, rows)]
    assert data["title"] == "concatenation of 2" and not data["curves"]
    hits = sum(hits for *_, hits in data["per_class"])
    assert 100 * hits / 60 == pytest.approx(found["R@1"])


def test_networks_of_one_image_size_are_saved_as_one(folds, capsys):
    evaluate.main([*folds, *shlex.split("--workers 0 --image-size 32 --save-model m.pt2")])
    assert "m.pt2: uint8 [B, 32, 32, 3] -> float32 [B, 14]" in capsys.readouterr().out
    pixels = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    models = [load_model(path) for path in folds]
    parts = [model.embed(model.prepare(pixels)) for model in models]
    expected = F.normalize(torch.cat(parts, dim=1))
    found = torch.export.load("m.pt2").module()(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    line = fails(shlex.join(folds) + " --workers 0 --save-model n.pt2", capsys, evaluate.main)
    assert "--save-model n.pt2: these networks take images of different sizes" in line
    assert not Path("n.pt2").exists()


def test_checkpoints_of_different_data_sets_are_refused_and_both_are_named(folds, here, capsys):
    paths = []
    for place in "xy":
        make_folder(here / place / "photos")
        train.main(shlex.split(
            TINY + f"--dataset folder --data-root {place}/photos --epochs 1 --LOG_DIR {place}"
        ))  # fmt: skip
        paths.append(next(Path(place).rglob("*_best.pth")))
    line = fails(f"'{folds[0]}' '{paths[0]}' --workers 0", capsys, evaluate.main)
    assert f"{folds[0]} was trained on cub, {paths[0]} on folder ({here}/x/photos)" in line
    line = fails(f"'{paths[0]}' '{paths[1]}' --workers 0", capsys, evaluate.main)
    assert f"folder ({here}/x/photos)" in line and f"folder ({here}/y/photos)" in line
    line = fails(f"'{paths[0]}' --resume '{paths[1]}'", capsys, evaluate.main)
    assert "name one checkpoint or run folder, or several without --resume" in line
