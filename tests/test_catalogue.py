"""search.py --export: the embeddings of a gallery, in parts, by several processes, interrupted."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import search
from retrieval import catalogue
from tests.conftest import ROOT, checkpoint_of, fails, run_folder, write_image
from tests.test_distributed import finished, torchrun

FLAGS = "logs/logs_folder --gallery photos --part-size 10 --workers 0 --export"


def exported(capsys, flags):
    """What an export prints."""
    capsys.readouterr()
    search.main(shlex.split(flags))
    return capsys.readouterr().out


def parts_of(here, name):
    return sorted(path.name for path in here.glob(f"{Path(name).stem}.part-*"))


def rows_of(here, name):
    """{path: (class, embedding)} of all parts."""
    found = {}
    for part in parts_of(here, name):
        if part.endswith(".npz"):
            with np.load(part) as file:
                columns = [file[name] for name in ("paths", "class_names", "embeddings")]
            rows = [(str(path), str(label) or None, x) for path, label, x in zip(*columns)]
        else:
            table = pytest.importorskip("pyarrow.parquet").read_table(part).to_pylist()
            rows = [(row["path"], row["class"], row["embedding"]) for row in table]
        found |= {path: (label, np.float32(x)) for path, label, x in rows}
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, (label, x) in ours.items():
        assert theirs[path][0] == label
        np.testing.assert_allclose(theirs[path][1], x, atol=1e-6)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_folder_is_exported_in_parts_with_what_its_index_has(here, trained, capsys, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    (here / "photos/猫/фото 4.jpg").write_bytes(b"torn")
    out = exported(capsys, f"{FLAGS} out.{suffix}")
    assert f"{here}/out.part-00000.{suffix} and on: 4 parts written, 4 in all, 0 were there" in out
    assert out.endswith("; 31 embeddings, 1 skipped\n")
    assert parts_of(here, "out") == [f"out.part-0000{i}.{suffix}" for i in range(4)]
    exported(capsys, "logs/logs_folder --gallery photos --workers 0 --save-index g.npz")
    with np.load("g.npz") as index:
        expected = dict(zip(index["paths"].tolist(), ((None, x) for x in index["embeddings"])))
    assert_same(expected, rows_of(here, "out"))
    plan = json.loads(Path(f"out.{suffix}.json").read_text())
    assert plan["gallery"] == str(here / "photos") and plan["images"] == 32
    assert plan["run"] == str(here / checkpoint_of(trained, "best"))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_list_is_exported_with_its_classes_if_it_has_any(here, trained, capsys, labelled):
    names = ["猫/фото 1.jpg", "house wren/фото 2.jpg"]
    rows = [f"photos/{name}" + f",{name.split('/')[0]}" * labelled for name in names]
    Path("list.csv").write_text("\n".join(["path" + ",label" * labelled, *rows]))
    exported(capsys, "logs/logs_folder --gallery list.csv --workers 0 --export out.npz")
    classes = {path: label for path, (label, _) in rows_of(here, "out").items()}
    assert classes == {f"{here}/photos/{name}": name.split("/")[0] if labelled else None
                       for name in names}  # fmt: skip


def test_a_killed_export_goes_on_and_writes_only_what_is_missing(here, trained, capsys):
    exported(capsys, f"{FLAGS} whole.npz")
    command = [sys.executable, "-c", KILLED, "search.py", *shlex.split(f"{FLAGS} out.npz")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert parts_of(here, "out") == ["out.part-00000.npz", "out.part-00001.npz"]
    assert (here / ".out.part-00002.npz.tmp").exists()
    before = Path("out.part-00000.npz").stat().st_mtime_ns
    assert "2 parts written, 4 in all, 2 were there" in exported(capsys, f"{FLAGS} out.npz")
    assert Path("out.part-00000.npz").stat().st_mtime_ns == before
    assert_same(rows_of(here, "whole"), rows_of(here, "out"))
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    assert "0 parts written, 4 in all, 4 were there" in exported(capsys, f"{FLAGS} out.npz")


KILLED = """
import os, signal, sys
import numpy as np
from tests import toy
from retrieval import catalogue
import search

