"""Embeddings, with paths, classes and neighbours, as files that other programs read."""

import os
from itertools import islice
from pathlib import Path

import numpy as np

from storage import replacing
from utils import plural, progress

EMBEDDING_FILES = {".npz": (), ".parquet": ("pyarrow",)}  # and the packages they need
ROW_GROUP = 100  # images whose files are in memory at once


def export(path, images, retrieved, neighbours):
    """Write the embeddings of an ImageSet; .parquet also has hits, neighbours and image files."""
    out = Path(path).resolve()
    if out.suffix.lower() == ".parquet":
        write_parquet(out, images, retrieved, neighbours)
    else:
        write_npz(out, images, retrieved.embeddings)
    print(f"{path}: {plural(len(images), 'embedding')} of {retrieved.embeddings.shape[1]} "
          "dimensions")  # fmt: skip


def write_npz(path, images, embeddings):
    """embeddings [N, d], labels [N], classes [C], paths [N]; with a gallery, how many `queries`."""
    queries = {} if images.queries is None else {"queries": images.queries}
    with replacing(path) as new, open(new, "wb") as file:
        np.savez(
            file, embeddings=embeddings.cpu().numpy(), labels=images.labels.numpy(),
            classes=np.array(images.classes), paths=np.array(images.paths), **queries,
        )  # fmt: skip


def write_parquet(path, images, retrieved, neighbours):
    """A row for each image; `hit@K` and `neighbours` are null for a gallery's."""
    import pyarrow as pa  # not among the requirements
    from pyarrow.parquet import ParquetWriter

    neighbour = pa.struct({"path": pa.string(), "similarity": pa.float32()})
    schema = pa.schema({
        "path": pa.string(), "class": pa.string(), "label": pa.int64(), "split": pa.string(),
        **{f"hit@{k}": pa.bool_() for k in retrieved.hits}, "neighbours": pa.list_(neighbour),
        "embedding": pa.list_(pa.float32(), retrieved.embeddings.shape[1]),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    })  # fmt: skip
    all_rows = rows(images, retrieved, neighbours)
    groups = range(0, len(images), ROW_GROUP)
    with replacing(path) as new, ParquetWriter(new, schema) as writer:
        for _ in progress(groups, len(groups), "writing"):
            writer.write_table(pa.Table.from_pylist(list(islice(all_rows, ROW_GROUP)), schema))


def rows(images, retrieved, neighbours):
    """{column: value} of each image; `image` has its file as Hugging Face's data sets do."""
    hits = {f"hit@{k}": hit.tolist() for k, hit in retrieved.hits.items()}
    embeddings, labels = retrieved.embeddings.cpu().numpy(), images.labels.tolist()
    similarities, indices = (part.tolist() for part in neighbours)
    names = [as_unicode(path) for path in images.paths]
    for i, (path, name, label) in enumerate(zip(images.paths, names, labels)):
        is_query = i < len(indices)
        row = {
            "path": name, "class": as_unicode(images.classes[label]), "label": label,
            "split": "test" if images.queries is None else "query" if is_query else "gallery",
            "embedding": embeddings[i],
            "image": {"bytes": Path(path).read_bytes(), "path": os.path.basename(name)},
        }  # fmt: skip
        if is_query:
            row |= {column: hit[i] for column, hit in hits.items()}
            row["neighbours"] = [
                {"path": names[j], "similarity": s} for j, s in zip(indices[i], similarities[i])
            ]
        yield row


def as_unicode(name):
    """A file's name, which can be in any encoding, as text."""
    return os.fsencode(name).decode(errors="backslashreplace")
