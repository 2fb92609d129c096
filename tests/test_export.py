"""evaluate.py --export and --save-model: what other programs read of it."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import search
import train
from dataset.files import read_image
from loading.augment import resize_and_crop
from net import create_model, export, load_model
from net.backbones import BACKBONES, Backbone
from retrieval import export as embedding_export
from retrieval.search import neighbours
from tests import toy
from tests.conftest import (
    DISENT,
    ROOT,
    TINY,
    checkpoint_of,
    fails,
    make_cub,
    make_folder,
    make_inshop,
    run_folder,
    snapshot,
)
from tests.test_pictures import medal, save_cut_out, save_turned
from utils import UserError


def train_one_epoch(here, data_set):
    """A run of one epoch; its folder."""
    train.main(shlex.split(f"{TINY} {data_set} --epochs 1"))
    return run_folder(here)


def exported(run, name):
    """What evaluate.py writes to `name`, a list of rows or a dictionary of arrays."""
    parquet = name.endswith(".parquet") and pytest.importorskip("pyarrow.parquet")
    evaluate.main([str(run), "--workers", "0", "--export", name])
    if parquet:
        return parquet.read_table(name).to_pylist()
    with np.load(name) as file:
        return dict(file)


def nearest_by_hand(x, i, candidates):
    """The 8 nearest of image i, in float64."""
    similarity = x.astype(np.float64) @ x[i].astype(np.float64)
    return sorted((j for j in candidates if j != i), key=lambda j: -similarity[j])[:8]


def assert_rows(rows, file, queries, candidates):
    """The Parquet rows are the .npz `file`, the images, and the neighbours counted by hand."""
    x, paths, labels = file["embeddings"], file["paths"].tolist(), file["labels"].tolist()
    assert [row["path"] for row in rows] == paths
    assert [row["label"] for row in rows] == labels
    assert [row["class"] for row in rows] == file["classes"][labels].tolist()
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), x)
    for i, row in enumerate(rows):
        path = Path(row["path"])
        assert row["image"] == {"bytes": path.read_bytes(), "path": path.name}
        if i >= queries:
            assert row["neighbours"] is None and row["hit@1"] is None
            continue
        found = nearest_by_hand(x, i, candidates)
        assert [near["path"] for near in row["neighbours"]] == [paths[j] for j in found]
        near = [near["similarity"] for near in row["neighbours"]]
        assert near == pytest.approx(x[found] @ x[i], abs=1e-6)
        assert row["hit@1"] == (labels[found[0]] == labels[i])


def test_parquet_has_what_npz_has_and_the_files_and_neighbours(here, monkeypatch, capsys):
    monkeypatch.setattr(embedding_export, "ROW_GROUP", 5)
    make_folder(here / "data")
    run = train_one_epoch(here, "--dataset folder")
    rows, file = exported(run, "e.parquet"), exported(run, "e.npz")
    assert_rows(rows, file, 16, range(16))
    assert {row["split"] for row in rows} == {"test"}
    assert "e.parquet: 16 embeddings of 8 dimensions\n" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "neighbours", None)
    exported(run, "again.npz")  # which holds no neighbours, so none are searched
    hits = sum(row["hit@1"] for row in rows) / len(rows)
    evaluate.main([str(run), "--workers", "0", "--ks", "1"])
    assert capsys.readouterr().out.endswith(f"R@1 : {100 * hits:.3f}\n")


def test_queries_have_neighbours_from_the_gallery_and_the_gallery_has_none(here):
    make_inshop(here / "data")
    run = train_one_epoch(here, "--dataset Inshop")
    rows, file = exported(run, "e.parquet"), exported(run, "e.npz")
    q = int(file["queries"])
    assert [row["split"] for row in rows] == ["query"] * q + ["gallery"] * (len(rows) - q)
    assert_rows(rows, file, q, range(q, len(rows)))


def test_names_in_any_encoding_are_written(here):
    make_folder(here / "data")
    run = train_one_epoch(here, "--dataset folder")
    odd = here / "data/猫" / os.fsdecode(b"caf\xe9.jpg")
    (here / "data/猫/фото 0.jpg").rename(odd)
    rows = exported(run, "e.parquet")
    assert [row["image"]["path"] for row in rows if "caf" in row["path"]] == ["caf\\xe9.jpg"]


def test_an_image_that_disappears_during_the_export_leaves_no_file(here, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    make_folder(here / "data")
    run = train_one_epoch(here, "--dataset folder")

    def then_gone(*arguments):
        next((here / "data/猫").iterdir()).unlink()
        return neighbours(*arguments)

    monkeypatch.setattr(evaluate, "neighbours", then_gone)
    line = fails(f"'{run}' --workers 0 --export e.parquet", capsys, evaluate.main)
    assert "data/猫/фото" in line and "No such file" in line
    assert not [path for path in here.iterdir() if "parquet" in path.name]


@pytest.mark.parametrize("name, flags", [("m.pt2", "--disent False"), ("m.onnx", DISENT)])
def test_a_saved_network_embeds_batches_of_any_size_as_its_checkpoint_does(
    here, capsys, name, flags
):
    for package in export.MODEL_FILES[Path(name).suffix]:
        pytest.importorskip(package)
    make_cub(here / "data")
    run = train_one_epoch(here, f"--dataset cub {flags}")
    (here / "data").rename(here / "elsewhere")  # no data set is needed
    capsys.readouterr()
    evaluate.main([str(run), "--save-model", name])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{name}: uint8 [B, 32, 32, 3] -> float32 [B, 8]; on 8 drawn images")
    assert second == "m_input.py: makes its input from a picture"
    assert {path.name for path in here.glob("*m*.*")} == {name, "m_input.py"}
    model = load_model(checkpoint_of(run))
    images = sorted((here / "elsewhere").rglob("[!.]*.jpg"))
    pixels = torch.stack([resize_and_crop(read_image(path), 32) for path in images])
    for count in (1, 2, 40):
        expected = model.embed(model.prepare(pixels[:count]))
        torch.testing.assert_close(loaded(name)(pixels[:count]), expected, rtol=0, atol=1e-6)


def loaded(name):
    """The function in a file, as one who has no more than the file calls it."""
    if name.endswith(".pt2"):
        return torch.export.load(name).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(name)
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def make_pictures(folder):
    """One of each kind that people have."""
    for seed in range(7):
        image, ground = medal(seed)
        image = image.resize((300 - 7 * seed, 200))  # sides that do not divide
        save_turned(image, folder / f"turned {seed}.jpg", 2 + seed)
    image, ground = medal(7)
    save_cut_out(image, ground, folder / "cut out.png")
    image.save(folder / "upright.webp")
    image.convert("P").save(folder / "palette.png", transparency=3)
    image.convert("LA").save(folder / "gray.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(300 * 200, dtype=np.uint16).reshape(200, 300)).save(folder / "16.png")
    return sorted(map(str, folder.iterdir()))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_file_beside_a_saved_network_makes_the_same_pixels_from_every_picture(
    here, monkeypatch, interpolation
):
    facts = {"interpolation": interpolation}
    monkeypatch.setitem(BACKBONES, "toy", lambda: Backbone(toy.Toy(), toy.pool, **facts))
    make_folder(here / "data")
    run = train_one_epoch(here, "--dataset folder --background red --image-size 33")
    evaluate.main([str(run), "--save-model", "m.pt2"])
    load = runpy.run_path("m_input.py")["load"]
    (here / "pictures").mkdir()
    for path in make_pictures(here / "pictures"):
        expected = resize_and_crop(read_image(path, "red"), 33, interpolation)
        assert np.array_equal(load(path)[0], expected), path


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_the_example_without_this_repository_embeds_pictures_as_search_does(trained, here, name):
    for package in export.MODEL_FILES[Path(name).suffix]:
        pytest.importorskip(package)
    away = here / "away"
    away.mkdir()
    paths = make_pictures(away)
    search.main([str(trained), *shlex.split("--gallery away --save-index g.npz --workers 0")])
    evaluate.main([str(trained), "--save-model", str(away / name)])
    shutil.copy(ROOT / "examples/saved_network.py", away)
    command = [sys.executable, "-I", "saved_network.py", name, *map(os.path.basename, paths)]
    done = subprocess.run(command, cwd=away, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.0000  16.png\n")
    with np.load("g.npz") as index:
        assert index["paths"].tolist() == paths
        np.testing.assert_allclose(np.load(away / "embeddings.npy"), index["embeddings"], atol=1e-6)


def test_save_model_refuses_flags_that_evaluate(run, capsys):
    for flag in ("--json e.json", "--export e.npz", "--page p.html", "--diagnose", "--calibrate"):
        line = fails(f"'{run}' --save-model m.pt2 {flag}", capsys, evaluate.main)
        assert f"{flag.split()[0]}: --save-model evaluates nothing" in line
    assert not Path("m.pt2").exists()


def test_bn_inception_is_saved(here, capsys):
    model = create_model("bn_inception", 16, disent=True, precision="bf16").train()
    export.save_model([model], "m.pt2", 32, "#ffffff")
    assert model.precision == "bf16"  # in which it was
    assert "m.pt2: uint8 [B, 32, 32, 3] -> float32 [B, 16]; on 8 " in capsys.readouterr().out


def test_a_network_that_cannot_be_saved_exactly_enough_leaves_no_file(here, monkeypatch):
    def pool(network, x):
        return toy.pool(network, x if len(x) == 2 else -x)

    monkeypatch.setitem(BACKBONES, "odd", lambda: Backbone(toy.Toy(), pool))
    with pytest.raises(UserError, match="m.pt2: torch cannot export odd: "):
        export.save_model([create_model("odd", 8)], "m.pt2", 32, "#ffffff")
    monkeypatch.setattr(export, "TOLERANCE", -1)
    with pytest.raises(UserError, match="m.pt2: not written, its embeddings are off by 0"):
        export.save_model([create_model("toy", 8)], "m.pt2", 32, "#ffffff")
    assert not list(here.iterdir())


@pytest.mark.parametrize("flags, missing, line", [
    ("--export e.csv", None, "--export e.csv: must end in .npz or .parquet"),
    ("--export e.parquet", "pyarrow", "--export e.parquet: pip install pyarrow"),
    ("--save-model m.pth", None, "--save-model m.pth: must end in .onnx or .pt2"),
    ("--save-model m.onnx", "onnx", "m.onnx: pip install onnx onnxscript onnxruntime"),
    ("--save-model nowhere/m.pt2", None, "--save-model nowhere/m.pt2: not a file's path in a"),
])  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_images_are_read(
    here, monkeypatch, capsys, flags, missing, line
):
    torch.save({"model_state_dict": create_model("toy", 8).state_dict()}, "p.pth")
    before = snapshot(here)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    assert line in fails(f"p.pth --model toy {flags}", capsys, evaluate.main)
    assert snapshot(here) == before
