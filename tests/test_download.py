"""python -m dataset.download, against a host that breaks off, sends something else, or is gone."""

import errno
import hashlib
import io
import random
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import dataset
from dataset import download
from tests.conftest import (
    SOP,
    fails,
    make_cars,
    make_cub,
    make_inshop,
    make_sop,
    snapshot,
    write_image,
)

CUB = "CUB_200_2011"
IMAGES = "Inshop_Clothes/Img/img.zip"
LIST = "Inshop_Clothes/Eval/list_eval_partition.txt"
COUNTS = {
    "cub": {"train": (20, 2), "test": (20, 2)},
    "SOP": {"train": (20, 4), "test": (20, 4)},
    "cars": {"train": (20, 2), "test": (20, 2)},
    "Inshop": {"train": (24, 4), "query": (7, 4), "gallery": (12, 3)},
}


class Host(BaseHTTPRequestHandler):
    """Sends the server's `content`, or the rest of it from where the request's Range begins."""

    def do_GET(self):
        host, asked = self.server, self.headers["Range"]
        host.asked.append(asked)
        end = host.breaks.pop(0) if host.breaks else len(host.content)
        start = int(asked[len("bytes=") : -1]) if host.continues else 0
        status = host.status or (416 if start >= len(host.content) else 206 if start else 200)
        if end is None:  # not even a status
            return
        self.send_response(status)
        self.send_header("Content-Type", host.type)
        self.send_header("Content-Length", len(host.content) - start)
        self.end_headers()
        if status in (200, 206):
            self.wfile.write(host.content[start : start + end])
            self.wfile.flush()
        host.then()

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "CHUNK", 2**16)
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.content, server.type, server.status = b"", "application/octet-stream", None
        server.continues, server.breaks, server.asked = True, [], []
        server.then = lambda: None
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """{data set: bytes of its archive}, packed as the published ones are."""
    made = {}
    for name, make, folder, form in (
        ("cub", make_cub, CUB, "gztar"),
        ("SOP", make_sop, SOP, "zip"),
        ("cars", make_cars, "car_ims", "gztar"),
        ("Inshop", make_inshop, "Inshop_Clothes/Img/img", "zip"),
    ):
        root = make(tmp_path_factory.mktemp(name))
        inside = root / folder
        (inside / "more").write_bytes(random.Random(0).randbytes(200_000))  # in several chunks
        packed = shutil.make_archive(root / "packed", form, inside.parent, inside.name)
        made[name] = Path(packed).read_bytes()
    return made


def md5_of(data):
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def offer(monkeypatch, host, archives):
    """offer(name): `host` has that data set's archive, and its few images are the published."""

    def offered(name, content=None):
        module = dataset.module_of(name)
        host.content = content or archives[name]
        (file,) = module.FILES
        monkeypatch.setattr(module, "FILES", {file: (md5_of(host.content), host.url)})
        monkeypatch.setattr(module, "PUBLISHED", COUNTS[name])

    return offered


@pytest.fixture
def by_hand(monkeypatch, archives):
    """by_hand(name): that data set's few images are the published, its files are on no host."""

    def expected(name, md5s):
        module = dataset.module_of(name)
        monkeypatch.setattr(module, "FILES", {file: (md5, None) for file, md5 in md5s.items()})
        monkeypatch.setattr(module, "PUBLISHED", COUNTS[name])

    return expected


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def get(name, root):
    download.main([name, "--data-root", str(root)])


def names(root):
    return sorted(path.name for path in root.iterdir())


def fails_to_get(name, root, capsys):
    return fails(f"{name} --data-root '{root}'", capsys, download.main)


@pytest.mark.parametrize("name, archive", [("cub", f"{CUB}.tgz"), ("SOP", f"{SOP}.zip")])
def test_a_data_set_is_downloaded_checked_and_unpacked(root, offer, host, capsys, name, archive):
    offer(name)
    get(name, root)
    assert names(root) == sorted([archive, Path(archive).stem])
    assert (root / archive).read_bytes() == host.content
    lines = capsys.readouterr().out.splitlines()
    images, classes = COUNTS[name]["train"]
    assert f"unpacking {root / archive}, which may then be deleted" in lines
    assert f"{name} train: {images} images of {classes} classes, as published" in lines
    assert len(dataset.load(name, root, "train")) == images


