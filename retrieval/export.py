"""Embeddings, with what is known of their images, as files that other programs read."""

import os
from itertools import islice
from pathlib import Path

import numpy as np

from storage import replacing
from utils import plural, progress

EMBEDDING_FILES = {".npz": (), ".parquet": ("pyarrow",)}  # what each needs
ROW_GROUP = 100  # images whose files are in memory at once


def needs_neighbours(path):
    """Whether they are part of the file; to search for them takes minutes at SOP's size."""
    return Path(path).suffix.lower() == ".parquet"


def export(path, embeddings, images, hits, near):
    """Write an ImageSet and its embeddings [N, d]; for .parquet, hits: {k: [Q]} of hits_at_k, and
    near: of `neighbours`."""
    out = Path(path).resolve()
    if needs_neighbours(out):
        write_parquet(out, embeddings, images, hits, near)
    else:
        write_npz(out, embeddings, images)
    print(f"{path}: {plural(len(images), 'embedding')} of {embeddings.shape[1]} dimensions")


def write_npz(path, embeddings, images):
    """For numpy.load: embeddings [N, d], labels [N], classes [C], paths [N]; where there is a
    gallery, queries too: how many images come before it."""
    queries = {} if images.queries is None else {"queries": images.queries}
    with replacing(path) as new, open(new, "wb") as file:
        np.savez(
            file, embeddings=embeddings.cpu().numpy(), labels=images.labels.numpy(),
            classes=np.array(images.classes), paths=np.array(images.paths), **queries,
        )  # fmt: skip


def write_parquet(path, embeddings, images, hits, near):
    """A row for each image; `hit@K` and `neighbours` are null for a gallery's."""
    import pyarrow as pa  # only this needs it
    from pyarrow.parquet import ParquetWriter

    neighbour = pa.struct({"path": pa.string(), "similarity": pa.float32()})
    schema = pa.schema({
        "path": pa.string(), "class": pa.string(), "label": pa.int64(), "split": pa.string(),
        **{f"hit@{k}": pa.bool_() for k in hits}, "neighbours": pa.list_(neighbour),
        "embedding": pa.list_(pa.float32(), embeddings.shape[1]),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    })  # fmt: skip
    found = rows(embeddings, images, hits, *near)
    groups = range(0, len(images), ROW_GROUP)
    with replacing(path) as new, ParquetWriter(new, schema) as writer:
        for _ in progress(groups, len(groups), "writing"):
            writer.write_table(pa.Table.from_pylist(list(islice(found, ROW_GROUP)), schema))


def rows(embeddings, images, hits, similarities, indices):
    """{column: value} of each image; `image` is its file, as Hugging Face's data sets have it."""
    hits = {f"hit@{k}": hit.tolist() for k, hit in hits.items()}
    embeddings, labels, queries = embeddings.cpu().numpy(), images.labels.tolist(), images.queries
    similarities, indices = similarities.tolist(), indices.tolist()
    names = [text(path) for path in images.paths]
    for i, (path, name, label) in enumerate(zip(images.paths, names, labels)):
        row = {
            "path": name, "class": text(images.classes[label]), "label": label,
            "split": "test" if queries is None else "query" if i < queries else "gallery",
            "embedding": embeddings[i],
            "image": {"bytes": Path(path).read_bytes(), "path": os.path.basename(name)},
        }  # fmt: skip
        if i < len(indices):
            row |= {column: hit[i] for column, hit in hits.items()}
            row["neighbours"] = [
                {"path": names[j], "similarity": s} for j, s in zip(indices[i], similarities[i])
            ]
        yield row


def text(name):
    """A file's name as Unicode, which it need not be."""
    return os.fsencode(name).decode(errors="backslashreplace")
