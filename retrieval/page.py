"""Pages of pictures that open from a file, without a network: page.html with its data."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.files import opened
from utils import UserError, progress

SIDE = 112  # pixels of a picture's longer side
MAX_BYTES = 12 * 10**6  # of all pictures in a page, as text


class Pictures:
    """Small copies of images, each kept once: `add` gives the number of a path's."""

    def __init__(self):
        self.number, self.texts, self.bytes = {}, [], 0

    def add(self, path):
        if path not in self.number:
            jpeg = io.BytesIO()
            small_picture(path).save(jpeg, "JPEG", quality=75)  # about 3 kB
            self.number[path] = len(self.texts)
            self.texts.append(base64.b64encode(jpeg.getvalue()).decode())
            self.bytes += len(self.texts[-1])
        return self.number[path]

    def data(self):
        """For the page: a picture is called by its file and its folder."""
        names = ["/".join(path.split("/")[-2:]) for path in self.number]
        return {"pictures": self.texts, "names": names}


def small_picture(path):
    """A small copy of an image; a grey one of a file that is no longer there or is damaged."""
    try:
        with opened(path) as image:
            image.thumbnail((SIDE, SIDE))  # asks a JPEG's decoder for no more than that
            return image.convert("RGB")
    except UserError:
        return Image.new("RGB", (SIDE, SIDE), "grey")


def write_page(data):
    """page.html with `data` in it, as bytes."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # no </script> in a name
    return page.replace("DATA", text, 1).encode()


def search_page(results):
    """[{"query": path, "neighbours": [{"path", "similarity"}]}] -> the page's bytes."""
    pictures = Pictures()
    queries = [
        {"picture": pictures.add(result["query"]), "label": None, "found": [
            [pictures.add(found["path"]), found["similarity"], None]
            for found in result["neighbours"]
        ]}
        for result in results
    ]  # fmt: skip
    return write_page({
        "title": "Nearest neighbours", "about": "", "note": "", "metrics": [], "curves": None,
        "classes": [], "queries": queries, **pictures.data(),
    })  # fmt: skip


def results_page(title, about, metrics, images, hits, near, curves=None):
    """A page of metrics, {row: {metric: per cent}}, of classes, of confusions, and of queries with
    their neighbours; its bytes. hits: {k: [Q]} of hits_at_k; near: of `neighbours`; curves: a PNG's
    bytes."""
    labels, count = images.labels.numpy(), images.queries or len(images)
    similarities, indices = (part.numpy() for part in near)
    k = min(hits)
    hit, found = hits[k].cpu().numpy(), labels[indices]
    pictures, queries = Pictures(), []
    order = worst_first(hit, found == labels[:count, None], similarities, labels[:count])
    for query in progress(order, count, "page"):
        if pictures.bytes > MAX_BYTES:
            break
        queries.append({
            "picture": pictures.add(images.paths[query]), "label": int(labels[query]), "found": [
                [pictures.add(images.paths[index]), round(float(similarity), 4), int(labels[index])]
                for similarity, index in zip(similarities[query], indices[query])
            ],
        })  # fmt: skip
    asked, right = Counter(labels[:count].tolist()), Counter(labels[:count][hit].tolist())
    taken = Counter(
        (label, other) for label, others in zip(labels[:count].tolist(), found[:, :1].tolist())
        for other in others if label != other
    )  # fmt: skip
    note = (
        f"{len(queries):,} of {count:,} queries, worst first, one of each class before a second of "
        "any. ✓ and a line: of the query's class; ✗ and dashes: of another."
    )
    return write_page({
        "title": title, "about": about, "note": note, "metrics": list(metrics.items()),
        "curves": curves and base64.b64encode(curves).decode(), "classes": images.classes,
        "queries": queries, **pictures.data(), "per_class_metric": f"R@{k}",
        "per_class": [(label, asked[label], right[label]) for label in sorted(asked)],
        "confusions": [(*pair, times) for pair, times in taken.most_common()],
    })  # fmt: skip


def worst_first(hit, right, similarities, labels):
    """Queries in order: of every class the worst, then of every class the next. Worst is a miss,
    then one with few `right` [Q, top], then one whose nearest is near."""
    order = np.lexsort((-similarities.max(axis=1, initial=-1), right.sum(axis=1), hit))
    seen, rank = Counter(), np.empty(len(order), int)
    for query in order:
        rank[query] = seen[labels[query]]
        seen[labels[query]] += 1
    return order[np.argsort(rank[order], kind="stable")]