def test_a_data_set_that_is_there_is_left_alone(root, offer, host, capsys):
    offer("cub")
    make_cub(root, "cub/images")
    before = snapshot(root)
    get("cub", root)
    assert snapshot(root) == before and not host.asked
    assert "cub test: 20 images of 2 classes, as published" in capsys.readouterr().out


def test_an_archive_with_a_wrong_md5_is_refused_and_kept(root, offer, host, capsys):
    offer("cub")
    archive = root / f"{CUB}.tgz"
    archive.write_bytes(b"of another year")
    line = fails_to_get("cub", root, capsys)
    assert f"{archive} is damaged or another file, its MD5 is not {md5_of(host.content)}" in line
    assert "move it away" in line and dataset.cub.SOURCE in line
    assert archive.read_bytes() == b"of another year"
    assert not host.asked and names(root) == [archive.name]


def test_an_interrupted_download_continues_when_run_again(
    root, offer, host, capsys
):
    offer("cub")
    host.breaks = [100_000, None, 50_000]
    for missing in ("broken off", "without response", "broken off"):
        line = fails_to_get("cub", root, capsys)
        assert f"{host.url} failed (" in line and missing in line
        assert "run this again to go on" in line and names(root) == [f"{CUB}.tgz.part"]
    get("cub", root)
    assert host.asked == [f"bytes={start}-" for start in (0, 100_000, 100_000, 150_000)]
    assert names(root) == [CUB, f"{CUB}.tgz"]


def test_a_host_without_range_requests_sends_the_whole_file_again(root, offer, host):
    offer("cub")
    host.continues = False
    (root / f"{CUB}.tgz.part").write_bytes(host.content[:1000])
    get("cub", root)
    assert host.asked == ["bytes=1000-"] and (root / f"{CUB}.tgz").read_bytes() == host.content


def test_a_file_missing_on_the_host_is_named_with_where_to_get_it_by_hand(
    root, offer, host, capsys
):
    offer("SOP")
    host.status = 404
    line = fails_to_get("SOP", root, capsys)
    assert f"{root / SOP}.zip (MD5 {md5_of(host.content)}) is missing" in line
    assert f"{host.url} failed (HTTP Error 404" in line
    assert "get it by hand from ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip" in line
    assert len(host.asked) == 1 and names(root) == []


def test_damaged_bytes_never_become_the_archive(root, offer, host, capsys):
    offer("cub")
    good, host.content = host.content, b"?" + host.content[1:]
    part = root / f"{CUB}.tgz.part"
    for _ in range(2):  # the second time there is nothing left to ask for
        line = fails_to_get("cub", root, capsys)
        assert f"{part} is damaged or another file, its MD5 is not {md5_of(good)}: move it" in line
        assert names(root) == [part.name]
    part.unlink()
    host.content = good
    get("cub", root)
    assert names(root) == [CUB, f"{CUB}.tgz"]


def test_a_web_page_instead_of_the_file_does_not_replace_the_part(root, offer, host, capsys):
    offer("SOP")
    part = root / f"{SOP}.zip.part"
    part.write_bytes(host.content[:1000])
    host.continues, host.type = False, "text/html; charset=utf-8"
    assert "a web page came instead of the file" in fails_to_get("SOP", root, capsys)
    assert part.read_bytes() == host.content[:1000]


def test_free_disk_space_is_checked_before_anything_is_written(
    root, offer, host, monkeypatch, capsys
):
    offer("cub")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = fails_to_get("cub", root, capsys)
    assert f"{root}: needs {2 * len(host.content):,} bytes to unpack; 1,000 are free" in line
    assert names(root) == []


def test_an_interrupted_unpacking_leaves_no_partial_data_set(
    root, offer, host, monkeypatch, capsys
):
    offer("cub")
    unpack = shutil.unpack_archive

    def full(*args, **kwargs):
        unpack(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "unpack_archive", full)
        line = fails_to_get("cub", root, capsys)
    assert f"{CUB}.tgz: cannot be unpacked ([Errno 28] No space left on device)" in line
    assert names(root) == [f"{CUB}.tgz"]
    write_image(root / f".{CUB}.tgz.tmp" / CUB / "images/005.Half/a.jpg", seed=0)  # of one killed
    get("cub", root)
    assert names(root) == [CUB, f"{CUB}.tgz"]


