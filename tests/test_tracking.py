"""What wandb gets, and what happens without it."""

import json
import shlex
import struct
import subprocess
import sys
from urllib.parse import urlparse

import pytest

import train
from runs import tracking
from tests.conftest import ROOT, TINY, fails, make_cub, metrics, run_folder


def read_offline_run(folder):
    """The records of an offline run's file: LevelDB's log format after wandb's 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_an_offline_wandb_run_holds_the_project_every_flag_and_every_epochs_numbers(here):
    import wandb

    make_cub(here / "data")
    train.main(shlex.split(TINY.replace("--wandb disabled", "--wandb auto")))
    folder = run_folder(here)
    wandb.teardown()  # the file is written by a process of wandb's own, complete once that ends
    records = read_offline_run(folder)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert run.project == "cub_DDML+PA"
    flags = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert flags.items() >= json.loads((folder / "args.json").read_text())["flags"].items()
    assert flags["al"] == 1 and flags["batch_size"] == 8 and flags["lr_decay_gamma"] == 0.5

    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    for row, record in zip(history, metrics(folder), strict=True):
        assert row["_step"] == record["epoch"]
        assert row["loss"] == record["loss"]
        for k in (1, 2, 4, 8, 16, 32):
            assert row[f"R@{k}"] == pytest.approx(record[f"R@{k}"] / 100)


def test_wandb_disabled_imports_nothing(tmp_path):
    make_cub(tmp_path / "data")
    script = (
        "import sys, train, tests.toy\ntrain.main(sys.argv[1:])\nassert 'wandb' not in sys.modules"
    )
    command = [sys.executable, "-c", script, *shlex.split(TINY + "--epochs 1")]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_wandb_is_online_only_with_an_account(monkeypatch, tmp_path):
    import wandb

    assert tracking.wandb_mode("auto") == "offline"
    host = urlparse(wandb.Settings().base_url).hostname
    (tmp_path / "no_netrc").write_text(f"machine {host} login user password secret\n")
    assert tracking.wandb_mode("auto") == tracking.wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode("auto") == "disabled"


def test_with_an_account_but_no_network_wandb_falls_back_to_offline(here, monkeypatch, capsys):
    import wandb

    def init(mode, **settings):
        if mode == "online":
            raise wandb.errors.CommError("no\nnetwork")
        return original(mode=mode, **settings)

    original = wandb.init
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--wandb auto --epochs 1"))
    assert "wandb cannot be reached, logging offline (no network)" in capsys.readouterr().err
    read_offline_run(run_folder(here))
    assert "no network; use --wandb offline" in fails(TINY + "--wandb online --remark 2", capsys)


def test_an_error_in_a_run_that_wandb_follows_is_still_one_line(here, capsys):
    make_cub(here / "data")
    (here / "data/CUB_200_2011/images/001.Bird_0/Bird_0003.jpg").write_bytes(b"torn")
    assert "Bird_0003.jpg" in fails(TINY + "--wandb offline", capsys)
    assert "Bird_0003.jpg" in fails(TINY + "--wandb offline --resume", capsys)
