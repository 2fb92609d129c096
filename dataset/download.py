"""Download, check and unpack a published data set. Run again, it goes on where it stopped:

python -m dataset.download cub

kanji is not downloaded but drawn, as train.py draws it or with --characters and --size.
"""

import shutil
import tarfile
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from torchvision.datasets.utils import check_integrity

import dataset
from dataset.files import found_and_missing
from flags import VERSION, Parser, at_least
from utils import UserError, plural, progress, run

PROGRAM = "python -m dataset.download"
NAMES = [name for name, module in dataset.DATASETS.items() if hasattr(module, "FILES")]
NAMES.append("kanji")
CHUNK = 2**20  # bytes


def why_incomplete(name, root):
    """Why the images under `root` are not the published data set; "" if they are."""
    try:
        splits = dataset.read(name, root)
    except UserError as error:
        return str(error)
    found = {split: found_and_missing(items)[0] for split, items in splits.items()}
    lines = (dataset.difference_from_published(name, *split) for split in found.items())
    return "; ".join(filter(None, lines))


def obtain(name, root):
    """Download and unpack what is missing; UserError says what must be done by hand."""
    module = dataset.module_of(name)
    files = {root / path: facts for path, facts in module.FILES.items()}
    needed = {path: facts for path, facts in files.items() if not path.with_suffix("").is_dir()}
    reasons = "; ".join(filter(None, [fetch(path, *facts) for path, facts in needed.items()]))
    if reasons:
        raise UserError(f"{reasons}; get it by hand from {module.SOURCE}, then run this again")
    for archive in (path for path in needed if path.suffix in (".tgz", ".zip")):
        unpack(archive)
    if reason := why_incomplete(name, root):
        raise UserError(f"{reason}; move away what was unpacked from "
                        f"{' and '.join(map(str, files))}")  # fmt: skip


def fetch(path, md5, url):
    """Download the file if needed. Returns why it is missing or damaged, or None."""
    if url is None and not path.exists():
        return f"{path} (MD5 {md5 or 'not known'}) is missing"
    part = path if path.exists() else path.with_name(f"{path.name}.part")
    try:
        if part != path:
            print(f"downloading {url}", flush=True)
            transfer(url, part)
    except (OSError, HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: the part is already the whole file
            return f"{path} (MD5 {md5}) is missing: {url} failed ({error}), run this again to go on"
    if not check_integrity(part, md5):
        return f"{part} is damaged or another file, its MD5 is not {md5}: move it away"
    part.rename(path)


def transfer(url, part):
    """Download the rest of `part`, or all of it from a host that cannot continue a file."""
    done = part.stat().st_size if part.exists() else 0
    # some hosts refuse Python's own User-Agent
    request = Request(url, headers={"Range": f"bytes={done}-", "User-Agent": f"DDML/{VERSION}"})
    with urlopen(request, timeout=20) as response:  # seconds without a byte
        if response.headers.get_content_type() == "text/html":
            raise ConnectionError("a web page came instead of the file")
        done = done if response.status == 206 else 0
        rest = response.length or 0  # 0 where the host does not say
        if (free := shutil.disk_usage(part.parent).free) < (need := done + 2 * rest):
            raise UserError(f"{part.parent}: needs {need:,} bytes to unpack; {free:,} are free")
        chunks = iter(lambda: response.read(CHUNK), b"")
        with open(part, "ab" if done else "wb") as file:
            for chunk in progress(chunks, rest // CHUNK, f"{part.stem}, MiB"):
                file.write(chunk)
        if response.length:  # bytes that did not come
            raise ConnectionError(f"broken off {response.length:,} bytes before the end")


def unpack(archive):
    """Unpack the folder with the archive's name beside it, all or nothing."""
    folder, temporary = archive.with_suffix(""), archive.with_name(f".{archive.name}.tmp")
    # early releases of Python 3.10 and 3.11 have no filter; there only the MD5 protects
    safely = archive.suffix == ".tgz" and hasattr(tarfile, "data_filter")
    print(f"unpacking {archive}, which may then be deleted", flush=True)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        shutil.unpack_archive(archive, temporary, **({"filter": "data"} if safely else {}))
        (temporary / folder.name).rename(folder)
    except Exception as error:  # a damaged archive fails in many ways, and the disk may be full
        raise UserError(f"{archive}: cannot be unpacked ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def draw_kanji(root, characters, side):
    """Draw the images unless some are there, and print their counts. None: the default."""
    kanji = dataset.kanji
    if (characters or side) and (root / "kanji").exists():
        raise UserError(f"{root / 'kanji'} is there already: delete it, or use another --data-root")
    kanji.prepare(root, characters or kanji.CHARACTERS, side or kanji.SIDE)
    for split, items in kanji.read(root).items():
        classes = plural(len({name for _, name in items}), "class")
        print(f"kanji {split}: {plural(len(items), 'image')} of {classes}")


def main(argv=None):
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", type=dataset.canonical_name, choices=NAMES, help="data set")
    add("--data-root", default="./data", help="folder of the data sets")
    add("--characters", type=at_least(2, maximum=dataset.kanji.ALL),
        help=f"how many kanji to draw, by default {dataset.kanji.CHARACTERS}")  # fmt: skip
    add("--size", type=at_least(16, maximum=2**10),
        help=f"side of kanji's images in pixels, by default {dataset.kanji.SIDE}")  # fmt: skip
    args = parser.parse_args(argv)
    root = Path(args.data_root)
    if root == Path("data") and not root.exists():
        root.mkdir()
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    if args.name == "kanji":
        return draw_kanji(root, args.characters, args.size)
    if args.characters or args.size:
        raise UserError(f"--characters and --size are for kanji alone, not for {args.name}")
    if why_incomplete(args.name, root):
        obtain(args.name, root)
    for split, (images, classes) in dataset.module_of(args.name).PUBLISHED.items():
        print(f"{args.name} {split}: {images:,} images of {classes:,} classes, as published")


if __name__ == "__main__":
    run(main, PROGRAM)
