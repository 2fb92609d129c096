"""Nearest neighbours of images: python search.py --resume RUN --gallery DIR --query A.jpg B.jpg"""

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataset import table
from dataset.files import PACKAGES, SUFFIXES, WHITE, is_leftover
from dataset.images import ImageSet
from flags import PRECISION_HELP, PRECISIONS, Parser, at_least, colour
from loading.loader import Loading, batches, test_loader
from net import network_from
from retrieval.embed import embed
from retrieval.page import search_page
from retrieval.search import nearest
from runs.folder import checkpoint_in
from storage import (
    checkpoint_from,
    read_bytes,
    replacing,
    require_format,
    require_writable,
    write_atomically,
    write_json,
)
from utils import UserError, choose_device, plural, progress, run, set_precision, warn

INDEX = ("embeddings", "paths", "stamps", "source", "checkpoint")  # arrays of an index


def build_parser():
    parser = Parser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--resume", required=True, metavar="CHECKPOINT", help="a checkpoint or a run folder")
    add("--gallery", required=True, metavar="PATH",
        help="where to search: a folder, a .csv or .tsv list, or an index")  # fmt: skip
    add("--query", required=True, nargs="+", metavar="FILE", help="images to find others like")
    add("--top", default=10, type=at_least(1), help="neighbours a query")
    add("--save-index", metavar="PATH",
        help="keep the gallery's embeddings in this .npz; used again, only new and changed files "
        "are embedded")  # fmt: skip
    add("--json", metavar="PATH", help="also write the neighbours to this file")
    add("--page", metavar="PATH", help="also write them with pictures to this .html")
    add("--background", type=colour, metavar="COLOUR",
        help="put under what is transparent: a name or #rrggbb; by default as in training, or "
        "white")  # fmt: skip
    add("--batch-size", default=150, type=at_least(1), help="images a batch")
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    add("--precision", choices=PRECISIONS, help=f"{PRECISION_HELP}; by default as in training")
    add("--gpu-id", default=0, type=at_least(-1), help="which GPU; -1 for the only one")
    return parser


def files_of(gallery):
    """The paths of a gallery's images: those of a list, or all in and below a folder."""
    if gallery.lower().endswith(table.SUFFIXES):
        splits = table.read(gallery, all_there=False)
        return [path for items in splits.values() for path, _ in items]
    if not os.path.isdir(gallery):
        raise UserError(f"--gallery {gallery}: no such folder, list or index")
    suffixes = SUFFIXES | PACKAGES.keys()
    paths = (path for path in Path(gallery).rglob("*") if path.suffix.lower() in suffixes)
    return sorted(str(path) for path in paths if not is_leftover(path))


def embed_files(paths, model, batch_size, loading, background):
    """(embeddings [n, d] on the CPU, indices [n] of the files that could be read)."""
    if not paths:
        return torch.empty(0, model.embedding_size), []
    images = ImageSet([(path, "") for path in paths], background=background)
    loader = test_loader(images, batch_size, loading)
    readable = batches(loader, loading.device, skip=True)
    indexed = ((pixels, index) for pixels, _, index in readable)
    embeddings, indices = embed(model, progress(indexed, len(loader), "embedding"))
    return embeddings.cpu(), indices.tolist()


def open_index(path, checkpoint):
    """{name: array} of an index that was made with this checkpoint."""
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {name: file[name] for name in INDEX}
    except Exception as error:  # numpy and zipfile fail in many ways
        raise UserError(f"{path}: not an index that can be read ({error})") from error
    if str(index["checkpoint"]) != checkpoint:
        raise UserError(
            f"{path}: an index of another checkpoint, --precision or --background; embed the "
            f"gallery again with --gallery {index['source']} and another --save-index"
        )
    return index


def read_gallery(args, checkpoint, embed_paths):
    """(paths, embeddings [M, d]) of the gallery. Embeds only what is not in the index."""
    source, file, known = os.path.abspath(args.gallery), args.save_index, {}
    stored = source if source.lower().endswith(".npz") else file
    file = file or stored
    if stored == source or stored and os.path.exists(stored):
        index = open_index(stored, checkpoint)
        source = str(index["source"]) if stored == source else source
        keys = zip(index["paths"].tolist(), map(tuple, index["stamps"].tolist()))
        known = dict(zip(keys, index["embeddings"]))
    files = [(path, stamp_of(path)) for path in files_of(source)]
    new = [key for key in files if key[1] and key not in known]
    embedded, readable = embed_paths([path for path, _ in new])
    rows = known | {new[i]: row for i, row in zip(readable, embedded.numpy())}
    keys = [key for key in files if key in rows]
    if not keys:
        raise UserError(f"--gallery {args.gallery}: no image in it can be read")
    print(f"gallery: {plural(len(keys), 'image')}, {len(readable):,} of them embedded now; "
          f"{len(files) - len(keys):,} skipped")  # fmt: skip
    paths, stamps = zip(*keys)
    unchanged = keys == [*known]
    embeddings = index["embeddings"] if unchanged else np.stack([rows[key] for key in keys])
    if file and not (unchanged and os.path.exists(file)):
        with replacing(Path(file).resolve()) as temporary, open(temporary, "wb") as out:
            np.savez(out, embeddings=embeddings, paths=np.array(paths), stamps=np.array(stamps),
                     source=source, checkpoint=checkpoint)  # fmt: skip
    return paths, torch.from_numpy(embeddings)


def stamp_of(path):
    """What changes when the file does; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError as error:
        warn(f"skipped {path}: {error.strerror}")
        return None
    return status.st_size, status.st_mtime_ns


def main(argv=None):
    args = build_parser().parse_args(argv)
    require_writable(args, "json", "page", "save_index")
    require_format(args, save_index={".npz": ()})
    device = choose_device(args.gpu_id)
    path = checkpoint_in(args.resume)
    data = read_bytes(path)
    checkpoint = checkpoint_from(data, path)
    model = network_from(checkpoint, path, precision=args.precision).to(device)
    set_precision(model.precision)
    theirs = checkpoint.get("args", {})
    background = args.background or theirs.get("background") or WHITE
    identity = f"{hashlib.sha256(data).hexdigest()} {model.precision} {background}"

    loading = Loading(theirs.get("image_size", 224), args.workers, device, model.interpolation)
    embed_paths = partial(embed_files, model=model, batch_size=args.batch_size, loading=loading,
                          background=background)  # fmt: skip
    queries, readable = embed_paths(args.query)
    if len(readable) < len(args.query):
        raise UserError("--query: not an image, as said above")
    paths, gallery = read_gallery(args, identity, embed_paths)
    results = []
    similarities, indices = (x.tolist() for x in nearest(queries, gallery, args.top))
    for query, *ranked in zip(args.query, similarities, indices):
        neighbours = [{"path": paths[index], "similarity": s} for s, index in zip(*ranked)]
        results.append({"query": query, "neighbours": neighbours})
        print(query)
        for place, neighbour in enumerate(neighbours, start=1):
            print(f"{place:4d}  {neighbour['similarity']:.4f}  {neighbour['path']}")
    if args.json:
        write_json(Path(args.json).resolve(), results)
    if args.page:
        write_atomically(Path(args.page).resolve(), search_page(results, background))
        print(f"{args.page}: to look at in a browser")


if __name__ == "__main__":
    run(main)
