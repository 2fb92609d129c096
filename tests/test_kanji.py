"""--dataset kanji and the demo: what is drawn, from which fonts, and the factors beside it."""

import csv
import shlex
import shutil
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageChops

import dataset
import train
from dataset import check, demo, download, kanji
from tests.conftest import TINY, fails, metrics, run_folder, snapshot

FONTS = {"DejaVuSans.ttf": "fonts-a", "DejaVuSerif.ttf": "fonts-b", "DejaVuSansMono.ttf": "fonts-b"}


@pytest.fixture
def latin(tmp_path, monkeypatch):
    """matplotlib's fonts for the fourteen, letters for kanji, and an empty data root."""
    monkeypatch.setattr(kanji, "FOLDERS", (matplotlib.get_data_path(), "~/no/such/folder"))
    monkeypatch.setattr(kanji, "FONTS", FONTS)
    monkeypatch.setattr(kanji, "choose_characters", lambda count: list("ABCDEFGHIJKL")[:count])
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def factors(root, name):
    with open(root / name / "factors.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def faces(root):
    return Counter(path.parent.name for path in root.glob("kanji/images/*/*.png"))


# --- the characters ----------------------------------------------------------------------------


def test_the_characters_are_level_1_without_those_that_share_a_picture():
    everything = kanji.choose_characters(kanji.ALL)
    assert len(set(everything)) == kanji.ALL == 2965 - len(kanji.TWINS)
    assert not set(kanji.TWINS) & set(everything) and set("亜腕一") <= set(everything)
    assert {character.encode("iso2022_jp")[:3] for character in everything} == {b"\x1b$B"}
    rows = {character.encode("iso2022_jp")[3] - 0x20 for character in everything}
    assert rows == set(range(16, 48))


def test_the_chosen_characters_are_fixed_and_in_order_of_code_point():
    default = kanji.choose_characters(kanji.CHARACTERS)
    assert len(default) == 700 and default == sorted(default)
    assert set(default) < set(kanji.choose_characters(701))
    assert "".join(default[::100]) == "丁咋年析犯缶資"


# --- the pictures ------------------------------------------------------------------------------


def test_a_picture_is_black_in_the_middle_of_white_and_its_ink_is_counted(latin):
    kanji.prepare(latin, characters=5, side=48)
    for row in factors(latin, "kanji"):
        path = latin / "kanji" / row["path"]
        image = Image.open(path)
        assert (image.mode, image.size, path.stem) == ("L", (48, 48), row["typeface"])
        left, top, right, bottom = ImageChops.invert(image).getbbox()
        assert abs(left + right - 48) <= 1 and abs(top + bottom - 48) <= 1 and left and top
        assert image.getextrema() == (0, 255)
        assert float(row["ink"]) == pytest.approx((np.asarray(image) < 128).mean(), abs=1e-4)


def test_characters_that_a_font_lacks_are_left_out(latin, monkeypatch):
    arabic = "\u0639"  # DejaVuSans and its Mono have it
    monkeypatch.setattr(kanji, "choose_characters", lambda count: ["A", "B", " ", "\u4e9c", arabic])
    kanji.prepare(latin)
    assert faces(latin) == {"A": 3, "B": 3, arabic: 2}
    assert len(factors(latin, "kanji")) == 8


def test_two_drawings_are_the_same_bytes(latin):
    for name in "ab":
        (latin / name).mkdir()
        kanji.prepare(latin / name, characters=3)
    files = [path.relative_to(latin / "a") for path in (latin / "a").rglob("*.*")]
    assert len(files) == 1 + 3 * 3
    assert all((latin / "a" / f).read_bytes() == (latin / "b" / f).read_bytes() for f in files)


def test_an_interrupted_drawing_leaves_nothing_and_is_drawn_again(latin, monkeypatch):
    ink_of, drawn = kanji.ink_of, []

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) > 9:
            raise KeyboardInterrupt
        return ink_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kanji, "ink_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kanji.prepare(latin)
    assert not [path for path in latin.rglob("*") if path.is_file()]
    kanji.prepare(latin, characters=4)
    assert faces(latin) == dict.fromkeys("ABCD", 3)


# --- the commands ------------------------------------------------------------------------------


