"""Finding and reading the files of a data set."""

import contextlib
import os
import warnings
from collections import defaultdict
from pathlib import Path

from PIL import Image

from utils import UserError, plural, warn

# the images of torchvision's ImageFolder
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}

Image.init()
FORMATS = sorted(Image.OPEN.keys() - {"EPS"})  # Pillow would run PostScript


class UnreadableImage(UserError):
    """An image file that is damaged or of a kind that is not supported."""


def read_image(path):
    """Any image file as RGB: grayscale, palette, RGBA and CMYK are converted."""
    with opened(path) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def size_of(path):
    """(width, height), from the file's header."""
    with opened(path) as image:
        return image.size


@contextlib.contextmanager
def opened(path):
    """An image file, opened with Pillow. UnreadableImage for all that goes wrong with it."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait forever
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode[0] in "IF" or ";16" in str(image.tile):  # which Pillow would cut to 8
                    raise ValueError(f"its pixels are of more than 8 bits, mode {image.mode}")
                if max(image.size) > 100 * min(image.size):  # resized, it could be of any size
                    raise ValueError(f"its sides, {image.size}, are too unequal")
                yield image
    except Exception as error:  # decoders fail in many ways
        raise UnreadableImage(f"{path}: not an image that can be read ({error})") from error


def first_existing(root, candidates, name):
    """The first of `candidates` (paths under `root`) that is a file or has folders in it."""
    tried = [Path(root, candidate) for candidate in candidates]
    for path in tried:
        if path.is_file() or path.is_dir() and any(child.is_dir() for child in path.iterdir()):
            return path
    above = [folder for folder in Path(root).absolute().parents[:2]
             if any((folder / candidate).exists() for candidate in candidates)]  # fmt: skip
    instead = f"; there is one under --data-root {above[0]}" if above else ""
    names = ", ".join(map(str, tried))
    raise UserError(f"no {name} data set under --data-root {root}: tried {names}{instead}")


def is_leftover(path):
    """Whether the operating system left this file behind."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")


def class_folders(folder):
    """[(path, class name)] of the images in subfolders, sorted. One warning names all others."""
    items, skipped = [], defaultdict(list)
    for sub in listing(folder):
        inside = listing(sub) if sub.is_dir() else []
        if not inside:
            what = "empty class folders" if sub.is_dir() else "files beside the class folders"
            skipped[what].append(sub)
        for path in inside:
            if path.suffix.lower() in SUFFIXES:
                items.append((str(path), sub.name))
            else:
                what = "folders inside a class folder" if path.is_dir() else f"*{path.suffix}"
                skipped[what].append(path)
    if skipped:
        kinds = (f"{what} ({len(paths):,}, such as {paths[0]})" for what, paths in skipped.items())
        warn(f"{folder}: skipped {', '.join(kinds)}; images are CLASS/NAME, and end in "
             f"{' '.join(sorted(SUFFIXES))}")  # fmt: skip
    return items


def listing(folder):
    paths = (path for path in Path(folder).iterdir() if not is_leftover(path))
    return sorted(paths, key=lambda path: path.name)


def parse_list(file, parse, form, header):
    """[parse(fields)] of the lines after line `header`; UserError names a line unlike `form`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a list that can be read ({error})") from error
    names = form.split()
    if len(lines) < header or names[0] not in lines[header - 1]:  # or an image would be skipped
        raise UserError(f"{file}, line {header}: must be the header `{form}`")
    parsed = []
    for number, line in enumerate(lines[header:], start=header + 1):
        if fields := line.split():
            try:
                if len(fields) != len(names):
                    raise ValueError(plural(len(fields), "field"))
                parsed.append(parse(*fields))
            except ValueError as error:
                raise UserError(f"{file}, line {number}: must be `{form}` ({error})") from error
    return parsed


def below(folder, relative):
    """The path of a file that a list names; ValueError if it leads out of the folder."""
    if os.path.isabs(relative) or ".." in Path(relative).parts:
        raise ValueError(f"the path {relative} leaves the data set's folder")
    return os.path.join(folder, relative)


def on_disk(items):
    """([(path, class name)] of the files that exist, [path of each that does not])."""
    # one listing per folder is far cheaper than a stat per file on network disks
    folders = filter(os.path.isdir, {os.path.dirname(path) for path, _ in items})
    existing = {(folder, name) for folder in folders for name in os.listdir(folder)}
    found = [item for item in items if os.path.split(item[0]) in existing]
    missing = [path for path, _ in items if os.path.split(path) not in existing]
    return found, missing


def halves(items, source):
    """{split: items}: the first half of the classes, sorted by name, is train, the rest test."""
    classes = sorted({name for _, name in items})
    if len(classes) < 2:
        raise UserError(f"{source}: needs images of at least two classes (half of them train, half "
                        f"test), found {len(classes)}")  # fmt: skip
    return by_class(items, set(classes[: len(classes) // 2]).__contains__)


def by_class(items, trains):
    """{split: items}: classes for whose name `trains` is true are train, the others test."""
    return {
        "train": [item for item in items if trains(item[1])],
        "test": [item for item in items if not trains(item[1])],
    }
