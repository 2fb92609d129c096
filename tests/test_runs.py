"""Which folder a run is in, what continues it, what it keeps on the disk, and how it ends."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import compare
import evaluate
import search
import sweep
import train
import utils
from runs import finish
from runs.finish import draw_curves
from runs.folder import RunFolder
from runs.naming import run_folder_path
from storage import read_checkpoint
from tests import kill
from tests.conftest import (
    ROOT,
    TINY,
    checkpoint_of,
    fails,
    make_cub,
    make_folder,
    metrics,
    run_folder,
)


def name_of(flags):
    parser = train.build_parser()
    path = run_folder_path(parser.parse_args(shlex.split(flags)), parser)
    return path.name.removeprefix("bn_inception_Proxy_Anchor_embedding512_")


CARS = "--dataset car --lr-decay-step 20 --disent True --al 1.0 --be 0.1 --gam 0.001"
SOP = ("--dataset SOP --lr 6e-4 --bn-freeze 0 --lr-decay-step 20 --lr-decay-gamma 0.25 "
       "--disent True --al 1.0 --be 1.0 --gam 0.0001")  # fmt: skip
PLAIN = "al0.0_be0.0_gam0.0_adamw_lr0.0001_batch180"


@pytest.mark.parametrize("flags, name", [
    (CARS, "al1.0_be0.1_gam0.001_adamw_lr0.0001_batch180"),
    (SOP, "al1.0_be1.0_gam0.0001_adamw_lr0.0006_batch180"),
    (CARS.replace("20", "10"), "al1.0_be0.1_gam0.001_adamw_lr0.0001_batch180_decay10"),
    ("--alpha 32 --mrg 0.1 --proxy-lr-factor 100 --epochs 9 --workers 1 --cache ram", PLAIN),
    ("--alpha 16 --warm 0 --image-size 96", f"{PLAIN}_alpha16_size96_warm0"),
    ("--weights /some/net.pth --IPC 4 --ks 1 5 --seed 3 --remark _x",
     f"{PLAIN}_IPC4_ks1-5_weightsnet.pth_seed3_x"),
    ("--remark x", f"{PLAIN}_x"),
    ("--ks 32 1 2 4 8 16", PLAIN),
    ("--al 1 --be 1", PLAIN),  # without --disent they weigh nothing
    ("--disent True", f"{PLAIN}_disent"),
    ("--train-on all --l2-norm 0", f"{PLAIN}_l2norm0_onall"),
    ("--dataset folder --data-root 'my/wild birds'", f"{PLAIN}_wild birds"),
    ("--dataset folder --data-root my/birds/..", f"{PLAIN}_my"),
    ("--dataset cub --data-root elsewhere", PLAIN),
    ("--dataset list.csv --data-root elsewhere", PLAIN),
    ("--deterministic --weight-decay 1.0000001e-4", f"{PLAIN}_deterministic1_wd0.00010000001"),
])  # fmt: skip
def test_published_settings_have_published_names_and_any_other_is_appended(flags, name):
    assert name_of(flags) == name


def test_the_refusal_says_in_which_flags_the_run_found_there_differs(here, capsys):
    for place in "ab":
        make_folder(here / place / "photos")
    command = TINY + "--dataset folder --epochs 1 --data-root "
    train.main(shlex.split(command + "a/photos"))
    assert "of the same flags: continue it with --resume" in fails(command + "a/photos", capsys)
    error = fails(command + "b/photos", capsys)
    assert "other flags (--data-root b/photos, there a/photos): replace it with" in error


@pytest.mark.parametrize("flags", [
    TINY + "--resume", "--epochs 2 --resume {run}",
    "--epochs 2 --resume {run}/cub_toy_best.pth", "--epochs 2 --resume {run}/cub_toy_last.pth",
])  # fmt: skip
def test_a_run_is_found_by_its_flags_its_folder_or_a_checkpoint_in_it(here, run, flags):
    train.main(shlex.split(flags.format(run=run) + " --workers 0"))
    assert json.loads((run / "args.json").read_text())["flags"]["epochs"] == 2
    train.main(shlex.split(TINY + "--LOG_DIR whole"))
    kill.assert_same_run(run, next(here.glob("whole/*/*")))


@pytest.mark.parametrize("flags, line", [
    ("--resume --batch-size 16", "there is no run in logs/logs_cub/bn_inception_"),
    ("--resume --LOG_DIR nowhere", "there is no run in nowhere/logs_cub"),
    ("--resume {run} --lr 1", "was started with 0.0001; leave the flag out"),
    ("--resume {run} --LOG_DIR other", "leave --LOG_DIR out"),
    ("--resume empty", "there is no run in empty to continue; name its folder"),
])  # fmt: skip
def test_a_run_that_is_not_found_is_one_line(here, run, capsys, flags, line):
    Path("empty").mkdir()
    assert line in fails(flags.format(run=run), capsys)


def test_a_list_that_was_moved_continues_as_long_as_its_images_are_the_same(here, monkeypatch):
    make_folder(here / "a/photos", per_class=8)
    lines = [f"{path.parent.name}/{path.name},{path.parent.name}"
             for path in sorted((here / "a/photos").glob("*/*"))]  # fmt: skip
    lines = [f'photos/{line}'.replace('"', "") for line in lines if '"' not in line]
    (here / "a/list.csv").write_text("\n".join(["path,label", *lines]))
    train.main(shlex.split(TINY + "--dataset a/list.csv --epochs 1"))
    (here / "a").rename(here / "b")
    folder = run_folder(here)
    train.main(shlex.split(f"--resume {folder} --dataset ./b/list.csv --epochs 2 --workers 0"))
    assert len(metrics(folder)) == 2


def test_evaluate_takes_a_run_folder_or_a_checkpoint_and_says_where_it_was_trained(
    here, run, capsys
):
    for place in (f"{run}", f"--resume {run}", f"{run}/cub_toy_best.pth"):
        capsys.readouterr()
        evaluate.main(shlex.split(f"{place} --workers 0"))
        assert f"\n{run}/cub_toy_best.pth\nR@1 : " in capsys.readouterr().out
    make_folder(here / "own")
    evaluate.main(shlex.split(f"{run} --workers 0 --dataset folder --data-root own"))
    out = capsys.readouterr().out
    assert f"_best.pth: trained on cub, tested on folder ({here}/own)" in out
    assert "folder test: 16 images" in out


# --- on the disk ---------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_network_alone_and_a_finished_run_has_no_previous(run):
    assert sorted(path.name for path in run.glob("*.pth")) == [
        "cub_toy_best.pth", "cub_toy_last.pth",
    ]  # fmt: skip
    best = read_checkpoint(checkpoint_of(run, "best"))
    assert best.keys() == {"model_state_dict", "args", "history", "images", "trained_on"}


@pytest.mark.parametrize("flags", ["", "--disent False", "--metrics", "--train-on all --gam 0"])
def test_a_finished_run_has_its_curves_as_a_picture(here, monkeypatch, flags):
    monkeypatch.setattr(finish, "draw_curves", draw_curves)
    make_cub(here / "data")
    train.main(shlex.split(TINY + flags))
    with Image.open(run_folder(here) / "curves.png") as image:
        image.load()
        assert image.size[0] > 1000 and len(set(image.convert("L").tobytes())) > 20
        edges = (image.crop(box).convert("L").getextrema() for box in (
            (0, 0, 2, image.height), (image.width - 2, 0, *image.size)))  # fmt: skip
        assert all(edge == (255, 255) for edge in edges)  # nothing is cut


def test_the_curves_of_one_epoch_have_one_tick(run, monkeypatch):
    monkeypatch.setattr(finish, "png_of", lambda figure, dpi: figure)
    for axes in draw_curves(metrics(run)).axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low < tick < high] == [0]


def test_a_best_checkpoint_alone_starts_a_run_but_is_not_continued(here, run, capsys):
    best = shutil.copy(checkpoint_of(run, "best"), here / "net.pth")
    assert "evaluate.py takes it" in fails(f"--resume {best}", capsys)
    train.main(shlex.split(TINY + f"--epochs 1 --weights {best}"))
    assert len(list(here.glob("logs/*/*"))) == 2


def test_room_on_the_disk_is_asked_for_before_the_first_epoch(here, capsys, monkeypatch):
    make_cub(here / "data")
    free = SimpleNamespace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    error = fails(TINY, capsys)
    assert "a run's checkpoints take up to" in error and "use another --LOG_DIR" in error
    assert [path.name for path in run_folder(here).iterdir()] == [".lock"]
    free.free = 10**9
    train.main(shlex.split(TINY))


def test_the_room_asked_for_is_what_a_run_takes(here, monkeypatch):
    make_cub(here / "data")
    asked = []
    monkeypatch.setattr(RunFolder, "require_room", lambda folder, needed: asked.append(needed))
    train.main(shlex.split(TINY + "--model resnet18 --epochs 1 --warm 0"))
    taken = {path.name: path.stat().st_size for path in run_folder(here).glob("*.pth")}
    most = taken["cub_resnet18_best.pth"] + 3 * taken["cub_resnet18_last.pth"]
    assert 0.98 * most < asked[0] < 1.1 * most


# --- images that cannot be read ------------------------------------------------------------------


def torn(path):
    """Damage an image; returns what mends it."""
    data = path.read_bytes()
    path.write_bytes(data[:300])
    return lambda: path.write_bytes(data)


@pytest.mark.parametrize("where, workers", [
    ("002.Bird_1/Bird_0007.jpg", 0), ("002.Bird_1/Bird_0007.jpg", 2),
])  # fmt: skip
def test_what_was_trained_before_a_damaged_image_is_saved_and_goes_on_once_it_is_mended(
    here, capsys, where, workers
):
    images = make_cub(here / "data") / "CUB_200_2011/images"
    command = TINY + f"--batch-size 2 --epochs 1 --workers {workers} "
    train.main(shlex.split(command + "--LOG_DIR whole"))
    mend = torn(images / where)
    error = fails(command, capsys)
    assert f"{where}: not an image that can be read" in error
    assert "replace it; `python -m dataset.check` lists all such files; what was" in error
    saved = read_checkpoint(checkpoint_of(run_folder(here)))
    assert saved["history"] == [] and saved["partial"]["step"] < 10
    assert str(run_folder(here).relative_to(here)) in error

    again = error.split("continue with: python train.py ")[1]
    assert where in fails(again, capsys)
    mend()
    train.main(shlex.split(again))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


def test_after_a_damaged_image_was_removed_the_refusal_says_what_is_possible(here, run, capsys):
    next((here / "data").rglob("Bird_0005.jpg")).unlink()
    error = fails(f"--resume {run} --epochs 2", capsys)
    assert "started with other images" in error
    assert "put back what was removed" in error and f"--weights {run}/cub_toy_last.pth" in error


# --- how a run ends -------------------------------------------------------------------------------


def test_an_exception_in_training_ends_the_run_at_once_with_its_workers(here):
    make_cub(here / "data")
    program = """