def savez(file, **arrays):  # the third part is torn
    saved(file, **arrays)
    if "part-00002" in file.name:
        file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)

saved, np.savez = np.savez, savez
search.main(sys.argv[2:])
"""


def test_two_processes_write_their_parts_and_a_killed_job_goes_on(here, trained, capsys):
    exported(capsys, f"{FLAGS} whole.npz")
    flags = FLAGS.replace("--part-size 10", "--part-size 3")
    finished(torchrun(2, f"tests.toy search.py {flags} out.npz"))
    said = Path("log").read_text()
    assert "6 parts written, 11 in all, 0 were there" in said and "5 parts written, its" in said
    assert_same(rows_of(here, "whole"), rows_of(here, "out"))
    for number in (0, 2, 4, 9):
        Path(f"out.part-{number:05d}.npz").unlink()
    finished(torchrun(2, f"tests.toy search.py {flags} out.npz"))
    said = Path("log").read_text()
    assert "2 parts written, 11 in all, 7 were there" in said and "2 parts written, its" in said
    assert_same(rows_of(here, "whole"), rows_of(here, "out"))
    assert torchrun(2, f"tests.toy search.py {flags.replace('--export', '--query')} A").wait(60)
    assert "several processes are for --export alone" in Path("log").read_text()


def test_a_process_that_finds_other_images_than_the_first_ends_in_a_line(
    here, trained, capsys, monkeypatch
):
    def of_rank_0(claimed):
        plan, missing = claimed()
        return {**plan, "list": "another"}, missing

    monkeypatch.setattr(catalogue, "from_rank_0", of_rank_0)
    line = fails(f"{FLAGS} out.npz", capsys, search.main)
    assert f"--gallery {here}/photos: this process finds other images" in line


def test_parts_of_something_else_are_never_mixed_with_new_ones(here, trained, capsys):
    exported(capsys, f"{FLAGS} out.npz")
    before = {part: (here / part).read_bytes() for part in parts_of(here, "out")}
    last = checkpoint_of(run_folder(here))
    write_image(here / "other/1.jpg", seed=1)
    for flags, what in (
        (f"{FLAGS} out.npz --part-size 9", "part_size"),
        (f"{FLAGS} out.npz --background black", "checkpoint"),
        (f"'{last}' --gallery photos --part-size 10 --workers 0 --export out.npz", "checkpoint"),
        (f"{FLAGS} out.npz --gallery other", "gallery"),
    ):
        line = fails(flags, capsys, search.main)
        assert "out.npz.json: the parts beside it are of another" in line and what in line
    write_image(here / "photos/猫/new.jpg", seed=2)
    assert "of another" in fails(f"{FLAGS} out.npz", capsys, search.main)
    assert {part: (here / part).read_bytes() for part in parts_of(here, "out")} == before
    assert "1 part written, 1 in all" in exported(
        capsys, f"{FLAGS} out.npz --gallery other --overwrite"
    )
    assert parts_of(here, "out") == ["out.part-00000.npz"]
    Path("out.npz.json").unlink()
    assert "out.npz.json: cannot be read" in fails(f"{FLAGS} out.npz", capsys, search.main)


@pytest.mark.parametrize("flags, line", [
    ("--gallery photos --export out.csv", "--export out.csv: must end in .npz or .parquet"),
    ("--gallery photos --export nowhere/out.npz", "--export nowhere/out.npz: not a file's path"),
    ("--gallery g.npz --export out.npz", "--export embeds a folder or a list; an index is"),
    ("--gallery photos --export out.npz --save-index g.npz", "an index is a file of its own"),
    ("--gallery nowhere --export out.npz", "nowhere: no such folder"),
    ("--gallery photos --export out.npz --part-size 0", "--part-size: invalid number"),
])  # fmt: skip
def test_a_bad_export_ends_in_one_line(here, trained, capsys, flags, line):
    assert line in fails(f"'{trained}' {flags} --workers 0", capsys, search.main)
