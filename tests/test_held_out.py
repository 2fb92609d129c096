"""Held-out classes choose the epoch, and the test images are evaluated once, at the end."""

import json
import shlex
import subprocess

import pytest
import torch

import compare
import evaluate
import train
from retrieval.metrics import precision_at_r
from runs import start
from runs.results import remarks_on, results_of
from tests.conftest import TINY, checkpoint_of, fails, make_cub, make_folder, metrics, run_folder

HELD = TINY.replace("--batch-size 8", "--batch-size 4") + "--val-classes 0.25 "
NUMBERS = [f"R@{k}" for k in (1, 2, 4, 8)] + ["MAP@R", "R-Precision"]


@pytest.fixture
def cub(here):
    return make_cub(here / "data", classes=16)


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_held_out_classes_choose_the_epoch_and_test_images_are_read_only_at_the_end(
    here, monkeypatch
):
    names = [f"class {number}" for number in range(8)]
    make_folder(here / "photos/train", names)
    make_folder(here / "hidden", names[:3], first=50)
    original = train.test_once

    def test_once(*args):
        (here / "hidden").rename(here / "photos/test")
        return original(*args)

    monkeypatch.setattr(train, "test_once", test_once)
    train.main(shlex.split(HELD + "--dataset folder --data-root photos --epochs 4 --lr 1e-2"))
    folder, history = run_folder(here), metrics(run_folder(here))
    results = results_in(folder)
    chosen = max(history, key=lambda result: result["val/MAP@R"])
    assert results["chosen_by"] == "MAP@R of held-out classes"
    assert results["chosen"]["epoch"] == chosen["epoch"] and results["last"]["epoch"] == 3
    assert [name for name in chosen if "@" in name] == [f"val/{name}" for name in NUMBERS[:-1]]
    assert list(results["start"]["metrics"]) == [f"val/{name}" for name in NUMBERS]
    assert {split: each["classes"] for split, each in results["images"].items()} == {
        "train": 6, "val": 2, "test": 3, "train + val": 8,
    }  # fmt: skip
    for which, kind in (("chosen", "best"), ("last", "last")):
        evaluate.main(shlex.split(
            f"'{checkpoint_of(folder, kind)}' --workers 0 --metrics --json found.json"
        ))  # fmt: skip
        found = json.loads((here / "found.json").read_text())
        assert {name: results[which]["metrics"][name] for name in NUMBERS} == {
            name: found[name] for name in NUMBERS
        }  # fmt: skip
    text = next(folder.glob("*_best_results.txt")).read_text()
    assert "best by MAP@R of held-out classes; test images had no part in that" in text


def test_patience_ends_a_run_that_gets_no_better_and_resume_says_it_is_finished(cub, here, capsys):
    flags = HELD + "--patience 2 --lr 0 --epochs 50 "
    train.main(shlex.split(flags))
    assert [result["epoch"] for result in metrics(run_folder(here))] == [0, 1, 2]
    assert "_patience2_" in run_folder(here).name and "_val0.25_" in run_folder(here).name
    train.main(shlex.split(flags + "--resume"))
    assert "is finished: 3 of 50 epochs are done, --patience 2 ended" in capsys.readouterr().out


