"""compare.py: settings side by side, from run folders."""

import csv
import json
import shlex
from statistics import mean, stdev

import pytest
from PIL import Image
from scipy import stats

import compare
import train
from dataset import cub
from recipe import settle_loss
from runs.gather import difference, gather
from runs.naming import run_folder_path
from tests.conftest import TINY, fails, make_cub, metrics

TRAIN = {"images": 80, "classes": 8, "digest": "train"}
TEST = {"images": 70, "classes": 7, "digest": "test"}
PUBLISHED = {split: dict(zip(("images", "classes"), counts), digest=split)
             for split, counts in cub.PUBLISHED.items()}  # fmt: skip


def make_run(flags, last, best=None, val=None, start=20, images=None, **process):
    """What a finished run of these flags leaves, with made-up numbers: R@1, R@2 and MAP@R are
    one apart. val: MAP@R of held-out classes, of a run with --val-classes."""
    parser = train.build_parser()
    args = parser.parse_args(shlex.split(f"--dataset cub --epochs 3 {flags}"))
    folder = run_folder_path(args, parser)
    settle_loss(args)
    folder.mkdir(parents=True)
    described = {"flags": vars(args), "commit": "a" * 40, "uncommitted_changes": False,
                 "device": "cpu", "processes": 1, "versions": {"torch": "2"}, "resumed": []}
    (folder / "args.json").write_text(json.dumps(described | process))
    held_out = {} if val is None else {"val/R@1": val + 9, "val/MAP@R": val}

    def scores(value):
        return {"R@1": value, "R@2": value + 1, "MAP@R": value - 1} | held_out

    results = {
        "chosen_by": "MAP@R of held-out classes" if held_out else "R@1 of the test images",
        "start": {"epoch": None, "metrics": held_out or scores(start)},
        "chosen": {"epoch": 1, "metrics": scores(last if best is None else best)},
        "last": {"epoch": 2, "metrics": scores(last)},
        "images": images or {"train": TRAIN, "test": TEST},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def table(flags=""):
    """The rows of --csv."""
    compare.main(["logs", "--csv", "t.csv", *shlex.split(flags)])
    with open("t.csv") as file:
        return list(csv.DictReader(file))


def text_of(flags, capsys):
    """What is printed, as one line."""
    capsys.readouterr()
    compare.main(["logs", *shlex.split(flags)])
    out = capsys.readouterr().out
    assert all(len(line) <= compare.WIDTH or "left out" in line for line in out.splitlines())
    return " ".join(out.split())


def test_real_runs_are_gathered_by_seed_and_unfinished_ones_are_listed(here, capsys):
    make_cub(here / "data")
    for flags in ("--lr 1e-2", "--lr 1e-2 --seed 2", "--remark _short", "--remark _old"):
        train.main(shlex.split(f"{TINY} --epochs 1 {flags}"))
    (short,), (old,) = here.glob("logs/*/*_short"), here.glob("logs/*/*_old")
    for folder in (short, old):
        (folder / "results.json").unlink()  # as --resume does; older runs have none
    text = (short / "args.json").read_text()
    (short / "args.json").write_text(text.replace('"epochs": 1', '"epochs": 5'))
    bad = here / "logs/logs_cub/bad"
    bad.mkdir()
    (bad / "args.json").write_text("{")
    (row,) = table("--markdown t.md --plot t.png")
    values = [metrics(folder)[-1]["R@1"] for folder in here.glob("logs/*/*lr0.01*")]
    assert row["last R@1"] == f"{mean(values):.2f} ± {stdev(values):.2f}" and row["seeds"] == "2"
    out = capsys.readouterr().out
    assert "_short: 1 of 5 epochs" in out and "left out: logs/logs_cub/bad: damaged" in out
    assert f"without results.json; python train.py --resume {old.relative_to(here)} writes" in out
    lines = (here / "t.md").read_text().splitlines()
    assert len(lines) == 3 and {line.count("|") for line in lines} == {lines[0].count("|")}
    assert Image.open("t.png").size[0] > 1000


@pytest.mark.parametrize("ours, theirs, told", [
    ((70, 72, 71), (69, 70, 70), "not told apart from the baseline's by 3 seeds: +1.33"),
    ((73, 75, 74), (69, 70, 70), "higher than the baseline's by 4.33"),
    ((63, 65, 64), (69, 70, 70), "lower than the baseline's by 5.67"),
])  # fmt: skip
def test_the_verdict_follows_the_paired_t_interval(here, capsys, ours, theirs, told):
    for seed, (our, their) in enumerate(zip(ours, theirs), start=1):
        make_run(f"--seed {seed} --disent True --al 1", our)
        make_run(f"--seed {seed}", their)
    make_run("--seed 9", 0)  # has no partner
    interval = stats.ttest_rel(ours, theirs).confidence_interval()
    half = (interval.high - interval.low) / 2
    out = text_of("", capsys)  # the baseline is disent=False, where both are there
    assert f"last R@1 is {told} ± {half:.2f} (95 % interval of 3 seeds)" in out
    assert f"{mean(ours):.2f} ± {stdev(ours):.2f}" in out
    rows = {row["--disent"]: row for row in table("--baseline disent=False")}
    column = "difference of last R@1 to the baseline's"
    number = f"{mean(ours) - mean(theirs):+.2f} ± {half:.2f} (3): "
    assert rows["True"][column].startswith(number) and rows["False"][column] == "baseline"
    assert told.startswith(rows["True"][column].removeprefix(number))


def test_folds_are_averaged_within_a_seed_before_the_interval(here, capsys):
    numbers = {(1, 0): 60, (1, 1): 70, (2, 0): 61, (2, 1): 73}
    for (seed, fold), last in numbers.items():
        images = {"train": TRAIN | {"digest": f"without {fold}"}, "val": TRAIN, "test": TEST,
                  "train + val": TRAIN}  # fmt: skip
        for weight in (1, 2):
            flags = f"--seed {seed} --val-classes 0.5 --fold {fold} --disent True --al {weight}"
            make_run(flags, last + weight * seed, val=30, images=images)
    make_run("--seed 3 --val-classes 0.5 --fold 0 --disent True --al 1", 99, val=30, images=images)
    one, two = table()
    assert one["chosen R@1"] == f"{(66 + 69) / 2:.2f} ± {stdev([66, 69]):.2f}"
    assert one["seeds"] == two["seeds"] == "2x2"
    (first, second), left_out = gather(["logs"])
    assert difference(second, first, "chosen", "R@1")[::2] == (1.5, 2)  # of seeds, not of runs
    assert any("seed 3 lacks fold 1" in line for line in left_out)
    assert "2x2" in text_of("", capsys)


def test_settings_of_different_folds_are_not_compared_and_not_chosen_among(here, capsys):
    for seed, fold, disent in ((1, 0, True), (2, 0, True), (1, 1, False), (2, 1, False)):
        flags = f"--seed {seed} --val-classes 0.5 --fold {fold} --disent {disent} --al 1"
        make_run(flags, 60 + seed, val=30 + fold)
    assert "has folds 0, the baseline has others" in text_of("", capsys)
    make_run("--seed 1 --val-classes 0.5 --fold 1 --disent True --al 2", 60, val=90)
    out = text_of("--choose", capsys)
    assert "val/MAP@R 30.00 ± 0.00 (seeds 1, 2; folds 0): cub, Proxy_Anchor, DDML 1" in out
    assert "by val/MAP@R 90.00 (seeds 1; folds 1): cub, Proxy_Anchor, DDML 2" in out


def test_a_setting_whose_seeds_all_lack_a_fold_is_left_out(here, capsys):
    for seed, fold in ((1, 0), (2, 1)):
        make_run(f"--seed {seed} --val-classes 0.5 --fold {fold}", 60, val=30)
    make_run("", 70)
    out = text_of("", capsys)
    assert "70.00" in out and "seed 1 lacks fold 1" in out and "seed 2 lacks fold 0" in out


@pytest.mark.parametrize("other", ["train", "test"])
def test_runs_of_different_images_never_share_a_row_or_a_comparison(here, capsys, other):
    images = {"train": TRAIN, "test": TEST}
    make_run("--disent True --al 1", 70)
    make_run("--disent True --al 1 --seed 2", 70)
    changed = images | {other: images[other] | {"digest": "another"}}
    for seed in (1, 2):
        make_run(f"--seed {seed} --remark _moved", 50, images=changed)
    make_run("--disent True --al 1 --seed 3 --remark _moved", 50, images=changed)
    assert sorted(row["seeds"] for row in table()) == ["1", "2", "2"]
    assert text_of("", capsys).count("no baseline with otherwise equal flags") == 1


def test_flags_that_change_the_numbers_make_a_row_and_others_do_not(here):
    for flags in ("--compile", "--deterministic", "--precision bf16", "--weights none", "--lr 1",
                  "--epochs 4", "--ks 1 2", "--val-classes 0.5", "--bn-freeze 0"):  # fmt: skip
        make_run(flags, 70, val=1 if "val" in flags else None)
    assert len(table()) == 9 and {row["train"] for row in table()} == {"80 images of 8 classes"}
    make_run("--lr 1 --seed 2 --workers 9 --remark _x", 70)
    make_run("--lr 1 --seed 3 --cache ram --wandb offline --remark _y", 70)
    assert sorted(row["seeds"] for row in table()) == ["1"] * 7 + ["1x1", "3"]


def test_a_row_that_mixes_code_or_machines_says_so(here, capsys):
    make_run("--seed 1", 70)
    assert "note:" not in text_of("", capsys)
    make_run("--seed 2", 70, commit="b" * 40, uncommitted_changes=True, device="H100", processes=8)
    (row,), out = table(), text_of("", capsys)
    assert row["notes"] in out and row["notes"] == (
        "mixes 2 commits (aaaaaaa, bbbbbbb with changes); mixes 2 devices (cpu, H100); "
        "mixes 2 numbers of processes (1, 8)"
    )


def test_a_row_tested_on_images_that_were_trained_on_says_so(here, capsys):
    seen = {"trained_on": {"classes": 2, "images": 20}}
    make_run("", 70, images={"train": TRAIN, "test": TEST | seen})
    assert "2 of 7 classes, 20 of 70 images were trained on." in text_of("", capsys)


@pytest.mark.parametrize("flags, images, shown, difference", [
    ("--disent True --al 1",                       PUBLISHED, True, "-1.00"),
    ("",                                           PUBLISHED, True, ""),
    ("--disent True --al 1",                       None,      False, ""),
    ("--disent True --al 1 --model resnet50",      PUBLISHED, False, ""),
    ("--disent True --al 1 --embedding-size 64",   PUBLISHED, False, ""),
    ("--disent True --al 1 --batch-size 90",       PUBLISHED, False, ""),
    ("--disent True --al 1 --loss CosFace",        PUBLISHED, True, ""),
])  # fmt: skip
def test_the_papers_numbers_are_shown_only_with_runs_like_the_papers(
    here, capsys, flags, images, shown, difference
):
    make_run(flags, 60, best=69, images=images)
    rows = table()
    assert ("the paper's: Proxy_Anchor, DDML" in [row["loss"] for row in rows]) == shown
    assert rows[0].get("difference of best R@1 to the paper's", "") == difference
    assert ("the paper's" in text_of("", capsys)) == shown


def test_a_baseline_of_another_loss_keeps_its_own_margin_and_scale(here, capsys):
    for seed in (1, 2):
        make_run(f"--seed {seed} --loss CosFace", 60 + seed)
        make_run(f"--seed {seed} --loss ArcFace", 62 + seed)
    assert "ArcFace: last R@1 is higher than the baseline's by 2.00 ± 0.00" in text_of(
        "--baseline loss=CosFace", capsys
    )
    make_run("--seed 1 --loss CosFace --mrg 0.2", 50)
    out = text_of("--baseline loss=CosFace", capsys)
    assert "ArcFace: 2 baselines with otherwise equal flags: add a --baseline to name one" in out
    out = text_of("--baseline loss=CosFace --baseline mrg=0.35", capsys)
    assert "ArcFace: last R@1 is higher" in out and "CosFace --mrg 0.2: fewer than 2" in out


def test_by_names_the_epoch_and_the_default_is_not_chosen_on_test_images(here, capsys):
    make_run("", 60, best=70)
    assert " last 20.00 60.00" in text_of("", capsys)
    assert " best 20.00 70.00" in text_of("--by best", capsys)
    make_run("--val-classes 0.5", 60, best=65, val=40)
    out = text_of("", capsys)
    assert " chosen 65.00 64.00 40.00 40.00" in out  # R@1, MAP@R, val/MAP@R before and after
    assert "0.5 of them held out" in out
    make_run("--disent True --al 1", 60)
    assert "DDML 1 0 0: has no chosen epoch" in text_of("--by chosen", capsys)


def test_choose_takes_the_best_validation_and_reports_the_other_seeds(here, capsys):
    def trial(weight, seed, val, last):
        flags = f"--val-classes 0.5 --fold 0 --seed {seed} --disent {weight > 0} --al {weight}"
        make_run(flags, last, val=val)

    for weight, val, last in ((1, 40, 60), (2, 45, 50), (3, 30, 90)):
        trial(weight, 1, val, last)
    trial(0, 1, 20, 55)
    out = text_of("--choose", capsys)
    assert ("chosen of 3 settings by val/MAP@R 45.00 (seeds 1; folds 0): cub, Proxy_Anchor, DDML 2 "
            "0 0; its test: R@1 50.00, MAP@R 49.00 (seeds 1)") in out  # fmt: skip
    assert "chosen of 1 setting by val/MAP@R 20.00 (seeds 1; folds 0): cub, Proxy_Anchor;" in out
    assert "between 1 and 3 settings were tried" in out
    for seed, last in ((2, 70), (3, 72)):
        trial(2, seed, 0, last)
    out = text_of("--choose", capsys)
    assert "(seeds 1; folds 0): cub, Proxy_Anchor, DDML 2 0 0; its test: R@1 71.00 ± 1.41" in out
    assert "(seeds 2, 3)" in out
    trial(3, 8, 1, 1)
    (lost,) = here.glob("logs/*/*al3.0*_fold0_val0.5")
    (lost / "results.json").unlink()
    assert "3 settings without a seed in common" in fails("logs --choose", capsys, compare.main)


def test_labels_of_the_plot_tell_settings_apart(here):
    for flags in ("", "--mrg 0.2", "--alpha 9", "--disent True --al 1", "--model resnet18",
                  "--weights none", "--disent True --al 1 --gam 1e-3"):  # fmt: skip
        make_run(flags, 60)
    for share in (0.25, 0.5):
        make_run(f"--val-classes {share} --fold 0", 60, val=1)
    make_run("--seed 2 --remark _more", 60, images={"train": PUBLISHED["train"], "test": TEST})
    settings, _ = gather(["logs"])
    ticks = [tick.get_text() for tick in compare.plot(settings, None).axes[0].get_yticklabels()]
    assert len(set(ticks)) == len(settings) == 10


def test_a_second_run_of_a_seed_is_left_out_and_two_own_folders_are_two_rows(here, capsys):
    make_run("", 60)
    make_run("--remark _twin", 70)
    assert "_twin: has the setting and seed of another run" in text_of("", capsys)
    make_run("--dataset folder --data-root A", 60)
    make_run("--dataset folder --data-root B", 60)
    assert [row["seeds"] for row in table()] == ["1", "1", "1"]


@pytest.mark.parametrize("flags, line", [
    ("nowhere", "nowhere: no such folder"),
    ("", "required: FOLDER"),
    ("logs --baseline disent", "--baseline disent: no finished run has it"),
    ("logs --baseline lr=7", "--baseline lr=7: no finished run has it"),
    ("logs --choose", "--choose: no finished run has --val-classes"),
    (". --plot nowhere/t.png", "--plot nowhere/t.png: not a file's path"),
    (". --basline lr=7", "did you mean --baseline?"),
])  # fmt: skip
def test_a_bad_comparison_ends_in_one_line(here, capsys, flags, line):
    make_run("", 60)
    assert line in fails(flags, capsys, compare.main)


def test_compare_says_when_there_is_no_finished_run(here, capsys):
    compare.main(["."])
    assert capsys.readouterr().out == "no finished run\n"
