"""Nearest neighbours of images: python search.py --resume RUN --gallery DIR --query A.jpg B.jpg"""

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataset import table
from dataset.files import SUFFIXES, is_leftover
from dataset.images import ImageSet
from flags import PRECISION_HELP, PRECISIONS, Parser, at_least
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
    add("--batch-size", default=150, type=at_least(1), help="images a batch")
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    add("--precision", choices=PRECISIONS, help=f"{PRECISION_HELP}; by default as in training")
    add("--gpu-id", default=0, type=at_least(-1), help="which GPU; -1 for the only one")
    return parser


def files_of(gallery):
    """The paths of a gallery's images: a list's, or a folder's, those in folders of it too."""
    if str(gallery).lower().endswith(table.SUFFIXES):
        splits = table.read(gallery, all_there=False)
        return [path for items in splits.values() for path, _ in items]
    if not os.path.isdir(gallery):
        raise UserError(f"--gallery {gallery}: no such folder, list or index")
    found = (path for path in Path(gallery).rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(str(path) for path in found if not is_leftover(path))


def embed_files(paths, model, batch_size, loading):
    """(embeddings [n, d] on the CPU, indices [n] of the files that could be read); the others are
    named."""
    if not paths:
        return torch.empty(0, model.embedding_size), []
    loader = test_loader(ImageSet([(path, "") for path in paths]), batch_size, loading)
    kept = ((pixels, index) for pixels, _, index in batches(loader, loading.device, skip=True))
    embeddings, index = embed(model, progress(kept, len(loader), "embedding"))
    return embeddings.cpu(), index.tolist()


def open_index(path, checkpoint):
    """An index's arrays; UserError for a file that is none, or one of another checkpoint."""
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {name: file[name] for name in ("embeddings", "paths", "stamps", "source",
                                                   "checkpoint")}  # fmt: skip
    except Exception as error:  # numpy and zipfile fail in many ways
        raise UserError(f"{path}: not an index that can be read ({error})") from error
    if str(index["checkpoint"]) != checkpoint:
        raise UserError(
            f"{path}: an index of another checkpoint or --precision; embed the gallery again with "
            f"--gallery {index['source']} and another --save-index"
        )
    return index


def gallery_of(args, checkpoint, embed_paths):
    """(paths, embeddings [M, d]) of the gallery; what an index holds is not embedded again."""
    file, source, index = args.save_index, os.path.abspath(args.gallery), None
    if source.lower().endswith(".npz"):
        file = file or source
        index = open_index(source, checkpoint)
        source = str(index["source"])
    elif file and os.path.exists(file):
        index = open_index(file, checkpoint)
    known = {}
    if index:
        keys = zip(index["paths"].tolist(), map(tuple, index["stamps"].tolist()))
        known = {key: row for row, key in enumerate(keys)}
    listed = [(path, stamp_of(path)) for path in files_of(source)]
    keys = [(path, stamp) for path, stamp in listed if stamp]
    new = [key for key in keys if key not in known]
    embedded, kept = embed_paths([path for path, _ in new])
    fresh = {new[i]: row for row, i in enumerate(kept)}
    keys = [key for key in keys if key in known or key in fresh]
    if not keys:
        raise UserError(f"--gallery {args.gallery}: no image in it can be read")
    paths = [path for path, _ in keys]
    print(f"gallery: {plural(len(paths), 'image')}, {len(kept):,} of them embedded now; "
          f"{len(listed) - len(paths):,} skipped")  # fmt: skip
    unchanged = keys == [*known]
    if unchanged:
        embeddings = torch.from_numpy(index["embeddings"])
    else:
        embeddings = torch.empty(len(keys), embedded.shape[1])
        for row, key in enumerate(keys):
            x = embedded[fresh[key]] if key in fresh else index["embeddings"][known[key]]
            embeddings[row] = torch.as_tensor(x)
    if file and not (unchanged and os.path.exists(file)):
        stamps = np.array([stamp for _, stamp in keys])
        with replacing(Path(file).resolve()) as new, open(new, "wb") as out:
            np.savez(out, embeddings=embeddings.numpy(), paths=np.array(paths), stamps=stamps,
                     source=source, checkpoint=checkpoint)  # fmt: skip
    return paths, embeddings


def stamp_of(path):
    """By which a changed file is known; None of one that is not there."""
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
    identity = hashlib.sha256(data).hexdigest()
    if model.precision != "fp32":
        identity += f" {model.precision}"  # an index's embeddings are of one precision

    size = checkpoint.get("args", {}).get("image_size", 224)
    loading = Loading(size, args.workers, device, model.interpolation)
    embed_paths = partial(embed_files, model=model, batch_size=args.batch_size, loading=loading)
    queries, kept = embed_paths(args.query)
    if len(kept) < len(args.query):
        raise UserError("--query: not an image, as said above")
    paths, gallery = gallery_of(args, identity, embed_paths)
    similarities, indices = nearest(queries, gallery, args.top)
    results = [
        {"query": query, "neighbours": [
            {"path": paths[index], "similarity": similarity}
            for similarity, index in zip(row.tolist(), found.tolist())
        ]}
        for query, row, found in zip(args.query, similarities, indices)
    ]  # fmt: skip
    for result in results:
        print(result["query"])
        for rank, found in enumerate(result["neighbours"], start=1):
            print(f"{rank:4d}  {found['similarity']:.4f}  {found['path']}")
    if args.json:
        write_json(Path(args.json).resolve(), results)
    if args.page:
        write_atomically(Path(args.page).resolve(), search_page(results))
        print(f"{args.page}: to look at in a browser")


if __name__ == "__main__":
    run(main)