def test_an_archive_cannot_write_outside_the_data_root(root, offer, archives, capsys):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        evil = tarfile.TarInfo("../../evil")
        evil.size = 4
        file.addfile(evil, io.BytesIO(b"evil"))
    offer("cub", packed.getvalue())
    assert "tgz: cannot be unpacked (" in fails_to_get("cub", root, capsys)
    assert not list(root.parent.rglob("evil")) and names(root) == [f"{CUB}.tgz"]


def test_an_incomplete_data_set_is_refused_and_kept(root, offer, host, capsys):
    offer("cub")
    make_cub(root, f"{CUB}/images", classes=3)
    before = snapshot(root)
    line = fails_to_get("cub", root, capsys)
    assert "cub train: found 10 images of 1 class, the published split has 20 images" in line
    assert line.endswith(f"move away what was unpacked from {root / CUB}.tgz")
    assert snapshot(root) == before and not host.asked


def test_cars_got_by_hand_are_checked_and_unpacked(root, by_hand, archives, tmp_path, capsys):
    annotations = (make_cars(tmp_path / "made") / "cars_annos.mat").read_bytes()
    files = {"car_ims.tgz": archives["cars"], "cars_annos.mat": annotations}
    md5s = {file: md5_of(data) for file, data in files.items()}
    by_hand("cars", md5s)
    line = fails_to_get("car", root, capsys)
    assert all(f"{root / file} (MD5 {md5}) is missing" in line for file, md5 in md5s.items())
    assert "get it by hand from a copy of http://ai.stanford.edu/~jkrause/car196/" in line
    (root / "car_ims.tgz").write_bytes(files["car_ims.tgz"])
    line = fails_to_get("car", root, capsys)
    assert "car_ims.tgz" not in line and "cars_annos.mat" in line
    (root / "cars_annos.mat").write_bytes(b"?")
    line = fails_to_get("car", root, capsys)
    assert f"{root}/cars_annos.mat is damaged or another file" in line and "car_ims" not in line
    assert names(root) == ["car_ims.tgz", "cars_annos.mat"]
    (root / "cars_annos.mat").write_bytes(annotations)
    get("car", root)
    assert names(root) == ["car_ims", "car_ims.tgz", "cars_annos.mat"]
    assert "cars test: 20 images of 2 classes, as published" in capsys.readouterr().out


def test_inshop_got_by_hand_is_checked_by_its_counts(
    root, by_hand, archives, tmp_path, capsys, monkeypatch
):
    by_hand("Inshop", {IMAGES: None, LIST: None})
    line = fails_to_get("inshop", root, capsys)
    assert all(f"{root / file} (MD5 not known) is missing" in line for file in (IMAGES, LIST))
    assert f"get it by hand from {dataset.inshop.SOURCE}" in line
    for file in (IMAGES, LIST):
        (root / file).parent.mkdir(parents=True)
    (root / IMAGES).write_bytes(archives["Inshop"])
    made = make_inshop(tmp_path / "made") / LIST
    (root / LIST).write_bytes(made.read_bytes())
    get("inshop", root)
    assert "Inshop query: 7 images of 4 classes, as published" in capsys.readouterr().out
    monkeypatch.setitem(dataset.inshop.PUBLISHED, "query", (8, 4))
    line = fails_to_get("inshop", root, capsys)
    assert "Inshop query: found 7 images of 4 classes, the published split has 8 images" in line
    assert f"move away what was unpacked from {root / IMAGES} and {root / LIST}" in line


def test_an_archive_that_cannot_be_unpacked_ends_in_one_line(root, by_hand, archives, capsys):
    by_hand("Inshop", {IMAGES: None})
    (root / IMAGES).parent.mkdir(parents=True)
    for content in (b"", b"no archive", archives["Inshop"][:-500], archives["SOP"]):
        (root / IMAGES).write_bytes(content)
        assert f"{root / IMAGES}: cannot be unpacked (" in fails_to_get("inshop", root, capsys)
        assert names((root / IMAGES).parent) == ["img.zip"]


@pytest.mark.parametrize("name", ["demo", "folder", "list.csv", "birds"])
def test_a_name_without_a_download_is_refused_in_one_line(here, capsys, name):
    line = fails(name, capsys, download.main)
    assert name in line and "choose from" in line
    assert not Path("data").exists()


def test_only_the_default_data_root_is_created(here, offer, capsys):
    offer("cub")
    assert "--data-root nowhere: no such folder" in fails_to_get("cub", "nowhere", capsys)
    download.main(["cub"])
    assert names(here) == ["data"] and names(here / "data") == [CUB, f"{CUB}.tgz"]