"""Users' own images, and query against gallery, from the command line to the same recalls."""

import csv
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import evaluate
import train
from dataset import check
from retrieval.embed import embed
from tests import kill
from tests.conftest import (
    CLASSES,
    TINY,
    checkpoint_of,
    fails,
    make_cub,
    make_folder,
    make_inshop,
    make_sop,
    metrics,
    run_folder,
    write_image,
)

OWN = TINY.replace("--dataset cub ", "")


def rows_of(root, split=None):
    """A row for each image below `root`; `split` is a function of class and file number."""
    rows = [["path", "label"] + ["split"] * (split is not None)]
    for c, name in enumerate(CLASSES):
        for i, path in enumerate(sorted((root / name).iterdir())):
            rows.append([str(path.relative_to(root)), name] + ([split(c, i)] if split else []))
    return rows


def write_table(file, rows, delimiter=",", encoding="utf-8", end="\n"):
    with open(file, "w", encoding=encoding, newline="") as text:
        csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return file


def halves_of(c, i):
    return "train" if c < 2 else "test"


def query_and_gallery(c, i):
    return "train" if c < 2 else "query" if i < 3 else "gallery"


def make_split_folder(root):
    make_folder(root / "train", CLASSES[:2])
    make_folder(root / "test", CLASSES[2:], first=2)


def absolute(root):
    rows = rows_of(root)
    return rows[:1] + [[str((root / path).absolute()), label] for path, label in rows[1:]]


