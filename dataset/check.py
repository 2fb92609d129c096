"""Look at every file of a data set before a day is spent on it:

python -m dataset.check --dataset cub
"""

import hashlib
import os

from PIL import Image

import dataset
from cli import Parser, UserError, at_least, in_parallel, plural, run
from dataset.files import opened


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
    if named != image.format:
        return f"{path}: a {image.format} file by another name"
    if image.mode == "CMYK" and "icc_profile" in image.info:
        return f"{path}: CMYK, whose colour profile is left aside"
    return None


def check(name, root, workers):
    """All problems of a data set, a line each."""
    problems, digests, missing, seen = [], {}, set(), 0
    for split in ("train", "test"):
        items, absent = dataset.read(name, root, split)
        paths = [path for path, _ in items]
        problems += filter(None, [dataset.unlike_published(name, split, items)])
        looks = in_parallel(look_at, paths, workers, f"{name} {split}")
        problems += [problem for _, problem in looks if problem]
        digests[split] = {}
        for path, (digest, _) in zip(paths, looks):
            digests[split].setdefault(digest, []).append(path)
        missing |= set(absent)
        seen += len(paths)
    problems += [f"{path}: listed, but not there" for path in sorted(missing)]
    for digest in sorted(digests["train"].keys() & digests["test"].keys() - {None}):
        train, test = (", ".join(digests[split][digest]) for split in ("train", "test"))
        problems.append(f"{train}: the same file is in the test half, as {test}")
    print(f"{name}: looked at {plural(seen, 'image')}")
    return problems


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dataset", default="cub", type=dataset.canonical_name, help="cub, car, SOP, demo")
    add("--data-root", default="./data", help="folder of the extracted data sets")
    add("--workers", default=os.cpu_count(), type=at_least(1), help="processes that decode images")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    problems = check(args.dataset, args.data_root, args.workers)
    for problem in problems:
        print(problem)
    print(f"{plural(len(problems), 'problem')} found")
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
