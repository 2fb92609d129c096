"""Pages of pictures that open from a file, without a network: page.html with its data."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np

from dataset.files import opened
from retrieval.search import neighbours
from utils import UserError, progress

TOP = 8  # neighbours of a query
SIDE = 112  # pixels of a picture's longer side
MAX_BYTES = 12 * 10**6  # of all pictures in a page, as text


class Pictures:
    """Small copies of images, each kept once: `add` gives the number of a path's."""

    def __init__(self):
        self.number, self.texts, self.bytes = {}, [], 0

    def add(self, path):
        if path not in self.number:
            self.number[path] = len(self.texts)
            self.texts.append(base64.b64encode(small_jpeg(path)).decode())
            self.bytes += len(self.texts[-1])
        return self.number[path]

    def data(self):
        """For the page: a picture is called by its file and its folder."""
        names = ["/".join(path.split("/")[-2:]) for path in self.number]
        return {"pictures": self.texts, "names": names}


def small_jpeg(path):
    """Bytes, about 3 kB; none of a file that is no longer there or is damaged."""
    buffer = io.BytesIO()
    try:
        with opened(path) as image:
            image.thumbnail((SIDE, SIDE))  # asks a JPEG's decoder for no more than that
            image.convert("RGB").save(buffer, "JPEG", quality=75)
    except UserError:
        return b""
    return buffer.getvalue()


def write_page(data):
    """page.html with `data` in it, as bytes."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no </script> in a name
    return page.replace("DATA", text, 1).encode(errors="replace")


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
        "title": "Nearest neighbours", "about": "", "note": "", "recalls": [], "curves": None,
        "classes": [], "queries": queries, **pictures.data(),
    })  # fmt: skip


def results_page(title, about, recalls, images, embeddings, hits, curves=None):
    """The page's bytes: what `recalls`, {row: {metric: per cent}}, come from, query by query.

    images: the ImageSet that embeddings [N, d] are of; hits: {k: [Q]} of hits_at_k; curves: a PNG's
    bytes.
    """
    labels, count = images.labels.numpy(), images.queries or len(images)
    similarities, indices = (part.numpy() for part in neighbours(embeddings, TOP, images.queries))
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
        (label, other) for label, other in zip(labels[:count].tolist(), found[:, 0].tolist())
        if label != other
    )  # fmt: skip
    note = (
        f"{len(queries):,} of {count:,} queries: of each class the worst one, then of each the "
        "next. ✓ and a line: of the query's class; ✗ and dashes: of another."
    )
    return write_page({
        "title": title, "about": about, "note": note, "recalls": list(recalls.items()),
        "curves": curves and base64.b64encode(curves).decode(), "classes": images.classes,
        "queries": queries, **pictures.data(), "metric": f"R@{k}",
        "per_class": [(label, asked[label], right[label]) for label in sorted(asked)],
        "confusions": [(*pair, times) for pair, times in taken.most_common()],
    })  # fmt: skip


def worst_first(hit, right, similarities, labels):
    """Queries in order: of every class the worst, then of every class the next. Worst is a miss,
    then one with few `right` [Q, TOP], then one whose nearest is near."""
    order = np.lexsort((-similarities[:, 0], right.sum(axis=1), hit))
    seen, rank = Counter(), np.empty(len(order), int)
    for query in order:
        rank[query] = seen[labels[query]]
        seen[labels[query]] += 1
    return order[np.argsort(rank[order], kind="stable")]
