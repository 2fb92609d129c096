"""Pictures as people have them: turned, cut out, of 16 bits, damaged; from the command line."""

import base64
import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, features

import dataset
import evaluate
import search
import train
from dataset import check, files
from dataset.files import read_image, size_of
from tests.conftest import (
    TINY,
    checkpoint_of,
    fails,
    make_cub,
    make_folder,
    metrics,
    run_folder,
    write_image,
)
from tests.test_bad_input import png
from tests.test_page import data_of

OWN = TINY.replace("--dataset cub ", "--dataset folder ")
TURNED = {  # an EXIF orientation: what was done to the picture, so that it undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def medal(seed, colour="white"):
    """A disc of soft colours on a plain ground; and where the ground is."""
    rng = np.random.default_rng(seed)
    few = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    pixels = np.array(few.resize((90, 70), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:70, :90]
    ground = (y - 35) ** 2 + (x - rng.integers(20, 60)) ** 2 > 500
    pixels[ground] = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return Image.fromarray(pixels), ground


def save_turned(image, path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = image.transpose(TURNED[orientation])
    turned.save(path, exif=exif.tobytes(), quality=97, subsampling="4:4:4")


def save_cut_out(image, ground, path):
    alpha = Image.fromarray(np.where(ground, 0, 255).astype(np.uint8))
    hidden = Image.fromarray(np.where(ground[..., None], 77, np.asarray(image)).astype(np.uint8))
    hidden.putalpha(alpha)
    hidden.save(path)


def require_reader(suffix):
    if suffix == "heic":
        pytest.importorskip("pillow_heif")
    elif suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")


def make_medals(root, medals=8, colour="white"):
    """A class for each medal: upright, turned by EXIF, and cut out."""
    for seed in range(medals):
        folder = Path(root, f"medal {seed}")
        folder.mkdir(parents=True)
        image, ground = medal(seed, colour)
        image.save(folder / "upright.png")
        save_turned(image, folder / "turned.jpg", 2 + seed % 7)
        save_cut_out(image, ground, folder / "cut out.png")
    return root


def cosines(run, flags=""):
    """(The least of two pictures of a medal, the greatest of two medals)."""
    evaluate.main(shlex.split(f"'{run}' --workers 0 --export e.npz {flags}"))
    with np.load("e.npz") as file:
        x, labels = file["embeddings"], file["labels"]
    found, same = x @ x.T, labels[:, None] == labels
    return found[same].min(), found[~same].max()


@pytest.mark.parametrize("colour", ["white", "black"])
def test_a_picture_turned_by_exif_or_cut_out_embeds_as_the_upright_one(here, capsys, colour):
    make_medals(here / "data", colour=colour)
    flags = "" if colour == "white" else "--background black "
    train.main(shlex.split(OWN + flags + "--epochs 1"))
    run = run_folder(here)
    assert run.name.endswith("_background000000_size32_weightsnone") or colour == "white"
    same, others = cosines(run)  # evaluate.py takes the run's own background
    assert same > 0.999 > others
    assert cosines(run, "--background red")[0] < 0.999

    queries = "'data/medal 1/turned.jpg' 'data/medal 2/cut out.png'"
    flags = f"--resume '{run}' --query {queries} --workers 0 --top 4 --json n.json --page n.html "
    search.main(shlex.split(flags + "--gallery data --save-index g.npz"))
    for result in json.loads(Path("n.json").read_text()):
        folder = Path(result["query"]).parent.name
        *three, other = result["neighbours"]
        assert all(Path(near["path"]).parent.name == folder for near in three)
        assert three[-1]["similarity"] > 0.999 > other["similarity"]
    for picture in data_of("n.html")["pictures"]:
        width, height = Image.open(io.BytesIO(base64.b64decode(picture))).size
        assert width > height
    line = fails(flags + "--gallery g.npz --background red", capsys, search.main)
    assert "an index of another checkpoint, --precision or --background" in line


@pytest.mark.parametrize("suffix, orientation", [
    *(("jpg", orientation) for orientation in TURNED),
    ("png", 5), ("webp", 6), ("tif", 7), ("avif", 8), ("heic", 6),
])  # fmt: skip
def test_every_exif_orientation_is_undone_and_size_of_knows_the_size(tmp_path, suffix, orientation):
    require_reader(suffix)
    image, path = medal(0)[0], tmp_path / f"a.{suffix}"
    save_turned(image, path, orientation)
    read = read_image(path, "white")
    assert read.size == image.size == size_of(path, own=True)
    difference = np.abs(np.asarray(read).astype(int) - np.asarray(image)).mean()
    assert difference < 2


def test_an_exif_tag_of_an_odd_type_does_not_make_a_picture_unreadable(tmp_path):
    image, path = medal(0)[0], tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 72.0
    image.save(path, exif=exif)
    entry = b"\x01\x1a\x00\x05"  # x resolution, a fraction
    data = path.read_bytes()
    assert entry in data
    path.write_bytes(data.replace(entry, b"\x01\x1a\x00\x07"))  # of undefined type
    assert read_image(path, "white").size == size_of(path, own=True) == image.size[::-1]


def test_transparent_pixels_show_the_background(tmp_path):
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    half = Image.new("RGBA", (20, 10), (255, 0, 0, 128))
    palette = Image.new("P", (20, 10))
    palette.putpalette([255, 0, 0])
    for name, each, expected in [
        ("a.png", image, (0, 0, 255)), ("b.webp", image, (0, 0, 255)),
        ("c.png", half, (128, 0, 127)), ("d.png", image.convert("LA"), (0, 0, 255)),
        ("e.tif", image.convert("PA"), (0, 0, 255)), ("f.png", palette, (0, 0, 255)),
        ("g.gif", palette, (0, 0, 255)),
    ]:  # fmt: skip
        each.save(tmp_path / name, **({"transparency": 0} if each is palette else {}))
        read = read_image(tmp_path / name, "blue")
        assert read.mode == "RGB" and read.getpixel((3, 3)) == expected, name


def test_16_bit_pixels_keep_their_upper_byte(tmp_path):
    gray = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    for name, pixels in ("a.png", gray), ("b.tif", gray), ("c.pgm", gray.astype(np.int32)):
        Image.fromarray(pixels).save(tmp_path / name)
        assert (np.asarray(read_image(tmp_path / name, "white"))[..., 1] == gray >> 8).all()
    rows = np.repeat(gray, 3, axis=1).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)  # each after the number of a filter
    (tmp_path / "rgb.png").write_bytes(png(32, 32, bits=16, colour=2, data=data))
    assert (np.asarray(read_image(tmp_path / "rgb.png", "white")) == gray[..., None] >> 8).all()


@pytest.mark.parametrize("pixels", [np.float32([[0.5, 1]]), np.int32([[70000, 1]])])
def test_pixels_that_are_not_8_or_16_bit_integers_are_refused_in_one_line(here, capsys, pixels):
    make_folder(here / "data")
    Image.fromarray(pixels).save(here / "data/猫/a.tif")
    line = fails(OWN, capsys)
    assert "猫/a.tif: not an image that can be read (its pixels are not integers of 8" in line


def test_published_images_are_read_as_published(here, capsys):
    folder = make_cub(here / "data") / "CUB_200_2011/images/001.Bird_0"
    image, ground = medal(0)
    save_turned(image, folder / "Bird_0000.jpg", 6)
    save_cut_out(image, ground, folder / "Bird_0001.png")
    images = dataset.load("cub", "data", "train", background="red")
    for path in (folder / "Bird_0000.jpg", folder / "Bird_0001.png"):
        read, _ = images[images.paths.index(str(path.relative_to(here)))]
        with Image.open(path) as original:
            assert read.size == original.size
            assert read.tobytes() == original.convert("RGB").tobytes()
    train.main(shlex.split(TINY + "--epochs 1"))
    run = run_folder(here)
    for flag in ("--background white", "--skip-unreadable"):
        for main, flags in ((train.main, TINY + "--remark 2 "), (evaluate.main, f"'{run}' ")):
            line = fails(flags + flag, capsys, main)
            assert f"{flag.split()[0]}: only for images of your own; cub is read" in line
    assert "--background: invalid colour value: 'wite'" in fails(OWN + "--background wite", capsys)


@pytest.mark.parametrize("cache", ["ram", "gpu"])
def test_a_cache_holds_what_read_image_gives(here, cache):
    make_medals(here / "data")
    train.main(shlex.split(OWN + "--background green"))
    train.main(shlex.split(OWN + f"--background green --cache {cache} --LOG_DIR cached"))
    cached = next(here.glob("cached/*/*"))
    for ours, theirs in zip(metrics(run_folder(here)), metrics(cached)):
        assert ours["loss"] == theirs["loss"] and ours["R@1"] == theirs["R@1"]


# --- what Pillow alone may not read -------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["heic", "avif"])
def test_phones_formats_are_read_where_there_is_a_reader(here, suffix):
    require_reader(suffix)
    make_folder(here / "data", per_class=6)
    for c, folder in enumerate(sorted((here / "data").iterdir())):
        for i in range(2):
            medal(10 * c + i)[0].save(folder / f"{i}.{suffix}")
    train.main(shlex.split(OWN + "--epochs 1"))
    described = json.loads((run_folder(here) / "results.json").read_text())
    assert described["images"]["train"]["images"] == 16
    assert check.main(["--dataset", "folder", "--workers", "0"]) == 0


def test_phones_formats_without_a_reader_are_skipped_and_the_package_is_named(
    here, capsys, monkeypatch
):
    monkeypatch.setattr(files, "UNSUPPORTED", {".heic"})
    monkeypatch.setattr(files, "SUFFIXES", files.SUFFIXES - {".heic"})
    root = make_folder(here / "data")
    (root / "猫/a.HEIC").write_bytes(b"x")
    train.main(shlex.split(OWN + "--epochs 1"))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if ".HEIC" in x]
    assert "*.HEIC (1, such as" in line and line.endswith("pip install pillow-heif reads .heic")
    flags = f"--resume '{run_folder(here)}' --gallery data --query 'data/猫/фото 3.jpg' --workers 0"
    search.main(shlex.split(flags))
    out, err = capsys.readouterr()
    assert "1 skipped" in out and "a.HEIC: not an image that can be read" in err
    assert "pip install pillow-heif reads .heic" in err


# --- bad pictures -------------------------------------------------------------------------------


def spoil(root):
    """Damages three pictures; their paths below `root`, in order."""
    torn, text, gone = root / "猫/torn.jpg", root / "猫/text.png", root / "синица/фото 0.jpg"
    write_image(torn, seed=7)
    torn.write_bytes(torn.read_bytes()[:-300])
    text.write_text("not a picture")
    gone.unlink()
    gone.symlink_to("nowhere.jpg")
    return sorted(str(path.relative_to(root)) for path in (torn, text, gone))


def left_out(run):
    return sorted(json.loads((run / "args.json").read_text())["left_out"])


def test_skip_unreadable_names_and_leaves_out_bad_pictures_and_the_run_remembers_them(
    here, capsys, monkeypatch
):
    root = make_folder(here / "data")
    bad = spoil(root)
    assert check.main(["--dataset", "folder", "--workers", "0"]) == 1
    assert "3 problems found" in capsys.readouterr().out
    line = fails(OWN, capsys)
    assert "replace it, or leave it out with --skip-unreadable" in line

    train.main(shlex.split(OWN + "--skip-unreadable --epochs 1 --overwrite --workers 2"))
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "left out" in line]
    assert "data: left out 3 images that cannot be read: " in line
    assert all(path in line for path in bad)
    # the 8 of 猫, and 7 of синица, test
    assert "train: 16 images of 2 classes" in out and "test: 15 images of 2 classes" in out
    run = run_folder(here)
    assert left_out(run) == bad
    evaluate.main([str(run), "--workers", "0", "--json", "r.json"])
    found = json.loads(Path("r.json").read_text())
    assert found["R@1"] == metrics(run)[0]["R@1"]
    trained = json.loads((run / "results.json").read_text())
    assert found["images"]["test"] == trained["images"]["test"]

    # it goes on with the same pictures, wherever they are, though one was mended meanwhile
    write_image(root / "猫/torn.jpg", seed=7)
    root.rename(here / "moved")
    monkeypatch.setattr(check, "unreadable", None)
    train.main(shlex.split(f"--resume '{run}' --epochs 2 --data-root moved --workers 0"))
    assert left_out(run) == bad and len(metrics(run)) == 2


