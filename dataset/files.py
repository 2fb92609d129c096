"""Finding and reading the files of a data set."""

import contextlib
import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from utils import UserError, plural, warn

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener  # not among the requirements

    register_heif_opener()

Image.init()
FORMATS = sorted(Image.OPEN.keys() - {"EPS"})  # Pillow would run PostScript
# phones' formats, and the packages that read them
PACKAGES = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "'pillow>=11.3'"}
UNSUPPORTED = PACKAGES.keys() - Image.registered_extensions().keys()
# what torchvision's ImageFolder reads, and phones' formats
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
SUFFIXES |= PACKAGES.keys() - UNSUPPORTED
WHITE = "#ffffff"  # the default background


class UnreadableImage(UserError):
    """An image file that is damaged or not supported."""

    instead = "replace it"


class UnreadableOwnImage(UnreadableImage):
    instead = "replace it, or leave it out with --skip-unreadable"


def read_image(path, background=None):
    """An image file as RGB. background: the colour under transparent pixels of users' own images;
    None: an image of a published data set, read as the published script reads it."""
    with opened(path, own=background is not None) as image:
        return as_rgb(image, background)


def as_rgb(image, background=None):
    """An opened image as read_image gives it: users' own turned as EXIF says, 16 bits cut to 8."""
    if background is None:
        image.load()
    else:
        image.getexif()  # Pillow remembers it
        image.info.pop("exif", None)  # Pillow would rewrite it, and fail at a tag of an odd type
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = upper_byte(image)
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, background)
            image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy RGB


def upper_byte(image):
    """16-bit grey as 8-bit grey. (Of 16-bit RGB, Pillow itself keeps the upper bytes.)"""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError(f"its pixels are not integers of 8 or 16 bits, mode {image.mode}")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def size_of(path, own=False):
    """(width, height) of what `read_image` gives, from the file's header."""
    with opened(path, own) as image:
        if not own:
            return image.size
        if image.format == "TIFF":  # Pillow turns a TIFF when it loads it
            image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


@contextlib.contextmanager
def opened(path, own=False):
    """In a `with`: an image file, opened with Pillow. An error inside becomes UnreadableImage."""
    try:
        if not os.path.isfile(path):  # opening a pipe would wait forever
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                deep = image.mode[0] in "IF" or ";16" in str(image.tile)
                if deep and not own:  # Pillow would clip them to 8 bits
                    raise ValueError(f"its pixels have more than 8 bits, mode {image.mode}")
                if max(image.size) > 100 * min(image.size):  # resizing would need too much memory
                    raise ValueError(f"its sides, {image.size}, are too unequal")
                yield image
    except Exception as error:  # decoders fail in many ways
        kind = UnreadableOwnImage if own else UnreadableImage
        reason = f"{error}{to_install({Path(path).suffix.lower()})}"
        raise kind(f"{path}: not an image that can be read ({reason})") from error


def to_install(suffixes):
    """`; pip install PACKAGE reads .heic` for those suffixes that need a package, else ""."""
    lacking = UNSUPPORTED & suffixes
    packages = " ".join(sorted({PACKAGES[suffix] for suffix in lacking}))
    return f"; pip install {packages} reads {' '.join(sorted(lacking))}" if lacking else ""


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
    """[(path, class name)] of the images in subfolders, sorted. One warning lists other files."""
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
        warn(f"{folder}: skipped {', '.join(kinds)}; images are named CLASS/NAME and end in "
             f"{' '.join(sorted(SUFFIXES))}{to_install({what[1:].lower() for what in skipped})}")
    return items


def listing(folder):
    paths = (path for path in Path(folder).iterdir() if not is_leftover(path))
    return sorted(paths, key=lambda path: path.name)


def parse_list(file, parse, form, header):
    """[parse(*fields)] of each line after line `header`; UserError names a line unlike `form`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a list that can be read ({error})") from error
    names = form.split()
    if len(lines) < header or names[0] not in lines[header - 1]:  # an image would be skipped
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
    """The path `relative`, from a list, in `folder`; ValueError if it leads out of the folder."""
    if os.path.isabs(relative) or ".." in Path(relative).parts:
        raise ValueError(f"the path {relative} leaves the data set's folder")
    return os.path.join(folder, relative)


def found_and_missing(items):
    """([(path, class name)] of the files that exist, [path] of those that do not)."""
    # on network disks one listing a folder is far cheaper than one stat a file
    folders = filter(os.path.isdir, {os.path.dirname(path) for path, _ in items})
    existing = {(folder, name) for folder in folders for name in os.listdir(folder)}
    found = [item for item in items if os.path.split(item[0]) in existing]
    missing = [path for path, _ in items if os.path.split(path) not in existing]
    return found, missing


def halves(items, source):
    """{split: items}: the first half of the classes, in order of name, is train, the rest test."""
    classes = sorted({name for _, name in items})
    if len(classes) < 2:
        raise UserError(f"{source}: needs images of at least two classes (half of them train, half "
                        f"test); found {len(classes)}")  # fmt: skip
    return by_class(items, set(classes[: len(classes) // 2]).__contains__)


def by_class(items, trains):
    """{split: items}: a class trains if trains(its name), else it is in test."""
    return {
        "train": [item for item in items if trains(item[1])],
        "test": [item for item in items if not trains(item[1])],
    }