import sys, time, train
from tests import toy
from utils import run

def train_step(*args):
    print(time.time())
    raise RuntimeError("a bug")

train.train_step = train_step
run(train.main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *shlex.split(TINY + "--workers 2")], cwd=here,
        capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert time.time() - float(done.stdout.splitlines()[-1]) < 10
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "RuntimeError: a bug"
    assert "Alarm" not in done.stderr


@pytest.mark.parametrize("main, name, flags, saved", [
    (train.main, "train_step", TINY + "--resume", True),
    (train.main, "train_step", TINY + "--remark _new --cache gpu", False),
    (evaluate.main, "evaluate", "{run} --workers 0", None),
])  # fmt: skip
def test_a_full_gpu_is_one_line_that_says_what_to_change_and_what_is_saved(
    run, capsys, monkeypatch, main, name, flags, saved
):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(sys.modules[main.__module__], name, full)
    line = fails(flags.format(run=run), capsys, main)
    cache = "--cache ram, " if "--cache" in flags else ""
    change = f"use {cache}a smaller --batch-size or --image-size, or --precision bf16"
    assert f"{change} (CUDA out of m" in line
    ends = {True: "what was trained is saved", False: "nothing was saved yet", None: "of memory)"}
    assert line.endswith(ends[saved])


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("main, flags, line", [
    (train.main, "--batchsize 8", "did you mean --batch-size?"),
    (train.main, "--bn_freeze 0", "did you mean --bn-freeze?"),
    (train.main, "--xyzzy", "unrecognized arguments: --xyzzy (--help"),
    (evaluate.main, "a.pth --jsn r.json", "did you mean --json?"),
])  # fmt: skip
def test_a_mistyped_flag_is_answered_with_the_nearest(capsys, main, flags, line):
    assert line in fails(flags, capsys, main)