def test_train_draws_once_and_tests_the_second_half(latin, monkeypatch, capsys):
    monkeypatch.chdir(latin.parent)
    command = TINY.replace("cub", "kanji") + "--epochs 1"
    train.main(shlex.split(command))
    said = capsys.readouterr()
    assert "drawing 700 characters in 3 typefaces into data/kanji" in said.out
    assert "warning: data" not in said.err
    assert "R@8" in metrics(run_folder(latin.parent))[0]
    before = snapshot(latin)
    train.main([*shlex.split(command), "--overwrite"])
    assert snapshot(latin) == before and "drawing" not in capsys.readouterr().out
    assert dataset.load("kanji", latin, "train").classes == [*"ABCDEF"]
    assert dataset.load("kanji", latin, "test").classes == [*"GHIJKL"]
    assert check.main(["--dataset", "kanji", "--data-root", str(latin), "--workers", "0"]) == 0


def test_fewer_typefaces_are_a_warning_that_names_the_packages(latin, monkeypatch, capsys):
    monkeypatch.setattr(kanji, "FONTS", {**FONTS, "x.ttf": "fonts-x", "y.ttf": "fonts-y"})
    kanji.prepare(latin)
    for _ in range(2):
        kanji.read(latin)
        assert (
            "kanji: drawn without 2 of 5 typefaces; apt install fonts-x fonts-y, then delete the "
            "folder" in capsys.readouterr().err
        )
    assert faces(latin) == dict.fromkeys("ABCDEFGHIJKL", 3)


@pytest.mark.parametrize("there", [0, 1])
def test_missing_fonts_are_one_line_that_names_the_packages(latin, monkeypatch, capsys, there):
    fonts = latin.parent / "fonts"
    fonts.mkdir()
    if there:
        shutil.copy(next(Path(matplotlib.get_data_path()).rglob("DejaVuSans.ttf")), fonts)
    monkeypatch.setattr(kanji, "FOLDERS", (str(fonts),))
    needed = "fonts-b" if there else "fonts-a fonts-b"
    for main, command in ((train.main, "--dataset kanji"), (download.main, "kanji")):
        line = fails(f"{command} --data-root {latin}", capsys, main)
        assert f"found {there} of 3 typefaces below {fonts}; apt install {needed}" in line
    assert not list(latin.iterdir())


def test_download_draws_and_counts_other_numbers_and_sizes(latin, capsys):
    command = f"kanji --data-root {latin} --characters 5 --size 32"
    download.main(shlex.split(command))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "kanji train: 6 images of 2 classes",
        "kanji test: 9 images of 3 classes",
    ]
    assert Image.open(latin / "kanji/images/A/DejaVuSans.png").size == (32, 32)
    before = snapshot(latin)
    assert f"{latin}/kanji is there already: delete it" in fails(command, capsys, download.main)
    download.main(["kanji", "--data-root", str(latin)])  # what is there is taken as it is
    assert snapshot(latin) == before
    line = fails(f"cub --data-root {latin} --size 32", capsys, download.main)
    assert "--characters and --size are for kanji alone" in line


# --- the demo's factors ------------------------------------------------------------------------


def test_the_demo_lists_the_factors_of_every_image(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 2)
    demo.prepare(tmp_path)
    rows = factors(tmp_path, "demo")
    images = {path for items in demo.read(tmp_path).values() for path, _ in items}
    assert {str(tmp_path / "demo" / row["path"]) for row in rows} == images and len(rows) == 48
    assert all(f"{row['shape']}_{row['texture']}_0" in row["path"] for row in rows)
    assert [name for name, values in zip(rows[0], zip(*map(dict.values, rows)))
            if len(set(values)) == 1] == []  # fmt: skip


def test_the_demos_factors_are_those_of_its_pixels(monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 3)
    looked_at = 0
    for _, image, row in demo.draw():
        if row["texture"] == "Plain":
            middle = (row["x"] + row["side"] // 2, row["y"] + row["side"] // 2)
            tint = (row["red"], row["green"], row["blue"])
            assert image.getpixel(middle) == tuple(int(row["light"] * t) for t in tint)
            looked_at += 1
        background = tuple(row[f"background_{colour}"] for colour in ("red", "green", "blue"))
        assert background in {colour for _, colour in image.getcolors(10_000)}
    assert looked_at == 12


@pytest.mark.parametrize("name", ["demo", "kanji"])
def test_the_folder_of_a_drawn_data_set_is_refused_as_data_root(latin, monkeypatch, capsys, name):
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 1)
    dataset.prepare(name, latin)
    line = fails(f"--dataset {name} --data-root {latin / name}", capsys)
    assert line.endswith(f"--data-root {latin / name}: use {latin}")