# how the data is made below "my data" (a folder of classes is there), and the flag it is given with
FORMS = {
    "folder": lambda root: "--dataset folder",
    "train and test": lambda root: make_split_folder(root / "halves") or "--dataset folder",
    "csv": lambda root: write_table(root / "list.csv", rows_of(root)),
    "tsv": lambda root: write_table(root / "list.tsv", rows_of(root), "\t"),
    "byte order mark, CRLF": lambda root: write_table(
        root / "list.csv", rows_of(root), encoding="utf-8-sig", end="\r\n"),
    "absolute paths": lambda root: write_table(root / "list.csv", absolute(root)),
    "split": lambda root: write_table(root / "list.CSV", rows_of(root, halves_of)),
    "gallery": lambda root: write_table(root / "list.tsv", rows_of(root, query_and_gallery), "\t"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_own_images_train_resume_and_evaluate_to_the_same_recalls(here, capsys, form):
    root = Path("my data")
    made = FORMS[form](make_folder(root))
    place = root / "halves" if form == "train and test" else root
    flags = f"--data-root '{place}' {made}" if isinstance(made, str) else f"--dataset '{made}'"
    command = OWN + flags
    train.main(shlex.split(command + " --epochs 1"))
    said = capsys.readouterr()
    assert "published" not in said.err + said.out.replace("best epoch", "")
    run = run_folder(here)
    assert run.parent.name == ("logs_list" if made != "--dataset folder" else "logs_folder")
    if form in ("folder", "gallery"):  # the others differ in how they are read alone
        train.main(shlex.split(command + " --resume"))
        train.main(shlex.split(command + " --LOG_DIR whole"))
        kill.assert_same_run(run, next(here.glob("whole/*/*")))

    evaluate.main([str(run), "--workers", "0", "--json", "r.json"])
    found, records = json.loads(Path("r.json").read_text()), metrics(run)
    best = max(records, key=lambda record: record["R@1"])
    assert [key for key in found if "@" in key] == ["R@1", "R@2", "R@4", "R@8"]
    assert all(found[key] == best[key] for key in found if "@" in key)
    assert found["epoch"] == best["epoch"] and found["split"] == "test"


@pytest.mark.parametrize("form", FORMS)
def test_folders_and_lists_give_the_images_and_classes_that_they_name(tmp_path, form):
    root = tmp_path / "my data"
    made = FORMS[form](make_folder(root))
    place = root / "halves" if form == "train and test" else root
    name = "folder" if isinstance(made, str) else str(made)
    for split in ("train", "test", "all"):
        images = dataset.load(name, place, split)
        assert {Path(path).parent.name for path in images.paths} == set(images.classes)
        for path, label in zip(images.paths, images.labels):
            assert Path(path).parent.name == images.classes[label] and os.path.isfile(path)
        assert len(images) == (32 if split == "all" else 16)
    assert check.main(["--dataset", name, "--data-root", str(place), "--workers", "0"]) == 0


def test_a_list_may_name_any_image_that_pillow_reads(here):
    root, rows = here / "data", [["path", "label"]]
    for i, suffix in enumerate(["gif", "tga", "jp2", "ico", "webp", "jfif"] * 4):
        path = root / f"{i}.{suffix}"
        write_image(path.with_suffix(".png"), seed=i)
        with Image.open(path.with_suffix(".png")) as image:
            image.save(path)
        rows.append([path.name, f"class {i % 4}"])
    train.main(shlex.split(OWN + f"--dataset {write_table(root / 'list.csv', rows)}"))
    assert len(metrics(run_folder(here))) == 2


# --- In-Shop ------------------------------------------------------------------------------------


def test_inshop_trains_resumes_and_evaluates_queries_against_the_gallery(here, capsys):
    make_inshop(here / "data")
    command = OWN + "--dataset inshop "
    train.main(shlex.split(command + "--epochs 1"))
    out, err = capsys.readouterr()
    assert "test: 19 images of 4 classes, 7 queries against a gallery of 12" in out
    assert "1 of 7 queries have no match" in err
    assert "Inshop query: found 7 images of 4 classes, the published split has 14,218" in err
    train.main(shlex.split(command + "--resume"))
    train.main(shlex.split(command + "--LOG_DIR whole"))
    run = run_folder(here)
    assert run.parent.name == "logs_Inshop"
    kill.assert_same_run(run, next(here.glob("whole/*/*")))
    last = checkpoint_of(run)
    evaluate.main(["--resume", str(last), "--workers", "0", "--json", "r.json"])
    found, trained = json.loads(Path("r.json").read_text()), metrics(run)[-1]
    assert [key for key in found if "@" in key] == [f"R@{k}" for k in (1, 10, 20, 30, 40, 50)]
    assert all(found[key] == trained[key] for key in found if "@" in key)

    from net import load_model  # and the same, by hand

    model, sides = load_model(last), {}
    for split in ("query", "gallery"):
        images = dataset.load("Inshop", "data", split)
        loader = train.test_loader(images, 4, train.Loading(32, 0, torch.device("cpu")))
        x, labels = embed(model, train.batches(loader, torch.device("cpu")))
        sides[split] = x, [images.classes[label] for label in labels]
    (x, items), (y, gallery_items) = sides["query"], sides["gallery"]
    nearest = (x @ y.T).argmax(dim=1)
    hits = [gallery_items[j] == items[i] for i, j in enumerate(nearest)]
    assert found["R@1"] == pytest.approx(100 * sum(hits) / len(hits))


def test_dataset_check_counts_the_images_of_inshop(tmp_path, capsys):
    make_inshop(tmp_path)
    status = check.main(["--dataset", "Inshop", "--data-root", str(tmp_path), "--workers", "0"])
    out = capsys.readouterr().out
    assert status == 1 and out.count("the published split has") == 3
    assert "looked at 43 images" in out and out.endswith("3 problems found\n")


# --- every data set: whole classes held out ------------------------------------------------------


@pytest.mark.parametrize("name, make", [
    ("cub", make_cub), ("SOP", make_sop), ("Inshop", make_inshop), ("folder", make_folder),
])  # fmt: skip
def test_folds_are_contiguous_whole_classes_and_cover_all(tmp_path, name, make):
    make(tmp_path)
    images = dataset.load(name, tmp_path, "train")
    seen = []
    for fold in range(2):
        rest, held = images.hold_out(0.5, fold)
        assert sorted(rest.classes + held.classes) == images.classes
        assert sorted(rest.paths + held.paths) == sorted(images.paths)
        for side in (rest, held):
            assert side.labels.unique().tolist() == list(range(len(side.classes)))
            known = dict(zip(images.paths, images.labels.tolist()))
            for path, label in zip(side.paths, side.labels):
                assert images.classes[known[path]] == side.classes[label]
        seen += held.classes
    assert seen == images.classes  # in order, none twice


def test_folds_of_a_third_of_ten_classes_leave_none_out():
    images = dataset.ImageSet([(f"{c}/{i}.jpg", f"{c}") for c in range(10) for i in range(2)])
    folds = [images.hold_out(1 / 3, fold)[1].classes for fold in range(3)]
    assert [len(fold) for fold in folds] == [3, 4, 3] and sum(folds, []) == images.classes
    for fraction, fold in ((1 / 3, 3), (1 / 3, -1), (0.0, 0), (0.01, 0), (1.5, 0)):
        with pytest.raises(ValueError, match="no such fold"):
            images.hold_out(fraction, fold)


def test_a_fold_of_a_test_split_with_a_gallery_keeps_its_queries_first(tmp_path):
    make_inshop(tmp_path)
    images = dataset.load("Inshop", tmp_path, "test")
    rest, held = images.hold_out(0.5, 0)
    assert (rest.queries, held.queries) == (3, 4) and images.queries == 7
    assert len(held) == 12 and all("id_0000000" in path for path in held.paths)


# --- what a folder or a list of one's own may hold by mistake ------------------------------------


def said(capsys, flags, main=train.main):
    """The warnings of a run."""
    capsys.readouterr()
    main(shlex.split(flags))
    return [line for line in capsys.readouterr().err.splitlines() if "--weights none" not in line]


def test_skipped_files_of_a_folder_are_counted_in_one_line(here, capsys):
    root = make_folder(here / "data")
    (root / "猫/a.jfif").write_bytes((root / "猫/фото 1.jpg").read_bytes())
    (root / "猫/b.jfif").write_bytes(b"x")
    (root / "猫/c.MOV").write_bytes(b"x")
    write_image(root / "猫/more/d.jpg", seed=7)
    (root / "notes.txt").write_text("x")
    write_image(root / "__MACOSX/猫/e.jpg", seed=8)
    (root / ".DS_Store").write_bytes(b"x")
    (root / "nothing").mkdir()
    (line,) = said(capsys, OWN + "--dataset folder")
    assert "files beside the class folders (1, such as data/notes.txt)" in line
    assert "*.jfif (2, such as data/猫/a.jfif)" in line and "*.MOV (1" in line
    assert "folders inside a class folder (2, such as data/__MACOSX/猫)" in line
    assert "empty class folders (1, such as data/nothing)" in line
    assert "images are named CLASS/NAME and end in" in line and " .jpeg .jpg .pgm" in line
    assert "DS_Store" not in line
    (same,) = said(capsys, "--dataset folder --workers 0", check.main)
    assert same == line


def test_classes_without_a_match_or_seen_in_training_are_named(here, capsys):
    root = here / "data"
    make_folder(root / "train", ["a", "b"], per_class=8)
    write_image(root / "train/lone/1.jpg", seed=300)
    make_folder(root / "test", ["b", "c"], per_class=8, first=5)
    write_image(root / "test/single/1.jpg", seed=301)
    lines = said(capsys, OWN + "--dataset folder --epochs 1")
    assert lines == [
        "warning: folder train: 1 class of one image: lone",
        "warning: folder test: 1 class without a match for a query: single",
        "warning: folder test: 1 class also in train, so not unseen: b",
        *2 * ["warning: 1 of 17 queries have no match and count as misses"],  # and before training
    ]


def test_a_test_split_without_any_match_is_warned_of(here, capsys):
    root = here / "data"
    make_folder(root / "train", ["a", "b"])
    make_folder(root / "test", ["c", "d", "e", "f", "g", "h"], per_class=1, first=3)
    lines = said(capsys, OWN + "--dataset folder --epochs 1")
    assert lines[0].endswith("6 classes without a match for a query: c, d, e, f, g, ...")
    assert lines[1] == "warning: folder test: no query has a match, so every recall will be 0"


def test_a_label_with_one_image_in_a_list_is_named(here, capsys):
    root = make_folder(here / "data")
    rows = rows_of(root)
    file = write_table(root / "list.csv", rows[:2] + rows[9:])
    lines = said(capsys, OWN + f"--dataset {file}")
    assert lines[0].startswith("warning: list t") and lines[0].endswith(f": {rows[1][1]}")


def test_folders_beside_train_and_test_are_warned_of_and_a_class_may_be_called_train(here, capsys):
    make_split_folder(here / "data")
    make_folder(here / "data/val")
    (line,) = said(capsys, OWN + "--dataset folder --epochs 1")
    assert line.endswith("data: skipped 1 beside train and test, such as data/val")
    make_folder(here / "vehicles", ["train", "bus", "car", "tram"])
    assert dataset.load("folder", here / "vehicles", "test").classes == ["train", "tram"]


def test_evaluate_says_when_it_tests_on_another_folder(here, capsys):
    for place in "ab":
        make_folder(here / place)
    train.main(shlex.split(OWN + "--dataset folder --data-root a --epochs 1 --train-on all"))
    capsys.readouterr()
    evaluate.main([*"--dataset folder --data-root b --workers 0".split(), str(run_folder(here))])
    out, err = capsys.readouterr()
    assert f"trained on folder ({here}/a), tested on folder ({here}/b)" in out
    assert "unseen" not in err


def test_equal_files_in_two_classes_are_named_by_check(tmp_path, capsys):
    root = make_folder(tmp_path)
    twin = root / "猫/фото 0.jpg"
    twin.write_bytes((root / "синица/фото 0.jpg").read_bytes())
    assert check.main(["--dataset", "folder", "--data-root", str(root), "--workers", "0"]) == 1
    assert f"{twin}: the same file in 2 classes\n" in capsys.readouterr().out


BAD_LISTS = [
    # name, text, what the line has
    ("list.csv", "path;label\na;b\n", "line 1: the header must name"),
    ("list.csv", "path,class\na,b\n", "it names path, class"),
    ("list.tsv", "path,label\na,b\n", "with tabs between them"),
    ("list.csv", "", "line 0: the header must"),
    ("list.csv", "path,label\n", "no images follow"),
    ("list.csv", "path,label\n猫/фото 1.jpg\n", "line 2: must have 2 fields"),
    ("list.csv", "path,label\na.jpg,b,c\n", "line 2: must have 2 fields"),
    ("list.csv", "path,label\na.jpg,\n", "the path or the label is empty"),
    ("list.csv", "path,label,split\na.jpg,b,valid\n", "line 2: the split is 'valid'"),
    ("list.csv", "path,label,split\na.jpg,b,\n", "line 2: the split is ''"),
    ("list.csv", "path,label\n../a.jpg,b\n", "line 2: ../a.jpg is not below"),
    ("list.csv", "path,label\n/etc/passwd,b\n", "/etc/passwd is not below"),
    ("list.csv", "path,label\n猫/фото 1.jpg,a\n猫/фото 1.jpg,b\n", "is in line 2 already"),
    ("list.csv", 'path,label\n"a.jpg,b\n', "list.csv, after line 1"),
    ("list.csv", "path,label\n猫/фото 1.jpg,a\nno.jpg,b\n", "1 listed file not there: line 3"),
    ("list.csv", "path,label\n猫/фото 1.jpg,a\n猫/фото 2.jpg,a\n", "needs images of at least two"),
    ("list.csv", "path,label,split\n猫/фото 1.jpg,a,train\n猫/фото 2.jpg,a,gallery\n"
     "猫/фото 3.jpg,a,test\n", "has the splits train, gallery"),
    ("list.csv", "path,label,split\n猫/фото 1.jpg,a,train\n", "test: there are no images"),
    ("list.csv", "path,label,split\n猫/фото 1.jpg,a,test\n", "train: there are no images"),
    ("list.csv", b"path,label\n\xff\xfe,b\n", "save it as text in UTF-8"),
    ("other.csv", None,                                                "list.csv: no such file"),
]  # fmt: skip


@pytest.mark.parametrize("name, text, line", BAD_LISTS)
def test_a_bad_list_ends_in_one_line_that_names_it(here, capsys, name, text, line):
    root = make_folder(here / "data", per_class=4)
    if text is not None:
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    given = name if text is not None else "list.csv"
    error = fails(OWN + f"--dataset data/{given}", capsys)
    assert line in error and given in error
    assert not (here / "logs").exists()


def nothing(root):
    root.mkdir()


def flat(root):
    write_image(root / "a.jpg", seed=0)


BAD_FOLDERS = [
    # how it is made, flags                                   the line has
    (lambda root: None, "--dataset folder",                   "--data-root ./data: no such folder"),
    (nothing,           "--dataset folder",                   "one folder per class"),
    (flat,              "--dataset folder",                   "CLASS/NAME.jpg"),
    (lambda root: make_folder(root, ["a"]), "--dataset folder", "at least two classes"),
    (lambda root: make_folder(root / "train"), "--dataset folder", "test: there are no images"),
    (lambda root: make_folder(root / "x/y"), "--dataset folder", "at least two classes"),
    (make_folder,       "--dataset folder --batch-size 99",   "use 16 or fewer"),
    (make_folder,       "--dataset foldr",                    "did you mean folder?"),
    (make_folder,       "--dataset folder --ks 0",            "--ks: invalid number"),
    (make_folder,       "--dataset folder --train-on test",   "--train-on: invalid choice"),
    (make_cub,          "--dataset cub --data-root data/CUB_200_2011",
     "there is one under --data-root {here}/data"),
    (make_cub,          "--dataset cub --data-root data/CUB_200_2011/images",
     "there is one under --data-root {here}/data"),
    (nothing, "--dataset demo --data-root nowhere", "--data-root nowhere: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize("make, flags, line", BAD_FOLDERS)
def test_a_bad_folder_ends_in_one_line(here, capsys, make, flags, line):
    make(here / "data")
    assert line.format(here=here) in fails(OWN + flags, capsys)
    assert not (here / "logs").exists() and not (here / "nowhere").exists()


@pytest.mark.parametrize("text, line", [
    ("1\nimage_name item_id\nimg/a.jpg id_1 trains\n",  "line 3: must be `image_name item_id"),
    ("1\nimage_name item_id\nimg/a.jpg id_1\n",         "line 3: must be `image_name item_id"),
    ("1\nimage_name item_id\n../../a.jpg id_1 train\n", "line 3: must be `image_name item_id"),
    ("img/a.jpg id_1 train\n",                           "line 2: must be the header"),
    ("",                                                 "line 2: must be the header"),
])  # fmt: skip
def test_a_bad_list_of_inshop_names_the_line(here, capsys, text, line):
    file = make_inshop(here / "data") / "Inshop_Clothes/Eval/list_eval_partition.txt"
    file.write_text(text)
    error = fails(OWN + "--dataset Inshop", capsys)
    assert line in error and "list_eval_partition.txt" in error


def test_training_on_all_classes_keeps_the_last_epoch_and_evaluates_nothing(here, capsys):
    make_folder(here / "data")
    command = OWN + "--dataset folder --train-on all"
    train.main(shlex.split(command + " --epochs 1"))
    out = capsys.readouterr().out
    assert "folder all: 32 images of 4 classes" in out and "Trained on all classes: none" in out
    train.main(shlex.split(command + " --resume"))
    train.main(shlex.split(command + " --LOG_DIR whole"))
    run = run_folder(here)
    kill.assert_same_run(run, next(here.glob("whole/*/*")), ("last",))
    assert not list(run.glob("*_best.pth")) and "R@1" not in metrics(run)[-1]
    assert "Last Epoch: 1\n" in next(run.glob("*_results.txt")).read_text()
    proxies = torch.load(checkpoint_of(run))["criterion_state_dict"]["metric_loss.proxies"]
    assert proxies.shape == (4, 8)

    error = fails(str(run), capsys, evaluate.main)
    assert "name another data set with --dataset" in error
    evaluate.main(shlex.split(f"'{run}' --dataset folder --workers 0"))
    out = capsys.readouterr().out
    assert "test: 2 of 2 classes, 16 of 16 images were trained on." in out


def test_the_commands_that_a_run_on_all_classes_prints_work(here, capsys):
    make_folder(here / "data" / "train")
    make_folder(here / "other", first=4)
    train.main(shlex.split(OWN + "--dataset folder --train-on all --epochs 1 --remark \"it's\""))
    out = capsys.readouterr().out
    said = dict(re.findall(r"^  (to .*?): python evaluate.py (.*)$", out, re.M))
    assert said.keys() == {"to evaluate, on other classes", "to ship"}
    other = said["to evaluate, on other classes"].replace("DIR", "other")
    evaluate.main(shlex.split(f"{other} --workers 0"))
    assert "R@8 : " in capsys.readouterr().out
    shutil.rmtree(here / "data")
    evaluate.main(shlex.split(said["to ship"]))
    assert (here / "network.pt2").exists() and (here / "network_input.py").exists()


def test_ks_chooses_the_recalls_that_are_reported(here, capsys):
    make_folder(here / "data")
    train.main(shlex.split(OWN + "--dataset folder --ks 10 1 3 3"))
    run = run_folder(here)
    assert [key for key in metrics(run)[0] if "@" in key] == ["R@1", "R@3", "R@10"]
    capsys.readouterr()
    evaluate.main([str(run), "--workers", "0"])
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed[-3:] == ["R@1", "R@3", "R@10"]
    evaluate.main([str(run), "--workers", "0", "--ks", "5"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("R@5 : ")


def test_metrics_reports_map_at_r_and_r_precision(here, capsys):
    make_inshop(here / "data")
    train.main(shlex.split(OWN + "--dataset Inshop --metrics --epochs 1"))
    run, out = run_folder(here), capsys.readouterr().out
    record = metrics(run)[0]
    assert f"MAP@R {record['MAP@R']:.2f}  R-Precision {record['R-Precision']:.2f}  (" in out
    assert f"Last MAP@R: {record['MAP@R']:.4f}\n" in next(run.glob("*_results.txt")).read_text()
    train.main(shlex.split(OWN + "--dataset Inshop --metrics False --epochs 2 --resume"))
    assert "MAP@R" not in metrics(run)[1]  # a free choice when a run goes on
    evaluate.main([str(run), "--workers", "0", "--json", "r.json", "--export", "e.npz"])
    found = json.loads(Path("r.json").read_text())
    assert all(found[key] == record[key] for key in record if "R@" in key or "R-" in key)

    with np.load("e.npz") as file:  # and the same from the export, by hand
        x, labels, q = file["embeddings"], file["labels"], int(file["queries"])
        assert [Path(path).parent.name for path in file["paths"]] == list(file["classes"][labels])
    total = 0
    for i in range(q):
        hits = labels[q:][np.argsort(-(x[q:] @ x[i]))] == labels[i]
        total += hits[: hits.sum()].sum() / max(hits.sum(), 1)
    assert found["R-Precision"] == pytest.approx(100 * total / q)
    capsys.readouterr()
    evaluate.main([str(run), "--workers", "0", "--metrics", "0"])
    assert "MAP@R" not in capsys.readouterr().out
    assert "--export nowhere/e.npz: not a file's" in fails(
        f"'{run}' --export nowhere/e.npz", capsys, evaluate.main
    )


def test_only_train_draws_the_demo(here, capsys):
    make_folder(here / "data", per_class=4)
    train.main(shlex.split(OWN + "--dataset folder --epochs 1"))
    for main, flags in ((evaluate.main, f"'{run_folder(here)}' "), (check.main, "")):
        error = fails(flags + "--dataset demo --data-root /nonexistent/x", capsys, main)
        assert "not drawn yet" in error and not Path("/nonexistent").exists()
