"""The page of a run: what is in it, and in a browser."""

import base64
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate
import train
from dataset.images import ImageSet
from retrieval import page
from retrieval.metrics import hits_at_k
from retrieval.picture import draw_neighbours
from retrieval.search import NEIGHBOURS, neighbours
from tests.conftest import TINY, fails, made_once, make_cub, metrics, run_folder, write_image


def data_of(file):
    """What a page shows, from the page itself."""
    text = Path(file).read_text()
    assert not re.search("https?:", text)  # it needs no network
    (data,) = re.findall('<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    with made_once(tmp_path_factory) as folder:
        make_cub(folder / "data", classes=6)
        train.main(shlex.split(TINY + "--epochs 1"))
    return folder


@pytest.fixture
def trained(here, trained_once):
    shutil.copytree(trained_once, here, dirs_exist_ok=True)
    return run_folder(here)


KS = (1, 2, 4, 8, 16, 32)


def test_a_finished_run_has_a_page_with_its_recalls_and_each_class_s(trained):
    data, (result,) = data_of(trained / "page.html"), metrics(trained)
    rows, recalls = dict(data["metrics"]), {f"R@{k}": result[f"R@{k}"] for k in KS}
    chosen = "best epoch, 0, chosen by R@1 of the test images"
    assert list(rows) == ["before training", chosen, "last epoch, 0"]
    assert rows["last epoch, 0"] == rows[chosen] == recalls
    assert rows["before training"].keys() == recalls.keys()
    assert base64.b64decode(data["curves"]) == (trained / "curves.png").read_bytes()
    assert data["per_class_metric"] == "R@1"
    assert [count for _, count, _ in data["per_class"]] == [10] * 3
    hits = sum(hits for _, _, hits in data["per_class"])
    assert 100 * hits / 30 == pytest.approx(result["R@1"])
    assert sum(times for _, _, times in data["confusions"]) == 30 - hits
    assert len(data["queries"]) == len(data["pictures"]) == 30
    pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in data["pictures"]]
    assert all(max(image.size) <= page.SIDE for image in pictures)
    assert data["names"][data["queries"][0]["picture"]].startswith("10")


def test_evaluate_writes_the_same_page_for_the_k_asked_for(trained, capsys):
    flags = f"'{trained}' --workers 0 --ks 2 4 --page"
    evaluate.main(shlex.split(f"{flags} p.html"))
    ours, theirs = data_of("p.html"), data_of(trained / "page.html")
    assert ours["per_class_metric"] == "R@2" and list(ours["metrics"][0][1]) == ["R@2", "R@4"]
    assert set(ours["pictures"]) == set(theirs["pictures"]) and ours["curves"]
    line = fails(f"{flags} nowhere/p.html", capsys, evaluate.main)
    assert "--page nowhere/p.html: not a file's path" in line


def small_set(here, classes=5, per_class=4, queries=None):
    items = []
    for i in range(classes * per_class):
        path = here / f"{i % classes}" / f"{i}.jpg"
        write_image(path, seed=i)
        items.append((str(path), f"class {i % classes}"))
    return ImageSet(items, queries=queries)


def results(images, embeddings):
    parts = (slice(images.queries), slice(images.queries, None))
    sides = [x[part] for part in parts for x in (embeddings, images.labels)]
    sides = sides if images.queries else sides[:2]
    hits = hits_at_k(*sides[:2], (1,), *sides[2:])
    near = neighbours(embeddings, NEIGHBOURS, images.queries)
    head = {"title": "a run", "about": "", "metrics": [], "curves": None}
    Path("page.html").write_bytes(page.results_page(head, images, hits, near))
    return data_of("page.html")


@pytest.mark.parametrize("queries", [None, 9])
def test_each_query_is_shown_with_its_nearest_those_that_went_wrong_first(here, queries):
    torch.manual_seed(0)
    images = small_set(here, queries=queries)
    embeddings = F.normalize(torch.randn(20, 6))
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    if queries:
        similarity = similarity[:queries].index_fill(1, torch.arange(queries), -2)
    data, seen = results(images, embeddings), []
    paths = ["/".join(path.split("/")[-2:]) for path in images.paths]
    for query in data["queries"]:
        number = paths.index(data["names"][query["picture"]])
        expected = similarity[number].sort(descending=True)
        found = [paths.index(data["names"][picture]) for picture, _, _ in query["found"]]
        assert found == expected.indices[:8].tolist()
        assert [label for _, _, label in query["found"]] == images.labels[found].tolist()
        seen.append((query["label"], query["found"][0][2] == query["label"]))
    assert len(data["queries"]) == (queries or 20)
    assert len({label for label, _ in seen[:5]}) == 5  # of each class one
    for label in range(5):
        hits = [hit for other, hit in seen if other == label]
        assert hits == sorted(hits)  # misses first


def test_of_a_large_set_a_page_holds_as_much_as_it_says_and_every_class_is_counted(
    here, monkeypatch
):
    images = small_set(here, classes=10)
    monkeypatch.setattr(page, "MAX_BYTES", 30_000)
    data = results(images, F.normalize(torch.randn(40, 6)))
    assert 0 < len(data["queries"]) < 40
    assert f"{len(data['queries'])} of 40 queries" in data["note"]
    assert sum(map(len, data["pictures"])) < 30_000 + 9 * 8_000  # the last query is whole
    assert sum(count for _, count, _ in data["per_class"]) == 40


