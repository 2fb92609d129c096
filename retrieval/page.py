"""Pages of pictures that open from a file, without a network: page.html with its data."""

import base64
import io
import json
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import as_rgb, opened
from utils import UserError, progress

SIDE = 112  # pixels of a picture's longer side
MAX_BYTES = 12 * 10**6  # of all pictures in a page, as text
DATA_TAG = '<script type="application/json" id="data">'


class Pictures:
    """Small copies of images, each once; `add` returns an image's number."""

    def __init__(self, background):
        self.background = background
        self.numbers, self.texts, self.bytes = {}, [], 0

    def add(self, path):
        if path not in self.numbers:
            jpeg = io.BytesIO()
            small_picture(path, self.background).save(jpeg, "JPEG", quality=75)  # about 3 kB
            self.numbers[path] = len(self.texts)
            self.texts.append(base64.b64encode(jpeg.getvalue()).decode())
            self.bytes += len(self.texts[-1])
        return self.numbers[path]

    def data(self):
        names = ["/".join(path.split("/")[-2:]) for path in self.numbers]
        return {"pictures": self.texts, "names": names}


def small_picture(path, background):
    """A small copy of an image, as in read_image; grey if the file is gone or damaged."""
    try:
        with opened(path, own=background is not None) as image:
            image.draft(None, (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at about this size
            picture = as_rgb(image, background)
            picture.thumbnail((SIDE, SIDE))
            return picture
    except UserError:
        return Image.new("RGB", (SIDE, SIDE), "grey")


def write_page(data):
    """page.html with `data` in it, as bytes."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # no </script> in a name
    return page.replace("DATA", text, 1).encode()


def add_to_page(page, title, lines, picture):
    """A page's bytes with a section more, of text and a PNG; one of the same title is replaced."""
    text = page.decode()
    data = json.loads(text[text.index(DATA_TAG) + len(DATA_TAG) :].partition("</script>")[0])
    section = {"lines": lines, "picture": base64.b64encode(picture).decode()}
    return write_page({**data, "sections": {**data.get("sections", {}), title: section}})


def pictures_page(title, note, rows, background):
    """A page of pictures with others beside them; its bytes. rows: [(path, note, others)], others:
    [{"path", "similarity", and, with a threshold, "above": whether it is at or above that}]."""
    pictures, queries = Pictures(background), []
    for path, words, others in progress(rows, len(rows), "page"):
        if pictures.bytes > MAX_BYTES:
            note = f"{note} The first {len(queries):,} of {len(rows):,}.".strip()
            break
        queries.append({"picture": pictures.add(path), "label": None, "note": words, "found": [
            [pictures.add(other["path"]), other["similarity"], None, other.get("above")]
            for other in others
        ]})  # fmt: skip
    return write_page({
        "title": title, "about": "", "note": note, "metrics": [], "curves": None,
        "classes": [], "queries": queries, **pictures.data(),
    })  # fmt: skip


def results_page(head, images, hits, neighbours):
    """A page of metrics, classes, confusions, and queries with their neighbours; its bytes.

    head: {"title", "about", "metrics": [(row, {metric: per cent})], "curves": a PNG or None};
    hits: {k: [Q]} of hits_at_k; neighbours: (similarities, indices) of `search.neighbours`.
    """
    k = min(hits)
    hit, labels, total = hits[k].cpu().numpy(), images.labels.numpy(), len(hits[k])
    similarities, indices = (part.numpy() for part in neighbours)
    pictures, queries = Pictures(images.background), []
    order = worst_first(hit, labels[:total], similarities, labels[indices])
    for query in progress(order, total, "page"):
        if pictures.bytes > MAX_BYTES:
            break
        queries.append({
            "picture": pictures.add(images.paths[query]), "label": int(labels[query]), "found": [
                [pictures.add(images.paths[index]), round(float(similarity), 4), int(labels[index])]
                for similarity, index in zip(similarities[query], indices[query])
            ],
        })  # fmt: skip
    per_class, hits_of = Counter(labels[:total].tolist()), Counter(labels[:total][hit].tolist())
    first = labels[indices[:, :1]]  # [Q, 1], or [Q, 0] without any neighbour
    wrong = (first != labels[:total, None]).nonzero()[0]
    confusions = Counter(zip(labels[wrong].tolist(), first[wrong].flatten().tolist()))
    note = (
        f"{len(queries):,} of {total:,} queries, worst first, one of each class before a second of "
        "any. ✓ and a line: of the query's class; ✗ and dashes: of another."
    )
    return write_page({
        **head, "curves": base64.b64encode(head["curves"] or b"").decode(), "note": note,
        "classes": images.classes, "queries": queries, **pictures.data(),
        "per_class_metric": f"R@{k}",
        "per_class": [(label, n, hits_of[label]) for label, n in sorted(per_class.items())],
        "confusions": [(*pair, times) for pair, times in confusions.most_common()],
    })  # fmt: skip


def worst_first(hit, labels, similarities, neighbour_labels):
    """Queries [Q] in order: the worst of every class, then the next of every class. Worst is a
    miss, then one with few matches, then one whose nearest is most similar."""
    matches = (neighbour_labels == labels[:, None]).sum(axis=1)
    order = np.lexsort((-similarities.max(axis=1, initial=-1), matches, hit))
    counters = defaultdict(count)
    rounds = [next(counters[label]) for label in labels[order]]
    return order[np.argsort(rounds, kind="stable")]
