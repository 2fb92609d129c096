"""train.py and evaluate.py from the command line to the files they leave, on real JPEGs."""

import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch

import cli
import evaluate
import net
import runs
import tracking
import train
from net import create_model
from tests import kill
from tests.conftest import (
    ROOT,
    TINY,
    fails,
    make_cars,
    make_cub,
    make_sop,
    metrics,
    published_checkpoint,
    run_folder,
)

SMALL = "--epochs 2 --weights none --image-size 64 --batch-size 16"


def published_commands():
    """The commands of the README, by data set."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python train\.py (.*--loss Proxy_Anchor.*--gam.*)$", text, re.M)
    return {re.search(r"--dataset (\w+)", command)[1]: command for command in commands}


def test_readme_has_the_three_published_commands():
    common = (
        "--gpu-id 0 --loss Proxy_Anchor --model bn_inception --embedding-size 512 "
        "--batch-size 180 --lr "
    )
    assert {name: " ".join(command.split()) for name, command in published_commands().items()} == {
        "cub": common + "1e-4 --dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 10 "
        "--disent True --al 1.0 --be 0.1 --gam 0.00001",
        "car": common + "1e-4 --dataset car --warm 1 --bn-freeze 1 --lr-decay-step 20 "
        "--disent True --al 1.0 --be 0.1 --gam 0.001",
        "SOP": common + "6e-4 --dataset SOP --warm 1 --bn-freeze 0 --lr-decay-step 20 "
        "--lr-decay-gamma 0.25 --disent True --al 1.0 --be 1.0 --gam 0.0001",
    }


PUBLISHED = [
    ("cub", make_cub, "logs_cub", "al1.0_be0.1_gam1e-05_adamw_lr0.0001", (1, 2, 4, 8, 16, 32)),
    ("car", make_cars, "logs_cars", "al1.0_be0.1_gam0.001_adamw_lr0.0001", (1, 2, 4, 8, 16, 32)),
    ("SOP", make_sop, "logs_SOP", "al1.0_be1.0_gam0.0001_adamw_lr0.0006", (1, 10, 100, 1000)),
]


@pytest.mark.parametrize("name, make, logs, weights, ks", PUBLISHED)
def test_published_command_trains_and_its_best_checkpoint_evaluates_to_the_same_recalls(
    here, capsys, name, make, logs, weights, ks
):
    make(here / "data")
    train.main(shlex.split(f"{published_commands()[name]} {SMALL} --wandb disabled"))

    folder = run_folder(here)
    assert folder.parent.name == logs
    assert folder.name == f"bn_inception_Proxy_Anchor_embedding512_{weights}_batch16"
    prefix = f"{logs.removeprefix('logs_')}_bn_inception"
    assert {path.name for path in folder.iterdir()} == {
        f"{prefix}_best.pth", f"{prefix}_last.pth", f"{prefix}_previous.pth",
        f"{prefix}_best_results.txt", "args.json", "metrics.jsonl", ".lock",
    }  # fmt: skip
    records = metrics(folder)
    assert [record["epoch"] for record in records] == [0, 1]
    for record in records:
        keys = ["epoch", "loss", *train.TERMS, "lr", "seconds", "seconds_data", "seconds_step",
                "seconds_eval", "images_per_second"]  # fmt: skip
        assert list(record) == keys + [f"R@{k}" for k in ks]
        assert all(isinstance(value, (int, float)) for value in record.values())
    described = json.loads((folder / "args.json").read_text())
    assert described["flags"]["gam"] == float(re.search(r"gam([^_]+)", weights)[1])
    assert {"command", "versions", "device"} < described.keys()

    best = records[0] if records[0]["R@1"] >= records[1]["R@1"] else records[1]
    results = (folder / f"{prefix}_best_results.txt").read_text()
    assert f"Best Epoch: {best['epoch']}\nBest Recall@1: {best['R@1']:.4f}\n" in results
    assert f"Last Epoch: 1\nLast Recall@1: {records[1]['R@1']:.4f}\n" in results
    assert "chosen on the test set" in results and results in capsys.readouterr().out

    evaluate.main(["--resume", str(folder / f"{prefix}_best.pth"), "--json", "recalls.json"])
    recalls = {key: best[key] for key in best if key.startswith("R@")}
    assert json.loads(Path("recalls.json").read_text()) == recalls
    printed = capsys.readouterr().out
    for key, value in recalls.items():
        assert f"\n{key} : {value:.3f}\n" in printed


def test_script_starts_as_a_command_and_reports_a_user_error_with_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "cub", "--weights", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("train.py: error: no cub data set under")
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_without_disent_proxy_anchor_trains_alone_and_evaluates(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--disent False"))
    (best,) = run_folder(here).glob("*_best.pth")
    assert "model.embedding_specific.weight" not in torch.load(best)["model_state_dict"]
    record = metrics(run_folder(here))[-1]
    assert record["loss"] == record["metric"] and record["agnostic"] is None
    evaluate.main(["--resume", str(best), "--workers", "0"])
    assert "R@1 : " in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--disent False", "--disent no", "--disent 0"])
def test_disent_values_that_mean_no(flags):
    assert train.build_parser().parse_args(flags.split()).disent is False


@pytest.mark.parametrize("value", ["True", "true", "1", "yes", "YES", ""])
def test_disent_values_that_mean_yes(value):
    assert train.build_parser().parse_args(f"--disent {value}".split()).disent is True


@pytest.mark.parametrize("flags", ["", "--bn-freeze 0", "--warm 0", "--IPC 4"])
def test_a_resumed_run_ends_in_the_same_numbers_as_one_never_interrupted(here, flags):
    make_cub(here / "data")
    command = TINY.replace("--epochs 2", "--epochs 3 --lr-decay-step 1") + flags
    train.main(shlex.split(command + " --LOG_DIR whole"))
    train.main(shlex.split(command + " --LOG_DIR logs --epochs 1"))
    train.main(shlex.split(command + " --LOG_DIR logs --workers 2 --resume"))
    (whole,) = here.glob("whole/*/*")
    for first, second in zip(metrics(whole), metrics(run_folder(here)), strict=True):
        for key in set(first) - kill.TIMES:
            assert first[key] == second[key], key
    for name in ("cub_bn_inception_last.pth", "cub_bn_inception_best.pth"):
        first, second = torch.load(whole / name), torch.load(run_folder(here) / name)
        for part in ("model_state_dict", "criterion_state_dict"):
            assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])


def test_resume_by_path_takes_the_runs_own_flags(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1 --lr 3e-4"))
    last = run_folder(here) / "cub_bn_inception_last.pth"
    train.main(shlex.split(f"--resume {last} --epochs 2 --workers 0 --wandb disabled"))
    assert [record["lr"] for record in metrics(run_folder(here))] == [3e-4, 3e-4]
    error = fails(f"--resume {last} --epochs 3 --lr 1e-4", capsys)
    assert "--lr 0.0001" in error and "0.0003" in error


def test_resume_of_a_finished_run_says_so_and_changes_nothing(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY))
    before = {path: path.read_bytes() for path in run_folder(here).iterdir()}
    assert train.main(shlex.split(TINY + "--resume")) is None
    assert "is finished: 2 of 2 epochs" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in run_folder(here).iterdir()}


def test_resume_before_the_first_epoch_was_finished_starts_there(here):
    make_cub(here / "data")
    train.main(shlex.split(TINY))
    for path in run_folder(here).iterdir():
        if path.name != "args.json":
            path.unlink()
    train.main(shlex.split(TINY + "--resume"))
    assert len(metrics(run_folder(here))) == 2


def test_overwrite_starts_anew_in_the_same_folder(here):
    make_cub(here / "data")
    train.main(shlex.split(TINY))
    train.main(shlex.split(TINY + "--epochs 1 --overwrite"))
    assert len(metrics(run_folder(here))) == 1


def test_a_published_checkpoint_evaluates(here, capsys):
    make_cub(here / "data")
    path = published_checkpoint(here / "published.pth")
    evaluate.main(shlex.split(f"--resume {path} --dataset cub --image-size 64 --workers 0"))
    assert re.search(r"^R@32 : \d+\.\d{3}$", capsys.readouterr().out, re.M)


def test_a_checkpoint_with_wrong_keys_is_refused_by_name(here, capsys):
    def change(state):
        del state["model.conv2_3x3.bias"]
        state["model.extra"] = torch.ones(1)

    path = published_checkpoint(here / "published.pth", change)
    error = fails(f"--resume {path}", capsys, evaluate.main)
    assert "missing model.conv2_3x3.bias; unexpected model.extra" in error


def test_a_published_checkpoint_starts_a_run_by_weights_but_is_not_resumed(here, capsys):
    make_cub(here / "data")
    path = published_checkpoint(here / "published.pth")
    assert f"--weights {path}" in fails(f"--resume {path}", capsys)
    train.main(shlex.split(TINY + f"--weights {path} --embedding-size 512 --epochs 1"))
    assert len(metrics(run_folder(here))) == 1


def test_a_run_folder_in_use_is_left_alone(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY))
    before = {path: path.read_bytes() for path in run_folder(here).iterdir()}
    error = fails(TINY, capsys)
    assert str(run_folder(here).relative_to(here)) in error
    assert "--resume" in error and "--overwrite" in error
    assert before == {path: path.read_bytes() for path in run_folder(here).iterdir()}


@pytest.mark.parametrize("script, flags, status, line", [
    ("train.py",    "--help",               0, "--lr-decay-step"),
    ("train.py",    "--lr fast",            2, "train.py: error: argument --lr: invalid number"),
    ("train.py",    "--dataset birds",      2, "--dataset birds: unknown data set"),
    ("train.py",    "--resume --overwrite", 2, "not allowed with argument --resume"),
    ("evaluate.py", "--help",               0, "--resume CHECKPOINT"),
    ("evaluate.py", "",                     2, "required: --resume"),
    ("dataset/check.py", "--help",          0, "--workers"),
])  # fmt: skip
def test_help_and_mistakes_in_flags_need_no_torch(script, flags, status, line):
    program = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None  # to import it is an error now\n"
        f"sys.argv = [{script!r}, *{flags.split()}]\n"
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == status and line in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_flags_name_every_model():
    assert cli.MODELS == list(net.MODELS)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_run_with_cached_images_is_the_same_run(here, kind):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--LOG_DIR whole"))
    train.main(shlex.split(TINY + f"--epochs 1 --cache {kind}"))
    train.main(shlex.split(TINY + f"--resume --cache {kind} --workers 1"))
    kill.assert_same_run(run_folder(here), next(here.glob("whole/*/*")))


def test_a_disk_cache_that_cannot_be_written_is_one_line(here, capsys):
    make_cub(here / "data")
    (here / "data/decoded").write_text("a file in its place")
    assert "--cache disk: data/decoded: File exists; use" in fails(TINY + "--cache disk", capsys)


def test_a_seed_and_a_remark_name_the_folder(here):
    args = train.build_parser().parse_args(["--seed", "7", "--remark", "_try"])
    assert runs.run_folder_path(args).name.endswith("_lr0.0001_batch180_seed7_try")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--epochs 1"))
    last = run_folder(here) / "cub_bn_inception_last.pth"
    checkpoint = torch.load(last)
    checkpoint["model_state_dict"]["model.embedding.bias"][0] = float("nan")
    torch.save(checkpoint, last)
    before = last.read_bytes()
    assert "epoch 1, step 0: the loss is not finite" in fails(TINY + "--resume", capsys)
    assert last.read_bytes() == before and len(metrics(run_folder(here))) == 1


# --- the recipe -----------------------------------------------------------------------------


def recipe(flags=""):
    args = train.build_parser().parse_args(shlex.split(TINY + flags))
    model = create_model("bn_inception", 8, disent=args.disent)
    criterion = train.build_criterion(args, 2)
    return args, model, criterion


@pytest.mark.parametrize("disent", ["True", "False"])
def test_parameter_groups_are_ordered_disjoint_and_complete(disent):
    args, model, criterion = recipe(f"--disent {disent} --lr 0.01")
    groups = train.parameter_groups(model, criterion, args.lr)
    assert [group["lr"] for group in groups] == [0.01, 0.01, 1.0]
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*model.parameters(), *criterion.parameters()}
    names = {p: name for name, p in model.named_parameters()}
    assert all("embedding" in names[p] for p in groups[1]["params"])
    assert not any("embedding" in names[p] for p in groups[0]["params"])
    assert [p.shape for p in groups[2]["params"]] == [(2, 8)]


@pytest.mark.parametrize("optimizer, kind, settings", [
    ("adamw", torch.optim.AdamW, {}),
    ("adam", torch.optim.Adam, {}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "alpha": 0.9}),
])  # fmt: skip
def test_optimizers_have_the_published_settings(optimizer, kind, settings):
    args, model, criterion = recipe(f"--optimizer {optimizer} --weight-decay 0.5")
    built, _ = train.build_optimizer(args, model, criterion)
    assert type(built) is kind
    for group in built.param_groups:
        assert {name: group[name] for name in settings} == settings and group["weight_decay"] == 0.5


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_warm_up_trains_heads_alone_and_then_everything_even_frozen_batchnorm():
    _, model, _ = recipe()
    train.prepare_epoch(model, epoch=0, warm=1, bn_freeze=True)
    assert trainable(model) == {name for name, _ in model.named_parameters() if "embedding" in name}
    train.prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_without_warm_up_frozen_batchnorm_keeps_its_weights_too():
    _, model, _ = recipe()
    train.prepare_epoch(model, epoch=3, warm=0, bn_freeze=True)
    frozen = {name for name, _ in model.named_parameters() if "_bn." in name}
    assert trainable(model) == {name for name, _ in model.named_parameters()} - frozen


@pytest.mark.parametrize("bn_freeze", [True, False])
def test_running_statistics_move_only_when_not_frozen(bn_freeze):
    args, model, criterion = recipe()
    optimizer, _ = train.build_optimizer(args, model, criterion)
    before = model.model.conv1_7x7_s2_bn.running_mean.clone()
    model.eval()
    train.prepare_epoch(model, epoch=1, warm=1, bn_freeze=bn_freeze)
    train.train_step(model, criterion, optimizer, torch.randn(4, 3, 32, 32), torch.arange(4) % 2)
    assert torch.equal(before, model.model.conv1_7x7_s2_bn.running_mean) == bn_freeze


def test_gradients_are_clipped_by_value_on_network_and_proxies(monkeypatch):
    args, model, criterion = recipe("--optimizer sgd")
    optimizer, _ = train.build_optimizer(args, model, criterion)
    seen = []
    monkeypatch.setattr(optimizer, "step", lambda: seen.extend(
        p.grad.abs().max().item() for g in optimizer.param_groups for p in g["params"]
        if p.grad is not None))  # fmt: skip
    criterion.metric_loss.alpha = 1e6
    train.prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
    train.train_step(model, criterion, optimizer, torch.randn(4, 3, 32, 32), torch.arange(4) % 2)
    assert max(seen) == 10


@pytest.mark.parametrize("flags", ["", "--IPC 4"])
def test_main_wires_the_recipe_into_every_step(here, monkeypatch, flags):
    """What each step of a run is given, and what the flags change of it."""
    make_cub(here / "data")
    steps = []
    original = train.train_step

    def spy(model, criterion, optimizer, images, labels, noise):
        before = model.model.conv1_7x7_s2.weight.detach().clone()
        values = original(model, criterion, optimizer, images, labels, noise)
        steps.append({
            "lr": [group["lr"] for group in optimizer.param_groups],
            "moved": not torch.equal(before, model.model.conv1_7x7_s2.weight),
            "images": images, "labels": labels, "noise": noise, "loss": values["loss"].item(),
            "loss flags": (criterion.metric_loss.margin, criterion.metric_loss.alpha,
                           criterion.al, criterion.be, criterion.gam, model.l2_norm),
        })  # fmt: skip
        return values

    monkeypatch.setattr(train, "train_step", spy)
    command = TINY + "--epochs 3 --lr 0.01 --lr-decay-step 1 --lr-decay-gamma 0.5 --mrg 0.2 "
    command += f"--alpha 16 --l2-norm 0 {flags} "
    train.main(shlex.split(command))

    assert [step["lr"] for step in steps[::2]] == [
        [0.01, 0.01, 1.0], [0.005, 0.005, 0.5], [0.0025, 0.0025, 0.25],
    ]  # fmt: skip
    assert [step["moved"] for step in steps] == [False, False, True, True, True, True]
    assert all(step["loss flags"] == (0.2, 16, 1, 0.1, 1e-5, False) for step in steps)
    records = metrics(run_folder(here))
    assert [record["lr"] for record in records] == [0.01, 0.005, 0.0025]
    for record, first, second in zip(records, steps[::2], steps[1::2], strict=True):
        assert record["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    for name in ("images", "noise"):
        assert len({step[name].sum().item() for step in steps}) == 6
    if flags:
        assert all(step["labels"].bincount().tolist() == [4, 4] for step in steps)

    first = steps[0]
    steps.clear()
    train.main(shlex.split(command + "--seed 2 --epochs 1"))
    assert not torch.equal(first["images"], steps[0]["images"])
    assert not torch.equal(first["noise"], steps[0]["noise"])


def test_weights_differ_between_seeds():
    first, second = (
        train.Training(train.build_parser().parse_args(["--seed", seed]), 2, torch.device("cpu"),
                       None) for seed in "12"
    )  # fmt: skip
    assert not torch.equal(first.model.model.embedding.weight, second.model.model.embedding.weight)
    assert not torch.equal(first.criterion.proxies, second.criterion.proxies)


# --- wandb ----------------------------------------------------------------------------------


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
    make_cub(here / "data")
    train.main(shlex.split(TINY.replace("--wandb disabled", "--wandb auto")))
    folder = run_folder(here)
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
    script = "import sys, train\ntrain.main(sys.argv[1:])\nassert 'wandb' not in sys.modules"
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
    assert "Bird_0003.jpg" in fails(TINY + "--wandb offline", capsys)  # nothing to lose: not in use


# --- a GPU, where there is one --------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_on_cuda_equals_the_step_on_the_cpu_and_never_synchronises():
    losses = []
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4) % 2
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        args, model, criterion = recipe()
        model.to(device), criterion.to(device)
        optimizer, _ = train.build_optimizer(args, model, criterion)
        train.prepare_epoch(model, epoch=1, warm=1, bn_freeze=True)
        inputs = images.to(device), labels.to(device)
        train.train_step(model, criterion, optimizer, *inputs, torch.zeros(2, 4, 8, device=device))
        try:
            torch.cuda.set_sync_debug_mode("error")
            noise = train.loss_noise(1, 0, 0, (4, 8), device)
            values = train.train_step(model, criterion, optimizer, *inputs, noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(values["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # convolutions in TF32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_cuda_leaves_a_checkpoint_that_evaluates_on_any_device(here, capsys):
    make_cub(here / "data")
    train.main(shlex.split(TINY + "--gpu-id 0 --workers 2"))
    evaluate.main(["--resume", str(next(run_folder(here).glob("*_best.pth")))])
    assert "R@1 : " in capsys.readouterr().out
