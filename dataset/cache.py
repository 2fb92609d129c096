"""Decoded images, so that a JPEG is decoded once and not in every epoch."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from cli import UserError, in_parallel, plural
from dataset.files import read_image, size_of

FOLDER = "decoded"  # below the data root, for --cache disk


class Cache:
    """Every image of a file of pixels, under its path: a drop-in for `read_image`.

    The file has the RGB bytes of the images one after another, then int64 [N, 3]: the width, the
    height and the CRC-32 of each. It is opened once per process, and its memory is the kernel's:
    all workers share it.
    """

    def __init__(self, file, paths):
        self.file, self.descriptor = file, os.open(file, os.O_RDONLY)
        tail, length = 24 * len(paths), os.fstat(self.descriptor).st_size
        index = os.pread(self.descriptor, tail, max(length - tail, 0))
        index = np.frombuffer(index, np.int64).reshape(len(paths), 3)
        starts = start_of_each(index[:, :2])
        if length != starts[-1] + tail:
            raise ValueError(f"{file}: not of the length that its sizes say")
        self.images = {
            path: (start, width, height)
            for path, start, (width, height, _) in zip(paths, starts.tolist(), index.tolist())
        }
        self.checksums = index[:, 2].tolist()

    def verify(self, workers):
        """Raise ValueError where a pixel is not what was decoded."""
        found = in_parallel(self.checksum, list(self.images), workers, "verifying decoded images")
        if found != self.checksums:
            raise ValueError(f"{self.file}: damaged")

    def checksum(self, path):
        return zlib.crc32(self(path).tobytes())

    def __call__(self, path):
        start, width, height = self.images[path]
        try:
            data = os.pread(self.descriptor, 3 * width * height, start)
            return Image.frombytes("RGB", (width, height), data)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: {path} cannot be read from it ({error})") from error

    def __getstate__(self):
        return {**self.__dict__, "descriptor": None}

    def __setstate__(self, state):
        self.__dict__ = {**state, "descriptor": os.open(state["file"], os.O_RDONLY)}


def start_of_each(sizes):
    """[N + 1] where each image of these sizes [N, 2] begins, and the last ends."""
    return np.concatenate([[0], 3 * sizes.prod(axis=1).cumsum()])


def open_cache(kind, name, paths, root, workers):
    """The Cache of these images: in memory for this run (`ram`), or in a file that later runs find
    as well (`disk`), until an image changes. Decodes them, by `workers` processes, if need be."""
    try:
        if kind == "ram":
            return in_memory(paths, max(workers, 1))
        return in_file(name, paths, root, max(workers, 1))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(
            f"--cache {kind}: {where}{error.strerror}; use another --cache, or none"
        ) from error


def in_memory(paths, workers):
    if not hasattr(os, "memfd_create"):
        raise UserError("--cache ram: this needs Linux; use --cache disk")
    sizes = sizes_that_fit(paths, workers, "ram", available_memory(), "memory")
    # a file without a name, gone with this process; the path is for processes it starts
    file = f"/proc/{os.getpid()}/fd/{os.memfd_create('decoded images')}"
    decode(paths, sizes, file, workers)
    return Cache(file, paths)


def in_file(name, paths, root, workers):
    folder = Path(root, FOLDER)
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.{digest_of_files(paths, root)}.pixels"
    with open(folder / f"{name}.lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which decodes {name} just now", flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError, ValueError):  # not there, or damaged
            cache = Cache(file, paths)
            cache.verify(workers)
            return cache
        for old in folder.glob(f"*{name}.*.pixels*"):
            old.unlink()
        free = shutil.disk_usage(folder).free
        sizes = sizes_that_fit(paths, workers, "disk", free, f"space in {folder}")
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            decode(paths, sizes, temporary, workers)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return Cache(file, paths)


def digest_of_files(paths, root):
    """A digest that changes with any of the files, and with what decodes them."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for path in paths:
        status = os.stat(path)
        line = f"{os.path.relpath(path, root)} {status.st_size} {status.st_mtime_ns}\n"
        digest.update(line.encode(errors="replace"))
    return digest.hexdigest()[:16]


def sizes_that_fit(paths, workers, kind, available, what):
    """int64 [N, 2] width and height of each image; a UserError if they need more than there is."""
    sizes = np.array(in_parallel(size_of, paths, workers, "sizes of images"))
    needed = start_of_each(sizes)[-1]
    if needed > available:
        raise UserError(
            f"--cache {kind}: {plural(len(paths), 'image')} need {needed / 2**30:.1f} GiB decoded, "
            f"and {available / 2**30:.1f} GiB of {what} are free; use another --cache"
        )
    print(f"--cache {kind}: decoding {plural(len(paths), 'image')}, {needed / 2**30:.1f} GiB")
    return sizes


def available_memory():
    """Bytes that can be had without swapping: the machine's, and this container's if it is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or one without a limit
        limit, used, parts = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text()
            for name in ("max", "current", "stat")
        )
        parts = dict(line.split() for line in parts.splitlines())
        files = int(parts["file"]) - int(parts["shmem"])  # these make room when it is needed
        available.append(int(limit) - int(used) + files)
    return min(available)


def decode(paths, sizes, file, workers):
    """Write the file that Cache reads."""
    jobs = [
        (path, tuple(size), file, start)
        for path, size, start in zip(paths, sizes.tolist(), start_of_each(sizes).tolist())
    ]
    try:
        with open(file, "wb") as out:
            checksums = in_parallel(decode_one, jobs, workers, "decoding images")
            out.seek(0, os.SEEK_END)
            out.write(np.column_stack([sizes, checksums]).tobytes())
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise UserError(
            f"--cache: {file}: cannot be written, {start_of_each(sizes)[-1]:,} bytes needed "
            f"({error.strerror}); use another --cache, or none"
        ) from error


def decode_one(job):
    """Write an image where it belongs; its CRC-32."""
    path, size, file, start = job
    image = read_image(path)
    if image.size != size:
        raise UserError(f"{path}: changed while it was decoded")
    descriptor = os.open(file, os.O_WRONLY)
    try:
        data = rest = memoryview(image.tobytes())
        while rest:
            written = os.pwrite(descriptor, rest, start)
            rest, start = rest[written:], start + written
    finally:
        os.close(descriptor)
    return zlib.crc32(data)
