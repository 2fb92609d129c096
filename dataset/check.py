"""Check every file of a data set before training on it:

python -m dataset.check --dataset cub
"""

import hashlib
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

from PIL import Image

import dataset
from dataset.files import WHITE, as_rgb, found_and_missing, opened
from distributed import from_rank_0
from flags import Parser, at_least
from loading.loader import in_parallel
from utils import UserError, plural, run, warn

PROGRAM = "python -m dataset.check"


def look_at(path, own=False):
    """(SHA-256 of the file, or None if it cannot be read; its problem, or None)."""
    problem, named = None, Image.registered_extensions().get(Path(path).suffix.lower())
    try:
        with opened(path, own) as image:
            as_rgb(image, WHITE if own else None)
            if image.format != named and {image.format, named} != {"JPEG", "MPO"}:  # phones' JPEGs
                problem = f"{path}: a {image.format} file by another name"
            elif image.mode == "CMYK" and "icc_profile" in image.info:
                problem = f"{path}: CMYK, whose colour profile is ignored"
    except UserError as error:
        return None, str(error)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest(), problem


def look_at_all(items, workers, label, own):
    return in_parallel(partial(look_at, own=own), [path for path, _ in items], workers, label)


def unreadable(splits, workers):
    """[path] of the images that cannot be read, in all splits."""
    items = [item for part in splits.values() for item in part]
    looks = look_at_all(items, workers, "looking for unreadable images", own=True)
    return [path for (path, _), (digest, _) in zip(items, looks) if not digest]


def leave_out_unreadable(args, splits, known=None):
    """--skip-unreadable: (splits without unreadable images, [their paths in the data's folder]);
    (splits, None) without the flag. known: the paths that a continued run has already left out;
    None: look for unreadable images."""
    if not args.skip_unreadable:
        return splits, None
    folder = dataset.own_folder(args.dataset, args.data_root)
    if known is None:
        found = from_rank_0(lambda: unreadable(splits, args.workers))
        known = [os.path.relpath(path, folder) for path in found]
    if known:
        names = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        warn(f"{folder}: left out {plural(len(known), 'image')} that cannot be read: {names}")
    bad = set(known)
    kept = {split: [item for item in items if os.path.relpath(item[0], folder) not in bad]
            for split, items in splits.items()}  # fmt: skip
    return kept, known


def load_split(args, split):
    """The split `train` or `test` as an ImageSet; --skip-unreadable is applied."""
    splits = dataset.read(args.dataset, args.data_root)
    looked = {name: splits[name] for name in splits if (name == "train") == (split == "train")}
    looked, _ = leave_out_unreadable(args, looked)
    return dataset.image_set(args.dataset, splits | looked, split, background=args.background)


def check(name, root, workers):
    """A line for each problem of a data set."""
    problems, copies, count = [], defaultdict(list), 0
    splits = dataset.read(name, root)
    own = bool(dataset.own_flag(name))
    for split in ("train", "test") if own else ():
        try:
            dataset.image_set(name, splits, split)  # as in train.py; warns of odd classes
        except UserError as error:
            problems.append(str(error))
    for split, listed in splits.items():
        items, missing = found_and_missing(listed)
        problems.append(dataset.difference_from_published(name, split, items))
        problems += [f"{path}: listed, but not there" for path in missing]
        looks = look_at_all(items, workers, f"{name} {split}", own)
        for (path, class_name), (digest, problem) in zip(items, looks):
            problems.append(problem)
            if digest:
                copies[digest].append((path, class_name, split))
        count += len(items)
    print(f"{name}: looked at {plural(count, 'image')}")
    problems += map(problem_of_copies, copies.values())
    return [problem for problem in problems if problem]


def problem_of_copies(copies):
    """A line if equal files are of several classes, or of train and of another split; else None.
    copies: [(path, class name, split)]."""
    paths, classes, splits = ([*dict.fromkeys(column)] for column in zip(*copies))
    if len(classes) > 1:
        return f"{', '.join(paths)}: the same file in {len(classes)} classes"
    if "train" in splits and len(splits) > 1:
        return f"{', '.join(paths)}: the same file in {' and '.join(splits)}"


def main(argv=None):
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", default="cub", type=dataset.canonical_name, metavar="NAME",
        help=dataset.CHOICES)  # fmt: skip
    add("--data-root", default="./data", metavar="DIR",
        help="folder of the data sets; with --dataset folder, of your own images")  # fmt: skip
    add("--workers", default=os.cpu_count(), type=at_least(0), help="processes that decode images")
    args = parser.parse_args(argv)
    problems = check(args.dataset, args.data_root, args.workers)
    for problem in problems:
        print(problem)
    print(f"{plural(len(problems), 'problem')} found")
    return 1 if problems else 0


if __name__ == "__main__":
    run(main, PROGRAM)
