"""Nearest neighbours of images: python search.py RUN --gallery DIR --query A.jpg B.jpg

Also a gallery's duplicates (--duplicates), and its embeddings in files (--export).
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import torch

from dataset.files import WHITE
from dataset.images import ImageSet
from distributed import init_processes, world_size
from flags import GPU_HELP, PRECISION_HELP, PRECISIONS, Parser, at_least, colour
from loading.loader import Loading, batches, test_loader
from net import network_from
from retrieval.catalogue import export_parts, read_gallery
from retrieval.embed import embed
from retrieval.export import EMBEDDING_FILES
from retrieval.page import pictures_page
from retrieval.search import duplicates, nearest
from runs.folder import CALIBRATION, checkpoint_in
from storage import (
    checkpoint_from,
    read_bytes,
    require_format,
    require_writable,
    write_atomically,
    write_json,
)
from utils import UserError, plural, progress, run, set_precision, warn

ROUNDING = 1e-6  # equal images have a cosine of 1, but for float32's rounding
ON_PAGE = 48  # images shown of a group of duplicates

USAGE = """python search.py RUN --gallery DIR and one of these:
  --query A.jpg B.jpg    what is like these pictures
  --duplicates           what the gallery has more than once
  --save-index OUT.npz   keep the embeddings for later searches
  --export OUT.parquet   write the embeddings in parts, for a database"""


def build_parser():
    parser = Parser(description=__doc__.split(":")[0], usage=USAGE)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="a checkpoint, a run folder, or a folder of run folders")
    add("--resume", metavar="CHECKPOINT", help="the same as the argument")
    add("--gallery", required=True, metavar="PATH",
        help="the images to search: a folder, a .csv or .tsv list, or an index")  # fmt: skip
    what = parser.add_mutually_exclusive_group().add_argument
    what("--query", nargs="+", metavar="FILE", help="images whose neighbours are wanted")
    what("--duplicates", action="store_true",
         help="list the groups of images in the gallery that are at or above the threshold")
    what("--export", metavar="PATH",
         help="write the gallery's embeddings to .parquet or .npz files, named PATH with "
         ".part-00000 and so on; a second call writes the missing ones; torchrun shares the work")
    add("--top", default=10, type=at_least(1), help="neighbours of each query")
    add("--min-similarity", type=at_least(-1, float, 1), metavar="S",
        help="cosine from which images count as the same; by default evaluate.py --calibrate's")
    add("--save-index", metavar="PATH",
        help="keep the gallery's embeddings in this .npz; a second call embeds only new and "
        "changed files")  # fmt: skip
    add("--part-size", default=10_000, type=at_least(1), help="images in a part of --export")
    add("--overwrite", action="store_true",
        help="--save-index and --export replace files of another gallery or checkpoint")
    add("--json", metavar="PATH", help="also write what is found to this file")
    add("--page", metavar="PATH", help="also write what is found, with its pictures, to this .html")
    add("--background", type=colour, metavar="COLOUR",
        help="colour under transparent pixels, a name or #rrggbb; by default as in training")
    add("--batch-size", default=150, type=at_least(1), help="images in a batch")
    add("--workers", default=4, type=at_least(0), help="processes that load images")
    add("--precision", choices=PRECISIONS, help=f"{PRECISION_HELP}; by default as in training")
    add("--gpu-id", type=at_least(-1), help=GPU_HELP)
    return parser


def checked_flags(argv):
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.resume):
        parser.error("name one checkpoint or run folder")
    if not (args.query or args.duplicates or args.export or args.save_index):
        parser.error("say what for: --query, --duplicates, --export or --save-index")
    if (args.json or args.page) and not (args.query or args.duplicates):
        parser.error("--json and --page need --query or --duplicates")
    if args.export and (args.save_index or args.gallery.lower().endswith(".npz")):
        parser.error("--export embeds a folder or a list; an index is a file of its own")
    require_writable(args, "json", "page", "save_index", "export")
    require_format(args, save_index={".npz": ()}, export=EMBEDDING_FILES)
    return args


def threshold_of(args, checkpoint):
    """(threshold, in words): --min-similarity, or what evaluate.py --calibrate found for this
    checkpoint; else (None, "")."""
    if not (args.query or args.duplicates):
        return None, ""
    if args.min_similarity is not None:
        return args.min_similarity, f"{args.min_similarity:g} (--min-similarity)"
    file, name = Path(checkpoint).with_name(CALIBRATION), Path(checkpoint).name
    if file.exists():
        try:
            calibration = json.loads(file.read_text())
            threshold, rate = calibration["threshold"], calibration["fmr"]
            of = calibration["computed_on"]["checkpoint"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{file}: not a calibration that can be read; repeat evaluate.py "
                            "--calibrate, or give --min-similarity") from error  # fmt: skip
        if of == name:
            return threshold, f"{threshold:.4f} ({file}, false match rate {rate:g})"
        warn(f"{file}: not used; its threshold is of {of}, this search is with {name}")
    if args.duplicates:
        raise UserError("--duplicates: needs a threshold; give --min-similarity, such as 0.95, or "
                        f"have evaluate.py --calibrate compute that of {name}")  # fmt: skip
    return None, ""


def embedder(args, path, device):
    """(embed_files with the network of a checkpoint, {what an index keeps of that}, background)."""
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
    return embed_paths, {"checkpoint": identity, "run": os.path.abspath(path)}, background


def embed_files(paths, model, batch_size, loading, background, label="embedding"):
    """(embeddings [n, d] on the CPU, indices [n] of the files that could be read)."""
    if not paths:
        return torch.empty(0, model.embedding_size), []
    images = ImageSet([(path, "") for path in paths], background=background)
    loader = test_loader(images, batch_size, loading, rows=range(len(images)))
    readable = batches(loader, loading.device, skip=True)
    indexed = ((pixels, index) for pixels, _, index in readable)
    embeddings, indices = embed(model, progress(indexed, len(loader), label))
    return embeddings.cpu(), indices.tolist()


def answer(queries, embedded, items, gallery, top, threshold):
    """Prints each query's neighbours; returns (what --json has, rows of a page)."""
    results, rows = [], []
    similarities, indices = (x.tolist() for x in nearest(embedded, gallery, top))
    for query, *ranked in zip(queries, similarities, indices):
        found = [{"path": items[i][0], "similarity": s} for s, i in zip(*ranked)]
        if threshold is not None:
            for each in found:
                each["above"] = each["similarity"] >= threshold - ROUNDING
        note = "" if found[0].get("above", True) else "nothing like it"
        print(f"{query}: {note}" if note else query)
        for place, each in enumerate(found, start=1):
            mark = {None: "", True: "above  ", False: "below  "}[each.get("above")]
            print(f"{place:4d}  {each['similarity']:.4f}  {mark}{each['path']}")
        results.append({"query": query, "threshold": threshold, "neighbours": found})
        rows.append((query, note, found))
    return results, rows


