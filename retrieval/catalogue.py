"""A gallery of any size: its images, the index that is kept of it, its export in parts."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataset import table
from dataset.files import PACKAGES, SUFFIXES, is_leftover
from distributed import from_rank_0, round_robin
from retrieval.export import as_unicode
from storage import replacing, write_json
from utils import UserError, is_rank_0, plural, warn

INDEX = ("embeddings", "paths", "stamps", "source", "checkpoint")  # arrays of an index


def items_of(gallery):
    """[(path, label or "")] of a gallery's images: of a list, or all in and below a folder."""
    if gallery.lower().endswith(table.SUFFIXES):
        return table.read_gallery(gallery)
    if not os.path.isdir(gallery):
        raise UserError(f"--gallery {gallery}: no such folder, list or index")
    suffixes = SUFFIXES | PACKAGES.keys()
    paths = (path for path in Path(gallery).rglob("*") if path.suffix.lower() in suffixes)
    return sorted((str(path), "") for path in paths if not is_leftover(path))


def stamp_of(path):
    """What changes when the file does; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError as error:
        warn(f"skipped {path}: {error.strerror}")
        return None
    return status.st_size, status.st_mtime_ns


def open_index(path, identity):
    """{name: array} of an index; `identity`: of the network that it must be of."""
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {name: file[name] for name in {*INDEX, *file.files}}
    except Exception as error:  # numpy and zipfile fail in many ways
        raise UserError(f"{path}: not an index that can be read ({error})") from error
    if str(index["checkpoint"]) != identity:
        run = f" (it was made with {index['run']})" if "run" in index else ""
        raise UserError(
            f"{path}: an index of another checkpoint, --precision or --background{run}; embed the "
            f"gallery again with --gallery {index['source']} and another "
            "--save-index, or with --overwrite"
        )
    return index


def read_gallery(gallery, file, network, embed_paths, overwrite):
    """(items, embeddings [M, d] of them). Embeds only what is not in the index; `file`: where to
    keep that, or None. network: {"checkpoint": its identity, "run": its path}."""
    file, source = file and os.path.abspath(file), os.path.abspath(gallery)
    loaded = source if source.lower().endswith(".npz") else None
    if loaded:
        index = open_index(loaded, network["checkpoint"])
        file, source = file or loaded, str(index["source"])
    if file and file != loaded and os.path.exists(file) and not overwrite:
        index, loaded = open_index(file, network["checkpoint"]), file
        if str(index["source"]) != source:
            raise UserError(f"--save-index {file}: holds another gallery, {index['source']}; name "
                            "another file, or replace it with --overwrite")  # fmt: skip
    known = {}
    if loaded:
        keys = zip(index["paths"].tolist(), map(tuple, index["stamps"].tolist()))
        known = dict(zip(keys, index["embeddings"]))
    items = items_of(source)
    files = [(path, stamp_of(path)) for path, _ in items]
    new = [key for key in files if key[1] and key not in known]
    embedded, readable = embed_paths([path for path, _ in new])
    rows = known | {new[i]: row for i, row in zip(readable, embedded.numpy())}
    kept = [i for i, key in enumerate(files) if key in rows]
    if not kept:
        raise UserError(f"--gallery {gallery}: no image in it can be read")
    print(f"gallery: {plural(len(kept), 'image')}, {len(readable):,} of them embedded now; "
          f"{len(files) - len(kept):,} skipped")  # fmt: skip
    keys = [files[i] for i in kept]
    unchanged = keys == [*known]
    embeddings = index["embeddings"] if unchanged else np.stack([rows[key] for key in keys])
    if file and not (unchanged and file == loaded):
        paths, stamps = zip(*keys)
        with replacing(Path(file).resolve()) as temporary, open(temporary, "wb") as out:
            np.savez(out, embeddings=embeddings, paths=np.array(paths), stamps=np.array(stamps),
                     source=source, **network)  # fmt: skip
    return [items[i] for i in kept], torch.from_numpy(embeddings)


def export_parts(out, gallery, network, part_size, embed_paths, overwrite):
    """Write OUT.part-00000.parquet, or .npz, and on, each of `part_size` images. A part is written
    whole or not at all, so those that exist are done; each rank writes its share of the rest. What
    they are of is kept in OUT.parquet.json, and must be the same for an export to go on."""
    out, gallery = Path(out).resolve(), os.path.abspath(gallery)
    items, digest = items_of(gallery), hashlib.sha256()
    for item in items:
        digest.update("\t".join((*item, "\n")).encode(errors="surrogateescape"))
    plan = {"gallery": gallery, **network, "part_size": part_size, "images": len(items),
            "list": digest.hexdigest()}  # fmt: skip
    count = -(-len(items) // part_size)
    agreed, missing = from_rank_0(partial(claim, out, plan, count, overwrite))
    if agreed != plan:
        raise UserError(f"--gallery {gallery}: this process finds other images in it than the "
                        "first one")  # fmt: skip
    written, skipped, mine = 0, 0, round_robin(missing)
    for number in mine:
        rows = items[number * part_size : (number + 1) * part_size]
        label = f"part {number + 1} of {count}"
        embeddings, readable = embed_paths([path for path, _ in rows], label=label)
        write_part(part_of(out, number), [rows[i] for i in readable], embeddings.numpy())
        written, skipped = written + len(readable), skipped + len(rows) - len(readable)
    # each rank by itself: one that waited for a slower one could wait too long
    done = f"{count:,} in all, {count - len(missing):,} were there" if is_rank_0() else "its share"
    print(f"{part_of(out, 0)} and on: {plural(len(mine), 'part')} written, {done}; "
          f"{plural(written, 'embedding')}, {skipped:,} skipped", flush=True)  # fmt: skip


def part_of(out, number):
    return out.with_name(f"{out.stem}.part-{number:05d}{out.suffix}")


def claim(out, plan, count, overwrite):
    """(plan, [numbers of the parts to write]). UserError if other parts are in their place."""
    file = out.with_name(f"{out.name}.json")
    begins = f"{out.stem}.part-"
    there = [path for path in out.parent.iterdir()
             if path.name.startswith(begins) and path.suffix == out.suffix]  # fmt: skip
    if overwrite:
        for path in there:
            path.unlink()
    elif file.exists() or there:
        try:
            stored = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read, so it is not known what the parts beside it "
                            "are of; start anew with --overwrite") from error  # fmt: skip
        other = [name for name in plan if name != "run" and stored.get(name) != plan[name]]
        if other:
            raise UserError(f"{file}: the parts beside it are of another {' and '.join(other)}; "
                            "name another file, or start anew with --overwrite")  # fmt: skip
    write_json(file, plan)
    return plan, [number for number in range(count) if not part_of(out, number).exists()]


def write_part(path, items, embeddings):
    """path, class (null or "" where there is none) and embedding of each image."""
    paths, labels = [path for path, _ in items], [label for _, label in items]
    with replacing(path) as new:
        if path.suffix.lower() == ".npz":
            with open(new, "wb") as file:
                np.savez(file, embeddings=embeddings, paths=np.array(paths, str),
                         class_names=np.array(labels, str))  # fmt: skip
            return
        import pyarrow as pa  # only this needs it
        from pyarrow.parquet import write_table

        flat = pa.array(embeddings.reshape(-1))
        write_table(pa.table({
            "path": pa.array([as_unicode(path) for path in paths], pa.string()),
            "class": pa.array([label or None for label in labels], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]),
        }), new)  # fmt: skip
