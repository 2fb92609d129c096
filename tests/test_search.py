"""search.py: neighbours of one's own images, and an index that is kept."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import search
import train
from retrieval.search import nearest
from tests.conftest import TINY, fails, made_once, make_folder, run_folder, write_image
from tests.test_page import data_of

FOUND = re.compile(r"^ +(\d+)  (-?\d\.\d{4})  (.*)$", re.M)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_folder(folder / "photos")
        train.main(shlex.split(TINY + "--dataset folder --data-root photos --epochs 1"))
    return folder


@pytest.fixture
def trained(here, trained_once):
    """A run on the folder `photos`; its run folder."""
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return run_folder(here)


def searched(capsys, flags):
    """(what was printed, what was warned of) of a search."""
    capsys.readouterr()
    search.main(shlex.split(flags + " --workers 0"))
    out, err = capsys.readouterr()
    return out, [line for line in err.splitlines() if "gpu-id" not in line]


def test_the_nearest_of_a_picture_in_the_gallery_is_itself_and_the_page_shows_them(
    here, trained, capsys
):
    query, other = "photos/猫/фото 3.jpg", "photos/house wren/фото 0.jpg"
    flags = f"--resume '{trained}' --gallery photos --query '{query}' '{other}' --top 5 "
    out, err = searched(capsys, flags + "--json n.json --page n.html")
    assert "gallery: 32 images, 32 of them embedded now; 0 skipped" in out and not err
    lines = FOUND.findall(out)
    assert [int(rank) for rank, _, _ in lines] == [1, 2, 3, 4, 5] * 2
    assert lines[0][1:] == ("1.0000", str(here / query))
    values = [float(value) for _, value, _ in lines[:5]]
    assert values == sorted(values, reverse=True)
    first, second = json.loads(Path("n.json").read_text())
    assert first["query"] == query and len(second["neighbours"]) == 5
    assert first["neighbours"][0]["path"] == str(here / query)
    data = data_of("n.html")
    shown = [query["found"] for query in data["queries"]]
    assert [[data["names"][picture] for picture, _, _ in found] for found in shown] == [
        ["/".join(near["path"].split("/")[-2:]) for near in result["neighbours"]]
        for result in (first, second)
    ]
    assert all(data["pictures"]) and not data["classes"]


def test_an_index_embeds_only_what_is_new_or_changed_and_drops_what_is_gone(here, trained, capsys):
    flags = f"--resume '{trained}' --query 'photos/猫/фото 3.jpg' --top 40 "
    whole, _ = searched(capsys, flags + "--gallery photos --save-index g.npz")
    write_image(here / "photos/猫/more/new.jpg", seed=1234)
    write_image(here / "photos/猫/фото 4.jpg", seed=4321)
    (here / "photos/猫/фото 5.jpg").unlink()
    for gallery, new in (("g.npz", 2), ("photos --save-index g.npz", 0), ("g.npz", 0)):
        out, _ = searched(capsys, flags + f"--gallery {gallery}")
        assert f"gallery: 32 images, {new} of them embedded now" in out
        paths = [path for _, _, path in FOUND.findall(out)]
        assert len(paths) == 32 and str(here / "photos/猫/more/new.jpg") in paths
        assert not any("фото 5" in path and "猫" in path for path in paths)
    fresh, _ = searched(capsys, flags + "--gallery photos")
    assert FOUND.findall(fresh) == FOUND.findall(out) != FOUND.findall(whole)


def test_what_cannot_be_read_is_named_skipped_and_counted(here, trained, capsys):
    (here / "photos/猫/фото 4.jpg").write_bytes(b"torn")
    (here / "photos/猫/gone.jpg").symlink_to("nowhere")
    flags = f"--resume '{trained}' --gallery photos --query 'photos/猫/фото 3.jpg'"
    out, err = searched(capsys, flags)
    assert "31 images, 31 of them embedded now; 2 skipped" in out
    assert all("skipped" in line for line in err) and "gone.jpg: No such file" in err[0]
    assert len(err) == 2 and "фото 4.jpg: not an image" in err[1]


def test_a_gallery_is_a_list_too(here, trained, capsys):
    rows = [f"photos/{path.parent.name}/{path.name},{path.parent.name}"
            for path in sorted(here.glob("photos/*/*")) if '"' not in str(path)]  # fmt: skip
    (here / "list.csv").write_text("\n".join(["path,label", *rows, "photos/gone.jpg,猫"]))
    flags = f"--resume '{trained}' --gallery list.csv --query 'photos/猫/фото 3.jpg'"
    out, _ = searched(capsys, flags)
    assert "gallery: 24 images, 24 of them embedded now; 1 skipped" in out
    assert FOUND.findall(out)[0][2] == str(here / "photos/猫/фото 3.jpg")


@pytest.mark.parametrize("flags, line", [
    ("--gallery nowhere --query {image}", "no such folder, list or index"),
    ("--gallery empty --query {image}", "no image in it can be read"),
    ("--gallery photos --query nowhere.jpg", "--query: not an image"),
    ("--gallery g.npz --query {image}", "g.npz: not an index that can be read"),
    ("--gallery photos --save-index g.npz --query {image}", "not an index that can be read"),
    ("--gallery photos --query {image} --page nowhere/p.html", "--page nowhere/p.html: not a"),
    ("--gallery photos --query {image} --save-index g", "--save-index g: must end in .npz"),
    ("--gallery photos --query {image} --top 0", "--top: invalid number"),
    ("--gallery photos --quer {image}", "required: --query"),
])  # fmt: skip
def test_a_bad_search_ends_in_one_line(here, trained, capsys, flags, line):
    image = "'photos/猫/фото 3.jpg'"
    (here / "empty").mkdir()
    (here / "g.npz").write_bytes(b"junk")
    command = f"--resume '{trained}' {flags.format(image=image)} --workers 0"
    assert line in fails(command, capsys, search.main)


def test_an_index_of_another_checkpoint_is_refused(here, trained, capsys):
    flags = "--query 'photos/猫/фото 3.jpg' --gallery "
    searched(capsys, f"--resume '{trained}' {flags} photos --save-index other.npz")
    train.main(shlex.split(f"--resume '{trained}' --epochs 2 --workers 0"))
    last = next(trained.glob("*_last.pth"))
    line = fails(f"--resume '{last}' {flags} other.npz --workers 0", capsys, search.main)
    assert "an index of another checkpoint" in line


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_neighbours_are_those_of_one_product_whatever_the_chunks(chunk_size):
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(90, 8))
    queries = F.normalize(torch.randn(5, 8))
    expected, order = (queries @ gallery.T).sort(dim=1, descending=True, stable=True)
    similarity, index = nearest(queries, gallery, 12, chunk_size=chunk_size)
    torch.testing.assert_close(similarity, expected[:, :12])
    assert torch.equal(index, order[:, :12])
    assert nearest(queries, gallery, 1000, chunk_size=chunk_size)[1].shape == (5, 90)
