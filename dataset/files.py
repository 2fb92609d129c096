"""Finding a data set's files and reading them; every data set uses this."""

import contextlib
import os
import warnings
from pathlib import Path

from PIL import Image

from utils import UserError, plural, warn

# what torchvision's ImageFolder takes for an image
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}

Image.init()
FORMATS = sorted(Image.OPEN.keys() - {"EPS"})  # Pillow would run PostScript

MAX_BYTES = 2**28  # Pillow's limit of 89 million pixels is as many bytes; lists are far smaller


class UnreadableImage(UserError):
    """An image file that is damaged, or not one that is read."""


def require_size(path):
    """ValueError for a file that is too large to be read into memory unseen."""
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")


def read_image(path):
    """Any image file as RGB: grayscale, palette, RGBA and CMYK are converted."""
    with opened(path) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def size_of(path):
    """(width, height) of an image, from the head of its file."""
    with opened(path) as image:
        return image.size


@contextlib.contextmanager
def opened(path):
    """An image file, opened with Pillow; a UserError for all that cannot be read from it."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait forever
            raise ValueError("not a file")
        require_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode[0] in "IF" or any(map(is_deep, image.tile)):
                    raise ValueError(f"its pixels are of more than 8 bits, mode {image.mode}")
                if max(image.size) > 100 * min(image.size):  # resized, it could be of any size
                    raise ValueError(f"its sides, {image.size}, are too unequal")
                yield image
    except Exception as error:  # decoders fail in many ways, all of them the file's
        raise UnreadableImage(f"{path}: not an image that can be read ({error})") from error


def is_deep(tile):
    """Whether Pillow would cut the pixels of a tile (decoder, box, offset, arguments) to 8 bits."""
    decoder, _, _, arguments = tile
    if decoder.startswith("ppm") and isinstance(arguments, tuple):
        return arguments[1] > 255  # the greatest value of a pixel
    return ";16" in str(arguments)


def first_existing(root, candidates, name):
    """The first of `candidates` (paths under `root`) that is a file, or a folder of folders; a
    UserError names them all."""
    tried = [Path(root, candidate) for candidate in candidates]
    for path in tried:
        if path.is_file() or path.is_dir() and any(child.is_dir() for child in path.iterdir()):
            return path
    above = [folder for folder in Path(root).absolute().parents[:2]
             if any((folder / candidate).exists() for candidate in candidates)]  # fmt: skip
    instead = f"; there is one under --data-root {above[0]}" if above else ""
    raise UserError(
        f"no {name} data set under --data-root {root}: tried {', '.join(map(str, tried))}{instead}"
    )


def is_leftover(path):
    """What systems leave behind, unseen by those who look at a folder."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")


def class_folders(folder):
    """[(path, class name)] of the images in `folder`'s subfolders, by name of class and of file.
    What else is there is counted in one line."""
    items, skipped = [], {}
    for sub in listing(folder):
        if not sub.is_dir():
            skipped.setdefault("files beside the class folders", []).append(sub)
            continue
        inside = listing(sub)
        if not inside:
            skipped.setdefault("empty class folders", []).append(sub)
        for path in inside:
            if path.suffix.lower() in SUFFIXES:
                items.append((str(path), sub.name))
            else:
                what = "folders inside a class folder" if path.is_dir() else f"*{path.suffix}"
                skipped.setdefault(what, []).append(path)
    if skipped:
        kinds = (f"{what} ({len(paths):,}, such as {paths[0]})" for what, paths in skipped.items())
        warn(
            f"{folder}: skipped {', '.join(kinds)}; images are CLASS/NAME, and end in "
            f"{' '.join(sorted(SUFFIXES))}"
        )
    return items


def listing(folder):
    paths = (path for path in Path(folder).iterdir() if not is_leftover(path))
    return sorted(paths, key=lambda path: path.name)


def parse_list(file, parse, form, header):
    """[parse(fields)] of the lines of a list after the `header`, whose first word is that of
    `form`; a UserError names the line that parse refuses with a ValueError."""
    try:
        require_size(file)
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a list that can be read ({error})") from error
    if len(lines) < header or form.split()[0] not in lines[header - 1]:
        # else the first image would be taken for it
        raise UserError(f"{file}, line {header}: must be the header `{form}`")
    parsed = []
    for number, line in enumerate(lines[header:], start=header + 1):
        fields = line.split()
        try:
            if len(fields) not in (0, len(form.split())):
                raise ValueError(plural(len(fields), "field"))
            if fields:
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
    """([(path, class name)] of the files that are there, [path of one that is not])."""
    listings = {}  # one listing per folder is far cheaper than a stat per file on network disks
    found, missing = [], []
    for path, class_name in items:
        parent, name = os.path.split(path)
        if parent not in listings:
            listings[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if name in listings[parent]:
            found.append((path, class_name))
        else:
            missing.append(path)
    return found, missing


def halves(items, source):
    """{split: items}: the first half of the classes, in order of name, trains; the second tests."""
    classes = sorted({name for _, name in items})
    if len(classes) < 2:
        raise UserError(
            f"{source}: needs images of at least two classes (half of them train, half test), "
            f"found {len(classes)}"
        )
    train = set(classes[: len(classes) // 2])
    return {
        "train": [item for item in items if item[1] in train],
        "test": [item for item in items if item[1] not in train],
    }
