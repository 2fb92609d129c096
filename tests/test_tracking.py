"""What wandb gets, and what happens without it."""

import json
import shlex
import struct
import sys
from urllib.parse import urlparse

import pytest
import yaml
from PIL import Image

import train
from retrieval.picture import draw_neighbours
from runs import finish, tracking
from runs.naming import setting_name
from tests import forked
from tests.conftest import ROOT, TINY, fails, make_cub, metrics, run_folder
from utils import Interrupted


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


def the_run(records):
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    return run


def values(items):
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def history_of(records):
    return [values(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]


def newest_offline_run(folder):
    import wandb

    wandb.teardown()  # the file is written by a process of wandb's own, complete once that ends
    for old in sorted(folder.glob("wandb/offline-run-*"))[:-1]:
        old.rename(folder / "wandb" / f"old-{old.name}")
    return read_offline_run(folder)


def test_an_offline_wandb_run_holds_what_people_look_at(here, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.setattr(finish, "draw_neighbours", draw_neighbours)
    monkeypatch.setattr(finish, "log_picture", tracking.log_picture)
    make_cub(here / "data")
    train.main(shlex.split(TINY.replace("--wandb disabled", "--wandb auto")))
    folder = run_folder(here)
    records = newest_offline_run(folder)
    run = the_run(records)
    group = "cub-ddml-al1-be0.1-gam1e-05-batch8-embedding8-size32-toy-weightsnone"
    assert run.project == "cub_DDML+PA" and run.display_name == f"{group}-s1"
    assert run.run_group == group and set(run.tags) == {"Proxy_Anchor", "DDML", "toy"}
    config = values(run.config.update)
    described = json.loads((folder / "args.json").read_text())
    assert config.items() >= described["flags"].items()
    assert config["al"] == 1 and config["batch_size"] == 8 and config["lr_decay_gamma"] == 0.5
    assert config["versions"] == described["versions"] and config["commit"] == described["commit"]
    assert config["data"]["test"] == {"images": 20, "classes": 2}

    defined = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert {metric.name or metric.glob_name for metric in defined} == {"epoch", "*"}
    for row, record in zip(history_of(records), metrics(folder), strict=True):
        assert row["_step"] == row["epoch"] == record["epoch"]
        for name in ("loss", "metric", "agnostic", "specific", "split", "lr", "seconds",
                     "images_per_second"):  # fmt: skip
            assert row[name] == record[name]
        for k in (1, 2, 4, 8, 16, 32):
            assert row[f"R@{k}"] == pytest.approx(record[f"R@{k}"] / 100)
    assert ["retrieval" in row for row in history_of(records)] == [False, True]
    (picture,) = folder.glob("wandb/offline-run-*/files/media/images/retrieval_1_*.png")
    assert Image.open(picture).width > 500
    (offline,) = folder.glob("wandb/offline-run-*")
    out, err = capfd.readouterr()
    assert out.endswith(f"\n  wandb: wandb sync {offline.relative_to(here)}\n")
    assert (out + err).count("wandb") == 4  # "wandb: wandb sync .../wandb/...": none of its own
    summary = summary_of(records)
    best = max(metrics(folder), key=lambda record: record["R@1"])
    assert summary["best/epoch"] == best["epoch"] and summary["last/epoch"] == 1
    assert summary["best/R@1"] == pytest.approx(best["R@1"] / 100)


def summary_of(records):
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= values(record.summary.update)
    return summary


def test_a_plain_run_is_not_called_ddml_and_the_environment_names_it(here, monkeypatch):
    make_cub(here / "data")
    command = TINY.replace("--wandb disabled", "--wandb offline") + "--epochs 1 --disent False "
    train.main(shlex.split(command + "--seed 2"))
    run = the_run(newest_offline_run(run_folder(here)))
    group = "cub-Proxy_Anchor-batch8-embedding8-size32-toy-weightsnone"
    assert (run.display_name, run.run_group) == (f"{group}-s2", group)
    assert set(run.tags) == {"Proxy_Anchor", "plain", "toy"}
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first")
    train.main(shlex.split(command + "--LOG_DIR other"))
    (folder,) = here.glob("other/*/*")
    run = the_run(newest_offline_run(folder))
    assert (run.project, run.display_name) == ("mine", "first")


def test_a_resumed_offline_run_is_the_same_run_with_every_epoch_once(here):
    make_cub(here / "data")
    command = TINY.replace("--wandb disabled", "--wandb offline")
    train.main(shlex.split(command + "--epochs 2"))
    folder = run_folder(here)
    first = the_run(newest_offline_run(folder))
    train.main(shlex.split(command + "--epochs 3 --resume"))
    records = newest_offline_run(folder)
    again = the_run(records)
    assert again.run_id == first.run_id
    assert values(again.config.update)["alpha"] == values(first.config.update)["alpha"]
    assert [row["_step"] for row in history_of(records)] == [0, 1, 2]


@pytest.mark.parametrize("error", [Interrupted(15), ValueError("a bug")])
def test_a_signal_is_no_failure_of_the_run(here, monkeypatch, error):
    make_cub(here / "data")

    def fail(*args):
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(type(error)):
        train.main(shlex.split(TINY.replace("--wandb disabled", "--wandb offline")))
    kinds = [r.WhichOneof("record_type") for r in newest_offline_run(run_folder(here))]
    assert ("preempting" in kinds) == isinstance(error, Interrupted)


def test_the_sweep_gives_flags_of_train_py():
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert sweep["program"] == "train.py" and "${args}" in sweep["command"]
    flags = [f"--{name}={(p.get('values') or [p.get('value', p.get('min'))])[0]}"
             for name, p in sweep["parameters"].items()]  # fmt: skip
    args = train.build_parser().parse_args(flags)
    assert (args.dataset, args.disent, args.al) == ("cub", True, 0.1)


def test_the_summary_of_a_held_out_run_has_what_the_sweep_maximises_and_the_test_result(here):
    make_cub(here / "data", classes=16)
    command = TINY.replace("--wandb disabled", "--wandb offline") + "--epochs 1 --val-classes 0.25"
    train.main(shlex.split(command))
    records, (folder,) = newest_offline_run(run_folder(here)), here.glob("logs/*/*")
    run, summary = the_run(records), summary_of(records)
    results = json.loads((folder / "results.json").read_text())
    for name in ("start", "chosen", "last"):
        for metric, percent in results[name]["metrics"].items():
            assert summary[f"{name}/{metric}"] == pytest.approx(percent / 100)
    assert "chosen/R@1" in summary and run.display_name == f"{run.run_group}-f0-s1"
    assert yaml.safe_load((ROOT / "sweep.yaml").read_text())["metric"]["name"] in summary


def test_a_long_setting_keeps_a_name_of_its_own():
    parser = train.build_parser()
    names = [setting_name(parser.parse_args([f"--dataset={'x' * 120}.csv", f"--lr={lr}"]), parser)
             for lr in (1, 2)]  # fmt: skip
    assert len(set(names)) == 2 and all(len(name) <= 100 for name in names)


def train_without_wandb():
    train.main(shlex.split(TINY + "--epochs 1"))
    assert "wandb" not in sys.modules


def test_wandb_disabled_imports_nothing(here):
    make_cub(here / "data")
    process = forked.start(train_without_wandb)
    process.join(60)
    assert process.exitcode == 0, (here / "err").read_text()


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
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--wandb offline --epochs 1"))
    first = the_run(newest_offline_run(run_folder(here)))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    train.main(shlex.split(TINY + "--wandb auto --epochs 2 --resume"))
    assert "wandb cannot be reached, logging offline (no network)" in capsys.readouterr().err
    assert the_run(newest_offline_run(run_folder(here))).run_id == first.run_id
    assert "no network; use --wandb offline" in fails(TINY + "--wandb online --remark 2", capsys)


def test_an_error_in_a_run_that_wandb_follows_is_still_one_line(here, capsys):
    make_cub(here / "data")
    (here / "data/CUB_200_2011/images/001.Bird_0/Bird_0003.jpg").write_bytes(b"torn")
    assert "Bird_0003.jpg" in fails(TINY + "--wandb offline", capsys)
    assert "Bird_0003.jpg" in fails(TINY + "--wandb offline --resume", capsys)