def test_a_run_killed_before_its_test_is_left_out_by_compare(cub, capsys, monkeypatch):
    train.main(shlex.split(HELD + "--seed 2"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "test_once", None)
        with pytest.raises(TypeError):
            train.main(shlex.split(HELD))
    capsys.readouterr()
    compare.main(["logs"])
    out = capsys.readouterr().out
    assert "without results.json; python train.py --resume" in out and " 1x1    chosen " in out
    train.main(shlex.split(HELD + "--resume"))
    compare.main(["logs"])
    assert " 2x1    chosen " in capsys.readouterr().out


def test_a_continued_run_with_held_out_classes_ends_as_an_uninterrupted_one(cub, here):
    train.main(shlex.split(HELD + "--LOG_DIR whole"))
    train.main(shlex.split(HELD + "--epochs 1"))
    train.main(shlex.split(HELD + "--resume"))
    whole, continued = (results_in(next(here.glob(f"{logs}/*/*"))) for logs in ("whole", "logs"))
    assert whole == continued


def test_with_lr_0_the_scores_before_training_equal_the_last(cub, here):
    train.main(shlex.split(TINY + "--lr 0 --weight-decay 0"))
    results = results_in(run_folder(here))
    assert results["start"]["metrics"] == results["last"]["metrics"]
    assert results["start"]["epoch"] is None


def test_a_last_epoch_worse_than_the_start_is_remarked_on():
    history = [{"epoch": 0, "R@1": 30.0}, {"epoch": 1, "R@1": 20.0}]
    worse = "The last epoch is worse than the network before training: R@1 20.00 after"
    assert remarks_on(results_of(history, {"R@1": 25.0}))[-1].startswith(worse)
    assert len(remarks_on(results_of(history, {"R@1": 15.0}))) == 1
    assert len(remarks_on(results_of(history))) == 1


def test_frozen_random_weights_are_warned_of(cub, capsys):
    train.main(shlex.split(TINY + "--epochs 1"))
    assert "use --warm 0 --bn-freeze 0" in capsys.readouterr().err
    train.main(shlex.split(TINY + "--epochs 1 --warm 0 --bn-freeze 0"))
    assert "--bn-freeze 0" not in capsys.readouterr().err


@pytest.mark.parametrize("flags, line", [
    ("--val-classes 1",                    "--val-classes: invalid share (above 0, below 1)"),
    ("--val-classes 0.25 --fold 4",        "--fold 4: --val-classes 0.25 makes folds 0 to 3"),
    ("--val-classes 0.1",                  "of 8 classes, 1 would be held out and 7 train"),
    ("--val-classes 0.001",                "of 8 classes, 0 would be held out and 8 train"),
    ("--patience 3",                       "--patience: needs --val-classes"),
    ("--fold 1",                           "--fold: needs --val-classes"),
    ("--val-classes 0.5 --train-on all",   "leaves no class for --val-classes"),
])  # fmt: skip
def test_bad_flags_of_held_out_classes_end_in_one_line(cub, here, capsys, flags, line):
    assert line in fails(TINY + flags, capsys)
    assert not (here / "logs").exists()


def test_uncommitted_changes_are_those_of_python_files_and_not_of_the_readme(
    here, monkeypatch
):
    (here / "runs").mkdir()
    for name in ("losses.py", "README.md", "runs/start.py"):
        (here / name).write_text("as committed")
    author = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    monkeypatch.setattr(start, "__file__", str(here / "runs/start.py"))

    def changed():
        start.git.cache_clear()
        return start.describe_process([], torch.device("cpu"))["uncommitted_changes"]

    try:
        (here / "README.md").write_text("other rows")
        assert not changed()
        (here / "losses.py").write_text("another loss")
        assert changed()
    finally:
        start.git.cache_clear()


def test_a_fold_of_one_class_is_refused_where_another_has_two(here, capsys):
    names = [f"class {number}" for number in range(6)]
    make_folder(here / "photos/train", names)
    make_folder(here / "photos/test", names[:2], first=50)
    flags = HELD + "--dataset folder --data-root photos --epochs 1 --fold "
    assert "of 6 classes, 1 would be held out and 5 train" in fails(flags + "1", capsys)
    train.main(shlex.split(flags + "0"))


def test_map_at_r_is_computed_on_the_held_out_images(cub, here, monkeypatch):
    seen = []
    monkeypatch.setattr("retrieval.evaluate.precision_at_r",
                        lambda x, y, *rest: seen.append(len(x)) or precision_at_r(x, y, *rest))
    train.main(shlex.split(HELD + "--epochs 1"))
    assert seen == [20, 20, 80, 80]  # before, after the epoch; the test images by last and chosen