def test_a_gpu_that_is_not_there_is_an_error_and_without_any_gpu_0_a_warning_if_it_was_named(
    monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert utils.choose_device().type == "cpu" and not capsys.readouterr().err
    assert utils.choose_device(0).type == utils.choose_device(-1).type == "cpu"
    assert capsys.readouterr().err.count("running on the CPU") == 2
    with pytest.raises(utils.UserError, match="--gpu-id 3: this machine has no CUDA device"):
        utils.choose_device(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(utils.UserError, match="--gpu-id 3: this machine has GPUs 0 to 1"):
        utils.choose_device(3)


def test_keep_best_leaves_what_evaluates_alone_and_says_so_to_resume(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--keep best"))
    assert [file.name for file in run_folder(here).glob("*.pth")] == ["cub_toy_best.pth"]
    evaluate.main([str(run_folder(here)), "--workers", "0"])
    with pytest.raises(utils.UserError, match="is finished, and --keep best has deleted"):
        train.main(shlex.split(TINY + "--resume"))


def test_ddml_with_weights_of_zero_is_warned_of(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--al 0 --be 0 --gam 0"))
    assert "trains the plain loss and an unused head" in capsys.readouterr().err
    assert run_folder(here).name.endswith("_disent_size32_weightsnone")


@pytest.mark.parametrize("script", [train, evaluate, search, compare, sweep])
def test_help_fits_a_terminal_and_says_what_every_flag_is_and_its_default(script):
    parser = script.build_parser()
    lines = parser.format_help().splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for action in parser._actions:
        assert action.help
        off = action.default is False or action.default in (None, "", "==SUPPRESS==")
        if not off and action.dest != "version":
            assert re.search(rf"\(default: (the run's, else )?{action.default}\)", text)


@pytest.mark.filterwarnings("ignore:'dataset.check' found in sys.modules")
def test_check_calls_itself_by_the_name_it_is_started_with(monkeypatch, capsys):
    for flags, stream in (("--help", "out"), ("--dataset x", "err")):
        monkeypatch.setattr(sys, "argv", ["-m", *flags.split()])
        with pytest.raises(SystemExit):
            runpy.run_module("dataset.check", run_name="__main__", alter_sys=True)
        said = capsys.readouterr()
        assert "python -m dataset.check" in getattr(said, stream)
        assert "check.py" not in said.out + said.err


def test_a_run_killed_while_it_draws_is_completed_by_resume(here, capsys, monkeypatch):
    make_cub(here / "data")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "results_page", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(shlex.split(TINY))
    folder = run_folder(here)
    assert not list(folder.glob("*_previous.pth")) and not list(folder.glob("*.html"))
    before = metrics(folder)
    train.main(shlex.split(TINY + "--resume"))
    assert (folder / "page.html").exists() and (folder / "curves.png").exists()
    assert metrics(folder) == before
    train.main(shlex.split(TINY + "--resume"))
    assert "is finished" in capsys.readouterr().out


def test_of_a_folder_of_runs_the_newest_is_evaluated(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1 --seed 2"))
    train.main(shlex.split(TINY + "--epochs 1"))
    (newest,) = here.glob("logs/*/*_weightsnone/*_best.pth")
    capsys.readouterr()
    evaluate.main(["logs/logs_cub", "--workers", "0"])
    assert f"\n{newest.relative_to(here)}\n" in capsys.readouterr().out
    train.main(shlex.split(TINY + "--epochs 1 --train-on all"))  # which has no best epoch
    line = fails("logs/logs_cub --workers 0", capsys, evaluate.main)
    assert "_onall_weightsnone/cub_toy_last.pth: trained on all classes" in line