def test_a_name_cannot_break_out_of_the_page_and_a_file_that_is_gone_has_no_picture(here):
    images = small_set(here)
    images.classes = ["</script><script>alert(1)</script>", *images.classes[1:]]
    Path(images.paths[0]).unlink()
    data = results(images, F.normalize(torch.randn(20, 6)))
    assert data["classes"][0].startswith("</script>")
    picture = base64.b64decode(data["pictures"][data["names"].index("0/0.jpg")])
    assert Image.open(io.BytesIO(picture)).getcolors() == [(page.SIDE**2, (128, 128, 128))]


def test_a_lone_test_image_has_a_page_too(here):
    images = small_set(here, classes=1, per_class=1)
    data = results(images, torch.ones(1, 6))
    assert [query["found"] for query in data["queries"]] == [[]] and not data["confusions"]


def test_neighbours_leave_out_the_image_itself_and_not_its_duplicate():
    x = F.normalize(torch.randn(700, 6))
    x[600] = x[3]
    similarities, indices = neighbours(x, 4)
    assert indices[3, 0] == 600 and indices[600, 0] == 3
    assert not (indices == torch.arange(700)[:, None]).any()
    everything = x @ x.T
    everything.fill_diagonal_(-2)
    torch.testing.assert_close(similarities, everything.topk(4).values)
    assert neighbours(x[:3], 8)[0].shape == (3, 2)


@pytest.mark.parametrize("queries", [None, 9])
def test_the_picture_has_a_row_for_each_of_eight_queries_and_says_what_is_right(here, queries):
    images = small_set(here, queries=queries)
    images.classes = ["$a_$", os.fsdecode(b"caf\xe9"), *images.classes[2:]]  # neither is drawn
    embeddings = F.normalize(torch.eye(5)[images.labels] + 0.01 * torch.randn(20, 5))
    figure = draw_neighbours(images, *neighbours(embeddings, 8, queries))
    if queries:  # drawing takes seconds: once is enough
        figure.savefig(io.BytesIO())
    titles = [axes.get_title() for axes in figure.axes if axes.has_data()]
    marks = [title[0] for title in titles if title[0] in "✓✗"]
    assert len(titles) - len(marks) == 8
    assert marks.count("✓") >= len(marks) * 2 // 8 and "✗" in marks


def browser_page(sync_playwright, **options):
    """A page of headless Chromium; skips, by name, where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium")
    browser = sync_playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
    return browser.new_page(**options)


# words that stand on two lines
BROKEN_WORDS = """() => {
  const words = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) for (const found of walker.currentNode.data.matchAll(/[^\\s_/-]+/g)) {
    const range = document.createRange();
    range.setStart(walker.currentNode, found.index);
    range.setEnd(walker.currentNode, found.index + found[0].length);
    if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) words.push(found[0]);
  }
  return words.join(" ");
}"""


@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1400, "light")])
def test_the_page_works_in_a_browser(trained, width, scheme):
    sync_api = pytest.importorskip("playwright.sync_api")
    evaluate.main(shlex.split(f"'{trained}' --workers 0 --page p.html"))
    data, complaints = data_of("p.html"), []
    with sync_api.sync_playwright() as playwright:
        view = {"width": width, "height": 900}
        tab = browser_page(playwright, viewport=view, color_scheme=scheme)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: complaints.append(request.url)
               if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
        tab.goto(Path("p.html").resolve().as_uri())
        images = "[...document.images]"
        assert tab.evaluate(f"{images}.every(image => image.complete && image.naturalWidth)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert not tab.evaluate(BROKEN_WORDS)
        assert tab.evaluate(f"{images}.every(image => image.alt)")
        assert tab.locator(".query").count() == len(data["queries"])
        right = [label == query["label"] for query in data["queries"]
                 for _, _, label in query["found"]]  # fmt: skip
        for kind, mark, count in (("right", "✓", sum(right)), ("wrong", "✗", right.count(False))):
            texts = tab.locator(f".{kind}").all_inner_texts()
            assert len(texts) == count and all(mark in text for text in texts)

        cells = tab.locator("#classes tbody td:nth-child(3)")
        values = [float(text) for text in cells.all_inner_texts()]
        assert values == sorted(values)
        tab.locator("#classes th button").nth(2).focus()
        tab.keyboard.press("Enter")  # turns the order; no mouse is needed
        values = [float(text) for text in cells.all_inner_texts()]
        assert values == sorted(values, reverse=True)
        assert tab.locator("#classes th").nth(2).get_attribute("aria-sort") == "descending"

        name = data["classes"][1]
        tab.locator("#filter").focus()
        tab.keyboard.type(name[:-1].upper())  # a part of the name, in any case
        titles = set(tab.locator(".query b").all_inner_texts())
        assert titles == {other for other in data["classes"] if name[:-1] in other}
        tab.keyboard.type(name[-1])
        assert tab.locator(".query b").all_inner_texts() == [name] * 10
        tab.locator("#classes td button").first.click()
        assert set(tab.locator(".query b").all_inner_texts()) == {
            tab.locator("#classes td button").first.inner_text()
        }
        background = "getComputedStyle(document.querySelector('thead')).backgroundColor"
        assert (tab.evaluate(background) == "rgb(255, 255, 255)") == (scheme == "light")
    assert not complaints