def test_skip_unreadable_also_covers_the_test_after_held_out_classes(here, capsys):
    root = make_folder(here / "data", [f"{c}" for c in range(10)])
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("*/*"))]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]))
    (root / "9/фото 1.jpg").write_bytes(b"torn")
    flags = TINY + "--dataset data/list.csv --val-classes 0.4 --epochs 1 "
    assert "replace it, or leave it out with --skip-unreadable" in fails(flags, capsys)
    train.main(shlex.split(flags + "--skip-unreadable --overwrite"))
    said, run = capsys.readouterr(), run_folder(here)
    assert left_out(run) == [] and "left out 1 image that cannot be read: 9/фото" in said.err
    assert "were trained on" not in said.out
    counts = json.loads((run / "results.json").read_text())["images"]
    assert counts["test"]["images"] == 39 and counts["train + val"]["images"] == 40


def test_skip_unreadable_without_bad_pictures_leaves_none_out(here, capsys):
    make_folder(here / "data")
    train.main(shlex.split(OWN + "--skip-unreadable --epochs 1"))
    assert left_out(run_folder(here)) == [] and "left out" not in capsys.readouterr().err
    assert "skip" not in run_folder(here).name and checkpoint_of(run_folder(here)).exists()


# --- dataset.check and train.py agree -----------------------------------------------------------


def test_train_and_check_both_refuse_a_train_folder_without_a_test_folder(here, capsys):
    make_folder(here / "data/train")
    line = "folder test: there are no images, only for train; add some, or use --train-on all"
    assert line in fails(OWN, capsys)
    assert check.main(["--dataset", "folder", "--workers", "0"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [line, "1 problem found"]


@pytest.mark.parametrize("train_folder, test_folder, named", [
    ("train", "Test", "Test: rename it to test"), ("TRAIN", "test", "TRAIN: rename it to train"),
    ("Train", "Test", "rename it to t"),
])  # fmt: skip
def test_train_and_check_both_refuse_train_or_test_in_capitals(
    here, capsys, train_folder, test_folder, named
):
    make_folder(here / "data" / train_folder)
    make_folder(here / "data" / test_folder, first=4)
    for main, flags in ((train.main, OWN), (check.main, "--dataset folder --workers 0")):
        assert f"{named}" in fails(flags, capsys, main)


def test_a_class_may_be_called_test_in_capitals(here):
    make_folder(here / "vehicles", ["Train", "bus", "Test", "tram"])
    assert dataset.load("folder", here / "vehicles", "test").classes == ["bus", "tram"]
