"""Look at every file of a data set before a day is spent on it:

python -m dataset.check --dataset cub
"""

import hashlib
import os
from collections import defaultdict
from pathlib import Path

from PIL import Image

import dataset
from dataset.files import on_disk, opened
from flags import Parser, at_least
from loading.loader import in_parallel
from utils import UserError, plural, run

PROGRAM = "python -m dataset.check"


def look_at(path):
    """(SHA-256 of the file, or None if it is unreadable; its problem or None)."""
    problem, named = None, Image.registered_extensions().get(Path(path).suffix.lower())
    try:
        with opened(path) as image:
            image.convert("RGB")
            if image.format != named and {image.format, named} != {"JPEG", "MPO"}:  # phones' JPEGs
                problem = f"{path}: a {image.format} file by another name"
            elif image.mode == "CMYK" and "icc_profile" in image.info:
                problem = f"{path}: CMYK, whose colour profile is left aside"
    except UserError as error:
        return None, str(error)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest(), problem


def check(name, root, workers):
    """All problems of a data set, a line each."""
    problems, copies, count = [], defaultdict(list), 0
    splits = dataset.read(name, root)
    if hasattr(dataset.module_of(name), "OWN"):
        for split in ("train", "test") if len(splits) > 1 else splits:
            dataset.image_set(name, splits, split)  # warns of odd classes
    for split, listed in splits.items():
        items, missing = on_disk(listed)
        problems.append(dataset.difference_from_published(name, split, items))
        problems += [f"{path}: listed, but not there" for path in missing]
        looks = in_parallel(look_at, [path for path, _ in items], workers, f"{name} {split}")
        for (path, class_name), (digest, problem) in zip(items, looks):
            problems.append(problem)
            if digest:
                copies[digest].append((path, class_name, split))
        count += len(items)
    print(f"{name}: looked at {plural(count, 'image')}")
    problems += map(problem_of_copies, copies.values())
    return [problem for problem in problems if problem]


def problem_of_copies(copies):
    """copies: [(path, class name, split)] of files with the same bytes."""
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
        help="folder of the data sets, or with --dataset folder of the images")  # fmt: skip
    add("--workers", default=os.cpu_count(), type=at_least(0), help="processes that decode images")
    args = parser.parse_args(argv)
    problems = check(args.dataset, args.data_root, args.workers)
    for problem in problems:
        print(problem)
    print(f"{plural(len(problems), 'problem')} found")
    return 1 if problems else 0


if __name__ == "__main__":
    run(main, PROGRAM)
