"""Look at every file of a data set before a day is spent on it:

python -m dataset.check --dataset cub
"""

import hashlib
import os

from PIL import Image

import dataset
from dataset.files import on_disk, opened
from flags import Parser, at_least
from loading.loader import in_parallel
from utils import UserError, plural, run

PROGRAM = "python -m dataset.check"


def look_at(path):
    """(SHA-256 of the file or None, what is wrong with the image or None)."""
    try:
        with opened(path) as image:
            image.convert("RGB")
            problem = oddity(path, image)
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest(), problem
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{path}: {error.strerror}"


def oddity(path, image):
    """What is read, but not as it says it is, or None."""
    named = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if named != image.format and {named, image.format} != {"JPEG", "MPO"}:  # a phone's JPEG
        return f"{path}: a {image.format} file by another name"
    if image.mode == "CMYK" and "icc_profile" in image.info:
        return f"{path}: CMYK, whose colour profile is left aside"
    return None


def check(name, root, workers):
    """All problems of a data set, a line each."""
    problems, found, seen = [], {}, 0
    splits = dataset.read(name, root)
    if dataset.is_own(name):
        for split in ("train", "test") if len(splits) > 1 else splits:
            dataset.image_set(name, splits, split)  # says what is odd
    for split, listed in splits.items():
        items, missing = on_disk(listed)
        problems += filter(None, [dataset.unlike_published(name, split, items)])
        problems += [f"{path}: listed, but not there" for path in missing]
        paths = [path for path, _ in items]
        looks = in_parallel(look_at, paths, workers, f"{name} {split}")
        problems += [problem for _, problem in looks if problem]
        for (path, class_name), (digest, _) in zip(items, looks):
            found.setdefault(digest, []).append((path, class_name, split))
        seen += len(paths)
    found.pop(None, None)
    print(f"{name}: looked at {plural(seen, 'image')}")
    return problems + list(filter(None, map(twins, found.values())))


def twins(copies):
    """What is wrong with the places, (path, class name, split), of one and the same file."""
    paths, classes, splits = ([*dict.fromkeys(part)] for part in zip(*copies))
    if len(classes) > 1:
        return f"{', '.join(paths)}: the same file in {len(classes)} classes"
    if "train" in splits and len(splits) > 1:
        return f"{', '.join(paths)}: the same file in {' and '.join(splits)}"
    return None


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