def list_duplicates(items, gallery, threshold):
    """Prints the groups; returns (what --json has, rows of a page)."""
    groups, rows = [], []
    for indices, similarities in duplicates(gallery, threshold - ROUNDING):
        images = [{"path": items[i][0], "class": items[i][1] or None, "similarity": s}
                  for i, s in zip(indices.tolist(), similarities.tolist())]  # fmt: skip
        classes = sorted({each["class"] for each in images} - {None})
        note = plural(len(images), "image")
        if classes:
            note += f" of {plural(len(classes), 'class')}: {', '.join(classes)}"
        print(f"group {len(groups) + 1}: {note}")
        for each in images:
            label = f"{each['class']}  " if each["class"] else ""
            print(f"  {each['similarity']:.4f}  {label}{each['path']}")
        groups.append({"classes": classes, "images": images})
        rows.append((images[0]["path"], note, images[1:ON_PAGE]))
    total = sum(len(group["images"]) for group in groups)
    mixed = sum(len(group["classes"]) > 1 for group in groups)
    print(f"duplicates: {plural(len(groups), 'group')} with {total:,} of the "
          f"{plural(len(items), 'image')}"
          + (f"; {mixed:,} with several classes" if mixed else ""))  # fmt: skip
    return groups, rows


def main(argv=None):
    args = checked_flags(argv)
    device = init_processes(args.gpu_id)
    if world_size() > 1 and not args.export:
        raise UserError("several processes are for --export alone; leave torchrun out")
    path = checkpoint_in(args.checkpoint or args.resume)
    threshold, words = threshold_of(args, path)
    embed_paths, network, background = embedder(args, path, device)
    if args.export:
        return export_parts(args.export, args.gallery, network, args.part_size, embed_paths,
                            args.overwrite)  # fmt: skip
    queries, readable = embed_paths(args.query or [])
    if args.query and not readable:
        raise UserError("--query: not an image, as said above")
    items, gallery = read_gallery(args.gallery, args.save_index, network, embed_paths,
                                  args.overwrite)  # fmt: skip
    if words:
        print(f"threshold: {words}")
    if args.duplicates:
        title, note = "Duplicates", f"Groups of images at or above {words}."
        found, rows = list_duplicates(items, gallery.to(device), threshold)
    else:
        title = "Nearest neighbours"
        note = words and f"✓ and a line: at or above {words}; ✗ and dashes: below."
        answered = [args.query[i] for i in readable]
        found, rows = answer(answered, queries, items, gallery, args.top, threshold)
    if args.json:
        write_json(Path(args.json).resolve(), found)
    if args.page:
        page = pictures_page(title, note, rows, background)
        write_atomically(Path(args.page).resolve(), page)
        print(f"{args.page}: to look at in a browser")
    return int(len(readable) < len(args.query or []))


if __name__ == "__main__":
    run(main)
