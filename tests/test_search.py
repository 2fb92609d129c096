"""search.py: neighbours of one's own images, and an index that is kept."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import search
import train
from retrieval import page
from retrieval.search import duplicates, nearest
from tests.conftest import checkpoint_of, fails, write_image
from tests.test_page import browser_page, data_of

FOUND = re.compile(r"^ +(\d+)  (-?\d\.\d{4})  (.*)$", re.M)


def searched(capsys, flags):
    """(what was printed, what was warned of) of a search."""
    capsys.readouterr()
    assert not search.main(shlex.split(flags + " --workers 0"))
    out, err = capsys.readouterr()
    return out, err.splitlines()


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
    assert [[data["names"][picture] for picture, *_ in found] for found in shown] == [
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
    rows = [f"photos/{path.parent.name}/{path.name}"
            for path in sorted(here.glob("photos/*/*")) if '"' not in str(path)]  # fmt: skip
    (here / "list.csv").write_text("\n".join(["path", *rows, "photos/gone.jpg"]))
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
    ("--gallery photos --quer {image}", "unrecognized arguments: --quer"),
    ("--gallery photos", "say what for: --query, --duplicates, --export or --save-index"),
    ("--gallery photos --query {image} --duplicates", "--duplicates: not allowed with argument"),
    ("--gallery photos --save-index new.npz --json n.json", "--json and --page need --query"),
    ("--gallery photos --query {image} --min-similarity 2", "--min-similarity: invalid number"),
    ("--gallery photos --duplicates", "--duplicates: needs a threshold; give --min-similarity"),
    ("--gallery list.csv --query {image}", "list.csv, line 1: the header must name the columns pa"),
    ("other --gallery photos --query {image}", "name one checkpoint or run folder"),
])  # fmt: skip
def test_a_bad_search_ends_in_one_line(here, trained, capsys, flags, line):
    image = "'photos/猫/фото 3.jpg'"
    (here / "empty").mkdir()
    (here / "g.npz").write_bytes(b"junk")
    (here / "list.csv").write_text("file\na.jpg\n")
    command = f"--resume '{trained}' {flags.format(image=image)} --workers 0"
    assert line in fails(command, capsys, search.main)


def test_an_index_of_another_checkpoint_is_refused(here, trained, capsys):
    flags = "--query 'photos/猫/фото 3.jpg' --gallery "
    searched(capsys, f"--resume '{trained}' {flags} photos --save-index other.npz")
    train.main(shlex.split(f"--resume '{trained}' --epochs 2 --workers 0"))
    last = next(trained.glob("*_last.pth"))
    line = fails(f"--resume '{last}' {flags} other.npz --workers 0", capsys, search.main)
    assert "an index of another checkpoint" in line


def test_one_bad_query_is_named_the_others_are_answered_and_the_status_is_1(here, trained, capsys):
    good = ["photos/猫/фото 3.jpg", "photos/house wren/фото 0.jpg"]
    (here / "torn.jpg").write_bytes(b"torn")
    flags = f"--gallery photos --query '{good[0]}' torn.jpg '{good[1]}' --json n.json --workers 0"
    capsys.readouterr()
    assert search.main([str(trained), *shlex.split(flags)]) == 1
    assert "warning: skipped torn.jpg: not an image" in capsys.readouterr().err
    results = json.loads(Path("n.json").read_text())
    assert [result["query"] for result in results] == good
    nearest_paths = [result["neighbours"][0]["path"] for result in results]
    assert nearest_paths == [str(here / path) for path in good]


def test_of_a_folder_of_runs_it_says_which_one(here, trained, capsys):
    out, err = searched(capsys, "logs/logs_folder --gallery photos --query 'photos/猫/фото 3.jpg'")
    assert out.startswith(f"logs/logs_folder: its newest run is {trained.name}\n")
    assert not err  # such as of a --gpu-id that nobody has named


def test_an_index_is_made_without_a_query_and_says_what_it_is_of(here, trained, capsys):
    out, _ = searched(capsys, f"'{trained}' --gallery photos --save-index g.npz")
    assert "32 of them embedded now" in out and not FOUND.findall(out)
    with np.load("g.npz") as index:
        assert index["source"] == str(here / "photos") and len(index["paths"]) == 32
        assert index["run"] == str(here / checkpoint_of(trained, "best"))
        assert str(index["checkpoint"]).endswith(" fp32 #ffffff")


def test_a_second_gallery_replaces_an_index_with_overwrite_alone(here, trained, capsys):
    flags = f"'{trained}' --save-index g.npz --gallery"
    shutil.copytree("photos/猫", "cats")
    searched(capsys, f"{flags} photos")
    searched(capsys, f"'{trained}' --gallery cats --save-index cats.npz")
    before = Path("g.npz").read_bytes()
    for gallery in ("cats", "cats.npz"):
        line = fails(f"{flags} {gallery} --workers 0", capsys, search.main)
        assert f"g.npz: holds another gallery, {here}/photos; name another file" in line
        assert Path("g.npz").read_bytes() == before
    for gallery, new in (("cats", 8), ("cats.npz", 0)):
        Path("g.npz").write_bytes(before)
        out, _ = searched(capsys, f"{flags} {gallery} --overwrite")
        assert f"8 images, {new} of them embedded now" in out
        with np.load("g.npz") as index:
            assert index["source"] == str(here / "cats") and len(index["embeddings"]) == 8


def test_each_neighbour_is_above_the_threshold_or_not_and_a_query_can_have_none(
    here, trained, capsys
):
    write_image(here / "new.jpg", seed=77)
    query = "photos/猫/фото 3.jpg"
    flags = f"'{trained}' --gallery photos --query '{query}' new.jpg --top 32 --json n.json"
    plain, _ = searched(capsys, flags)
    assert not re.search("threshold: |  above  |  below  |nothing like", plain)
    results = json.loads(Path("n.json").read_text())
    assert all({*near} == {"path", "similarity"} for near in results[0]["neighbours"])
    highest = results[1]["neighbours"][0]["similarity"]
    threshold = (1 + highest) / 2
    calibration = trained / "calibration.json"
    of = {"checkpoint": checkpoint_of(trained, "best").name}
    content = json.dumps({"threshold": threshold, "fmr": 0.01, "computed_on": of})
    calibration.write_text(content)
    told, err = searched(capsys, f"{flags} --page n.html")
    assert not err
    assert f"threshold: {threshold:.4f} ({calibration}, false match rate 0.01)\n" in told
    assert f"\n{query}\n" in told and "\nnew.jpg: nothing like it\n" in told
    for result in json.loads(Path("n.json").read_text()):
        assert result["threshold"] == threshold
        assert all(near["above"] == (near["similarity"] >= threshold)
                   for near in result["neighbours"])  # fmt: skip
    marks = [line.split()[2] for line in told.splitlines() if re.match(r" +\d+  ", line)]
    assert marks[0] == "above" and set(marks[32:]) == {"below"}
    first, second = data_of("n.html")["queries"]
    assert first["note"] == "" and second["note"] == "nothing like it"
    assert first["found"][0][3] and not any(found[3] for found in second["found"])
    by_hand, _ = searched(capsys, f"{flags} --min-similarity -1")
    assert "threshold: -1 (--min-similarity)" in by_hand and "  below  " not in by_hand
    calibration.write_text(content.replace("_best.pth", "_last.pth"))
    unused = "not used; its threshold is of folder_toy_last.pth, this search is with folder_toy_be"
    out, (line,) = searched(capsys, flags)
    assert f"{calibration}: {unused}" in line and out == plain
    calibration.write_text("{}")
    line = fails(f"{flags} --workers 0", capsys, search.main)
    assert "calibration.json: not a calibration that can be read" in line


def test_duplicates_are_listed_with_their_classes_as_text_json_and_page(here, trained, capsys):
    shutil.copy("photos/猫/фото 3.jpg", "photos/house wren/copy.jpg")
    shutil.copy("photos/猫/фото 3.jpg", "photos/猫/copy.jpg")
    shutil.copy("photos/синица/фото 1.jpg", "photos/синица/copy.jpg")
    rows = [f"photos/{path.parent.name}/{path.name},{path.parent.name}"
            for path in sorted(here.glob("photos/*/*")) if '"' not in str(path)]  # fmt: skip
    (here / "list.csv").write_text("\n".join(["path,label", *rows]))
    flags = f"'{trained}' --duplicates --min-similarity 1 --json d.json --page d.html --gallery"
    out, _ = searched(capsys, f"{flags} list.csv")
    assert "duplicates: 2 groups with 5 of the 27 images; 1 with several classes\n" in out
    assert re.search(r"^group \d: 3 images of 2 classes: house wren, 猫$", out, re.M)
    assert re.search(r"^group \d: 2 images of 1 class: синица$", out, re.M)
    assert f"  1.0000  house wren  {here}/photos/house wren/copy.jpg\n" in out
    groups = {tuple(group["classes"]): group["images"]
              for group in json.loads(Path("d.json").read_text())}  # fmt: skip
    assert groups.keys() == {("house wren", "猫"), ("синица",)}
    assert {image["path"] for image in groups["синица",]} == {
        str(here / "photos/синица" / name) for name in ("фото 1.jpg", "copy.jpg")
    }
    data = data_of("d.html")
    assert data["title"] == "Duplicates" and "at or above 1 (--min-similarity)" in data["note"]
    shown = {query["note"]: len(query["found"]) for query in data["queries"]}
    assert shown == {"3 images of 2 classes: house wren, 猫": 2, "2 images of 1 class: синица": 1}
    folder, _ = searched(capsys, f"{flags} photos")
    assert "group 1: 3 images\n" in folder and "2 groups with 5 of the 35 images\n" in folder


def test_a_page_of_many_groups_ends_at_its_limit_and_says_so(here, trained, capsys, monkeypatch):
    for path in [*(here / "photos/猫").iterdir()]:
        shutil.copy(path, here / "photos/house wren" / f"copy of {path.name}")
    monkeypatch.setattr(page, "MAX_BYTES", 10_000)
    flags = f"'{trained}' --gallery photos --duplicates --min-similarity 1 --page d.html"
    searched(capsys, flags)
    data = data_of("d.html")
    assert 1 < len(data["queries"]) < 8
    assert data["note"].endswith(f" The first {len(data['queries'])} of 8.")


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_of_a_search_marks_what_is_above_in_a_browser(here, trained, capsys, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    write_image(here / "new.jpg", seed=77)
    flags = f"'{trained}' --gallery photos --query 'photos/猫/фото 3.jpg' new.jpg --page n.html"
    searched(capsys, f"{flags} --min-similarity 0.9999")
    with sync_api.sync_playwright() as playwright:
        tab = browser_page(playwright, viewport={"width": width, "height": 900})
        tab.goto((here / "n.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        (above,) = tab.locator(".right").all_inner_texts()
        assert above.startswith("✓ 1.0000") and "фото 3.jpg" in above
        assert tab.locator(".wrong").count() == 19
        assert [("nothing like it" in row) for row in tab.locator(".query").all_inner_texts()] == [
            False, True,
        ]  # fmt: skip


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("threshold", [-1, 0.5, 0.8, 0.99])
def test_duplicates_equal_the_groups_of_all_pairs(chunk_size, threshold):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(60, 4))
    x[50:] = x[:10]
    similarity = (x @ x.T).fill_diagonal_(-2)
    linked = (similarity >= threshold) | torch.eye(60, dtype=bool)
    for _ in range(6):  # paths of up to 64 pairs
        linked = linked.float() @ linked.float() > 0
    expected = {frozenset(row.nonzero().flatten().tolist()) for row in linked}
    found = duplicates(x, threshold, chunk_size)
    assert {frozenset(images.tolist()) for images, _ in found} == {
        group for group in expected if len(group) > 1
    }
    for images, similarities in found:
        highest = similarity[images].amax(dim=1).numpy()
        np.testing.assert_allclose(similarities, highest, atol=1e-6)
        assert (np.diff(similarities) <= 0).all()
    firsts = [similarities[0] for _, similarities in found]
    assert firsts == sorted(firsts, reverse=True) and sum(len(i) for i, _ in found) >= 20


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_neighbours_do_not_depend_on_the_chunk_size(chunk_size):
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(90, 8))
    queries = F.normalize(torch.randn(5, 8))
    expected, order = (queries @ gallery.T).sort(dim=1, descending=True, stable=True)
    similarity, index = nearest(queries, gallery, 12, chunk_size=chunk_size)
    torch.testing.assert_close(similarity, expected[:, :12])
    assert torch.equal(index, order[:, :12])
    assert nearest(queries, gallery, 1000, chunk_size=chunk_size)[1].shape == (5, 90)
