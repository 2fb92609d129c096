"""train.py and evaluate.py from the command line to the files they leave, on real JPEGs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from losses import LOSSES, PROXY_LOSSES
from net.backbones import BACKBONES
from runs.results import AT_THE_HEADS, TERMS
from tests import kill
from tests.conftest import (
    ROOT,
    TINY,
    checkpoint_of,
    fails,
    make_cars,
    make_cub,
    make_sop,
    metrics,
    published_checkpoint,
    run_folder,
)

SMALL = "--epochs 2 --weights none --image-size 32 --batch-size 16"


def published_commands():
    """The commands of README and docs/reproduction.md, by data set."""
    pages = (ROOT / "README.md", ROOT / "docs/reproduction.md")
    text = "".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = re.findall(r"^python train\.py (.*--loss Proxy_Anchor.*--gam.*)$", text, re.M)
    return {re.search(r"--dataset (\w+)", command)[1]: command for command in commands}


PUBLISHED = [
    ("cub", make_cub, "logs_cub", "al1.0_be0.1_gam1e-05_adamw_lr0.0001", (1, 2, 4, 8, 16, 32)),
    ("car", make_cars, "logs_cars", "al1.0_be0.1_gam0.001_adamw_lr0.0001", (1, 2, 4, 8, 16, 32)),
    ("SOP", make_sop, "logs_SOP", "al1.0_be1.0_gam0.0001_adamw_lr0.0006", (1, 10, 100, 1000)),
]


@pytest.mark.parametrize("name, make, logs, weights, ks", PUBLISHED)
def test_published_command_trains_and_its_best_checkpoint_evaluates_to_the_same_recalls(
    here, capsys, monkeypatch, name, make, logs, weights, ks
):
    if name != "cub":  # once is enough of what takes long and is the same
        monkeypatch.setitem(BACKBONES, "bn_inception", BACKBONES["toy"])
    make(here / "data")
    command = published_commands()[name]
    assert "--batch-size 180 " in command  # all else is in the folder's name
    train.main(shlex.split(f"{command} {SMALL} --wandb disabled"))

    folder = run_folder(here)
    assert folder.parent.name == logs
    name = f"bn_inception_Proxy_Anchor_embedding512_{weights}_batch16"
    assert folder.name == f"{name}_size32_weightsnone"
    prefix = f"{logs.removeprefix('logs_')}_bn_inception"
    assert {path.name for path in folder.iterdir()} == {
        f"{prefix}_best.pth", f"{prefix}_last.pth", f"{prefix}_best_results.txt", "args.json",
        "metrics.jsonl", "results.json", "curves.png", "page.html", ".lock",
    }  # fmt: skip
    records = metrics(folder)
    assert [record["epoch"] for record in records] == [0, 1]
    for record in records:
        keys = ["epoch", "loss", *TERMS, *AT_THE_HEADS, "lr", "seconds", "seconds_data",
                "seconds_step", "seconds_eval", "images_per_second"]  # fmt: skip
        assert list(record) == keys + [f"R@{k}" for k in ks]
        assert all(isinstance(value, (int, float)) for value in record.values())
    described = json.loads((folder / "args.json").read_text())
    assert described["flags"]["gam"] == float(re.search(r"gam([^_]+)", weights)[1])
    assert {"command", "versions", "device"} < described.keys()

    best = records[0] if records[0]["R@1"] >= records[1]["R@1"] else records[1]
    results = (folder / f"{prefix}_best_results.txt").read_text()
    assert f"Best Epoch: {best['epoch']}\nBest Recall@1: {best['R@1']:.4f}\n" in results
    assert f"Last Epoch: 1\nLast Recall@1: {records[1]['R@1']:.4f}\n" in results
    assert "chosen on the test images" in results
    printed = capsys.readouterr().out
    for which, record in (("best", best), ("last", records[1])):
        values = "  ".join(f"R@{k} {record[f'R@{k}']:.2f}" for k in ks)
        assert f"\n{which}: epoch {record['epoch']}  {values}\n" in printed
    assert f"\n  to look at: {(folder / 'page.html').as_uri()}\n" in printed

    evaluate.main(["--resume", str(folder / f"{prefix}_best.pth"), "--json", "recalls.json"])
    recalls = {key: best[key] for key in best if key.startswith("R@")}
    found = json.loads(Path("recalls.json").read_text())
    assert found.items() >= {
        **recalls, "dataset": logs.removeprefix("logs_"), "data_root": "./data", "split": "test",
        "checkpoint": str(folder / f"{prefix}_best.pth"), "epoch": best["epoch"],
    }.items()  # fmt: skip
    stored = json.loads((folder / "results.json").read_text())
    assert stored.keys() < found.keys() and found["chosen"] == stored["chosen"]
    assert found["images"]["test"] == stored["images"]["test"]
    printed = capsys.readouterr().out
    for key, value in recalls.items():
        assert f"\n{key} : {value:.3f}\n" in printed


def test_script_starts_as_a_command_and_reports_a_user_error_with_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "cub", "--weights", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("train.py: error: no cub data set under")
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_without_disent_proxy_anchor_trains_alone(here):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--disent False --epochs 1"))
    state = torch.load(checkpoint_of(run_folder(here)))["model_state_dict"]
    assert "model.embedding_specific.weight" not in state
    (record,) = metrics(run_folder(here))
    assert record["loss"] == record["metric"] and record["agnostic"] is None


def test_disent_takes_what_users_type():
    parse = train.build_parser().parse_args
    for flags in ("", "--disent False", "--disent no", "--disent 0"):
        assert parse(flags.split()).disent is False
    for flags in ("--disent", "--disent True", "--disent YES", "--disent 1"):
        assert parse(flags.split()).disent is True


def test_resume_of_a_finished_run_says_so_and_changes_nothing(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY))
    before = {path: path.read_bytes() for path in run_folder(here).iterdir()}
    assert train.main(shlex.split(TINY + "--resume")) is None
    assert "is finished: 2 of 2 epochs" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in run_folder(here).iterdir()}


def test_resume_before_the_first_epoch_was_finished_starts_there(run):
    for path in run.iterdir():
        if path.name != "args.json":
            path.unlink()
    train.main(shlex.split(TINY + "--resume"))
    assert len(metrics(run)) == 2


def test_overwrite_starts_anew_in_the_same_folder(run):
    before = metrics(run)
    train.main(shlex.split(TINY + "--epochs 1 --overwrite"))
    assert len(metrics(run)) == 1 and metrics(run) != before  # the times are others


def test_a_published_checkpoint_evaluates_and_starts_a_run_but_is_not_resumed(here, capsys):
    make_cub(here / "data")
    path = published_checkpoint(here / "published.pth")
    evaluate.main(shlex.split(f"--resume {path} --dataset cub --image-size 32 --workers 0"))
    assert re.search(r"^R@32 : \d+\.\d{3}$", capsys.readouterr().out, re.M)
    assert f"--weights {path}" in fails(f"--resume {path}", capsys)
    train.main(shlex.split(
        TINY + f"--model bn_inception --weights {path} --embedding-size 512 --epochs 1"
    ))  # fmt: skip
    assert len(metrics(run_folder(here))) == 1


def test_a_run_folder_in_use_is_left_alone(here, run, capsys):
    before = {path: path.read_bytes() for path in run_folder(here).iterdir()}
    error = fails(TINY, capsys)
    assert str(run_folder(here).relative_to(here)) in error
    assert "--resume" in error and "--overwrite" in error
    assert before == {path: path.read_bytes() for path in run_folder(here).iterdir()}


@pytest.mark.parametrize("cache", ["ram", "gpu"])
def test_a_run_with_cached_images_is_the_same_run(here, cache):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--LOG_DIR whole"))
    train.main(shlex.split(TINY + f"--epochs 1 --cache {cache}"))
    train.main(shlex.split(TINY + f"--resume --cache {cache} --workers 1"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_cuda_leaves_a_checkpoint_that_evaluates_on_any_device(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--gpu-id 0 --workers 2"))
    evaluate.main(["--resume", str(next(run_folder(here).glob("*_best.pth")))])
    assert "R@1 : " in capsys.readouterr().out


# --- every loss and backbone, from training to evaluation ---------------------------------------

COMBINATIONS = [
    *(f"--loss {loss} --disent False --IPC 4" for loss in LOSSES),
    *(f"--loss {loss}" for loss in PROXY_LOSSES),
    *(f"--model {name} --bn-freeze 0 --batch-size 20"
      for name in ("bn_inception", "resnet18", "timm/vit_tiny_patch16_224")),
    "--precision bf16", "--warm 0", "--bn-freeze 0",
]  # fmt: skip


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_it_trains_resumes_and_evaluates_to_the_same_recalls(here, flags):
    make_cub(here / "data")
    command = TINY + "--lr-decay-step 1 " + flags
    train.main(shlex.split(command + " --epochs 1"))
    proxies = torch.load(checkpoint_of(run_folder(here)))["criterion_state_dict"]
    train.main(shlex.split(command + " --epochs 2 --resume"))
    train.main(shlex.split(command + " --epochs 2 --LOG_DIR whole"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))
    resumed = torch.load(checkpoint_of(run_folder(here)))["criterion_state_dict"]
    assert proxies.keys() == resumed.keys()
    assert not any(torch.equal(proxies[key], resumed[key]) for key in proxies)

    last = checkpoint_of(run_folder(here))
    evaluate.main(["--resume", str(last), "--workers", "0", "--json", "recalls.json"])
    trained = metrics(run_folder(here))[-1]
    recalls = json.loads(Path("recalls.json").read_text())
    assert recalls.items() >= {k: v for k, v in trained.items() if k.startswith("R@")}.items()
