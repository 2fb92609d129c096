"""What a user can get wrong, and what nobody trusts: each ends in one line that names it, exit
status 2, no traceback, and what was there before is still there."""

import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import dataset
import evaluate
import train
from cli import UserError
from dataset.files import read_image
from tests.conftest import (
    TINY,
    fails,
    make_cars,
    make_cars_devkit,
    make_cub,
    make_sop,
    published_checkpoint,
    run_folder,
)
from utils import read_checkpoint

JPEG = "CUB_200_2011/images/001.Bird_0/Bird_0003.jpg"
SOP = "Stanford_Online_Products"


def snapshot(folder):
    """What every file below `folder` is, but for the lock and what the data set's own are."""
    return {
        path: path.stat().st_mtime_ns
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def junk(here):
    (here / "junk").write_bytes(b"junk")


FLAGS = [
    # flags                          the line has
    ("--batch-size 21",              "--batch-size 21: larger than the 20 training"),
    ("--batch-size 0",               "--batch-size: invalid number"),
    ("--dataset birds",              "--dataset birds: unknown data set"),
    ("--model resnet50",             "--model: invalid choice: 'resnet50'"),
    ("--loss Triplet",               "--loss: invalid choice: 'Triplet'"),
    ("--optimizer lamb",             "--optimizer: invalid choice: 'lamb'"),
    ("--data-root nowhere",          "tried nowhere/CUB_200_2011/images, nowhere/cub/images"),
    ("--disent maybe",               "--disent: invalid boolean value: 'maybe'"),
    ("--bn-freeze 2",                "--bn-freeze: invalid boolean value: '2'"),
    ("--lr fast",                    "--lr: invalid number"),
    ("--lr nan",                     "--lr: invalid number"),
    ("--lr -1",                      "--lr: invalid number"),
    ("--lr 1e36",                    "--lr: invalid number"),
    ("--alpha inf",                  "--alpha: invalid number"),
    ("--epochs 0",                   "--epochs: invalid number"),
    ("--seed -1",                    "--seed: invalid number"),
    ("--image-size 104",             "--image-size: BN-Inception takes multiples of 32"),
    ("--IPC 3",                      "--IPC 3"),
    ("--IPC 2",                      "--IPC 2"),
    ("--batch 8",                    "unrecognized arguments: --batch 8"),
    ("--remark a/b",                 "--remark: a folder's name cannot hold 'a/b'"),
    (f"--remark {'x' * 250}",        "too long"),
    (f"--LOG_DIR {'x' * 300}",       "File name too long"),
    ("--remark '\udcff'",            "a folder's name cannot hold"),
    ("--embedding-size 1000000000",  "--embedding-size: invalid number"),
    ("--batch-size 9223372036854775808", "--batch-size: invalid number"),
    ("--image-size 320000",          "--image-size: BN-Inception takes"),
    ("--gpu-id -2",                  "--gpu-id: invalid number"),
    ("--checkpoint-every 0",         "--checkpoint-every: invalid number"),
    ("--weights nowhere.pth",        "nowhere.pth: no such checkpoint"),
    ("--weights junk",               "junk: not a checkpoint"),
    ("--weights imagenet",           "--weights imagenet: not in"),
    ("--resume",                     "--resume: there is no run in"),
    ("--resume nowhere.pth",         "nowhere.pth: no such checkpoint"),
    ("--resume junk",                "junk: not a checkpoint"),
    ("--resume --overwrite",         "--overwrite: not allowed with argument --resume"),
    ("--wandb online",               "--wandb online: no account"),
    ("--LOG_DIR junk",               "junk/logs_cub"),
]  # fmt: skip


@pytest.mark.parametrize("flags, line", FLAGS)
def test_a_bad_flag_ends_in_one_line(here, capsys, flags, line):
    junk(here)
    make_cub(here / "data")
    before = snapshot(here)
    assert line in fails(TINY + flags, capsys)
    assert snapshot(here) == before


def png(width, height, bits=8, colour=0):
    """A PNG that claims this size and holds hardly any data."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(bytes(100))
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def as_bytes(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
IMAGES = {
    "empty": b"",
    "text": b"not an image",
    "a web page": b"<html>404</html>",
    "torn after the header": as_bytes(NOISE, "JPEG")[:200],
    "torn in the middle": as_bytes(NOISE, "JPEG")[:2000],
    "torn PNG": as_bytes(NOISE, "PNG")[:3000],
    "a decompression bomb": png(30000, 30000),
    "half a decompression bomb": png(12000, 12000),
    "16 bits": as_bytes(Image.fromarray(np.full((40, 40), 40000, np.uint16)), "PNG"),
    "16 bits of RGB": png(40, 40, bits=16, colour=2),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "a thread": as_bytes(Image.new("L", (1, 8000)), "PNG"),
    "floating point": as_bytes(Image.fromarray(np.ones((40, 40), np.float32)), "TIFF"),
    "a folder": replaced_by_folder,
    "a dangling link": dangling,
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_ends_in_one_line_that_names_it(here, capsys, kind, workers):
    path = make_cub(here / "data") / JPEG
    if callable(IMAGES[kind]):
        IMAGES[kind](path)
    else:
        path.write_bytes(IMAGES[kind])
    assert JPEG in fails(TINY + f"--batch-size 20 --workers {workers}", capsys)


def test_readable_images_of_odd_kinds_are_read(tmp_path):
    """CMYK with a profile, a PNG that is called JPEG, an animation's first frame."""
    for name, data in {
        "profile.jpg": (NOISE.convert("CMYK"), "JPEG", {"icc_profile": b"x" * 200}),
        "mislabelled.jpg": (NOISE, "PNG", {}),
        "animation.gif": (NOISE, "GIF", {"save_all": True, "append_images": [NOISE]}),
    }.items():
        image, kind, options = data
        image.save(tmp_path / name, kind, **options)
        assert read_image(tmp_path / name).mode == "RGB"


def sop_list(text, name="Ebay_train.txt"):
    def change(root):
        path = make_sop(root) / SOP / name
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(b"image_id class_id super_class_id path\n" + data)

    return "SOP", change


def cars_mat(**variables):
    def change(root):
        make_cars(root)
        savemat(root / "cars_annos.mat", variables)

    return "cars", change


def records(*rows):
    return np.array([tuple(rows[0].values())], dtype=[(name, object) for name in rows[0]])


def without(make, name, dataset_name):
    def change(root):
        path = make(root) / name
        path.unlink() if path.is_file() else [child.unlink() for child in path.rglob("*.jpg")]

    return dataset_name, change


def write(name, data, dataset_name="cub"):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return dataset_name, change


FIELDS = {name: 1 for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")}
TREES = [
    # (data set, how its tree is made)                        the line has
    (("cub", lambda root: None),                              "tried"),
    (("cub", lambda root: make_cub(root, classes=1)),         "at least two classes"),
    (write("CUB_200_2011/images", b""),                       "images: Not a directory"),
    (without(make_cub, "CUB_200_2011/images", "cub"),         "at least two classes"),
    (without(make_sop, f"{SOP}/Ebay_test.txt", "SOP"),        "Ebay_test.txt"),
    (sop_list(""),                                            "Ebay_train.txt"),
    (sop_list("1 1 1\n"),                                     "Ebay_train.txt: each line"),
    (sop_list("1 one 1 a.jpg\n"),                             "Ebay_train.txt: each line"),
    (sop_list("1 1 1 a b.jpg\n"),                             "Ebay_train.txt: each line"),
    (sop_list(b"\xff\xfe\x00 1 1 x\n"),                       "Ebay_train.txt: each line"),
    (sop_list("1 1 1 ../../etc/passwd\n"),                    "leaves the data set's folder"),
    (sop_list("1 1 1 /etc/passwd\n"),                         "leaves the data set's folder"),
    (sop_list("1 0 1 a.jpg\n"),                               "Ebay_train.txt: each line"),
    (sop_list(f"1 {10**22} 1 a.jpg\n", "Ebay_test.txt"),      "Ebay_test.txt: each line"),
    (sop_list("1 1 1 nowhere.jpg\n"),                         "none of the files"),
    (sop_list("1 1 1 a\0b.jpg\n"),                            "none of the files"),
    (sop_list("1 1 1 ../x.jpg\n", "Ebay_test.txt"),           "leaves the data set's folder"),
    (write("cars_annos.mat", b"", "cars"),                    "cars_annos.mat: not a MATLAB file"),
    (write("cars_annos.mat", b"MATLAB 5.0" * 99, "cars"),     "cars_annos.mat: not a MATLAB file"),
    (cars_mat(other=1),                                       "cars_annos.mat: not a MATLAB file"),
    (cars_mat(annotations=np.eye(3)),                         "cars_annos.mat: not a MATLAB file"),
    (cars_mat(annotations=records({"path": "a.jpg"})),        "cars_annos.mat: not a MATLAB file"),
    (cars_mat(annotations=records({"path": "../a.jpg", **FIELDS})), "leaves the data set's folder"),
    (cars_mat(annotations=records({"path": "/a.jpg", **FIELDS})),   "leaves the data set's folder"),
    (without(make_cars_devkit, "devkit/cars_test_annos_withlabels.mat", "cars"),
     "cars_test_annos_withlabels.mat"),
    (without(make_cars_devkit, "cars_test", "cars"),          "none of the files"),
]  # fmt: skip


@pytest.mark.parametrize("tree, line", TREES)
def test_a_bad_data_tree_ends_in_one_line(here, capsys, tree, line):
    name, make = tree
    make(here / "data")
    assert line in fails(TINY + f"--dataset {name}", capsys)
    assert not (here / "logs").exists()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**33)


def crashing(path):
    """A tuple in a tuple, three million times, as a key: its hash overflows the stack."""
    pickled = b"\x80\x02}" + b")" + b"\x85" * 3_000_000 + b"K\x01s."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("version", b"3"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)


def altered(change, save=torch.save):
    """The checkpoint of a real run, changed."""

    def make(path):
        checkpoint = torch.load(path)
        save(change(checkpoint) or checkpoint, path)

    return make


def put(key, value):
    return altered(lambda checkpoint: checkpoint.update({key: value}))


def weight(value):
    key = "model.embedding.weight"
    return altered(lambda checkpoint: checkpoint["model_state_dict"].update({key: value}))


def flag(name, value):
    return altered(lambda checkpoint: checkpoint["args"].update({name: value}))


def damaged(change):
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes())))


def flip(data):
    data[len(data) // 2] ^= 4
    return data


def state_of_another_shape(checkpoint):
    state = checkpoint["optimizer_state_dict"]["state"]
    state[next(iter(state))]["exp_avg"] = torch.zeros(2, 2)


def forged(part, *path, value=None):
    """`value` put, or nothing left, at a path into one of the stored states."""

    def change(checkpoint):
        at = checkpoint[f"{part}_state_dict"]
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return altered(change)


TRAIN, EVALUATE = "train", "evaluate"
CHECKPOINTS = [
    # read by   how it is made                                   the line has
    (EVALUATE,  lambda path: path.write_bytes(b""),              "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(b"some text\n"),   "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(b"PK\3\4" * 50),   "not a checkpoint"),
    (EVALUATE,  lambda path: path.write_bytes(pickle.dumps(Malicious())), "not a checkpoint"),
    (EVALUATE,  lambda path: torch.save(Malicious(), path),      "more than tensors and plain"),
    (EVALUATE,  lambda path: torch.save({"x": Path()}, path),    "more than tensors and plain"),
    (EVALUATE,  lambda path: torch.save([1, 2], path),           "no dictionary"),
    (EVALUATE,  lambda path: torch.save({}, path),               "no dictionary"),
    (EVALUATE,  lambda path: torch.save({"x": 1}, path),         "no model_state_dict"),
    (EVALUATE,  lambda path: torch.save({"model_state_dict": {}}, path), "missing model."),
    (EVALUATE,  replaced_by_folder,                              "Is a directory"),
    (EVALUATE,  bomb,                                            "unpacks to more than its size"),
    (EVALUATE,  sparse,                                          "larger than 4 GiB"),
    (EVALUATE,  damaged(lambda data: data[: len(data) // 2]),    "its end is missing"),
    (EVALUATE,  damaged(flip),                                   "its SHA-256 is not the stored"),
    (EVALUATE,  weight(5),                                       "embedding.weight int instead of"),
    (EVALUATE,  weight(torch.tensor(1.0)),                       "embedding.weight () instead"),
    (EVALUATE,  lambda path: os.unlink(path) or os.mkfifo(path), "it is a device or a pipe"),
    (EVALUATE,  crashing,                                        "it crashes Python"),
    (EVALUATE,  weight(torch.zeros(16, 1024, dtype=torch.complex64)), "misshapen"),
    (TRAIN,     flag(("a",), 1),                                 "stored flags are not valid"),
    (EVALUATE,  flag("embedding_size", 10**9),                   "stored flags are not valid"),
    (EVALUATE,  weight(torch.zeros(3, 3)),                       "misshapen"),
    (EVALUATE,  weight(torch.full((16, 1024), float("nan"))),    "not all finite"),
    (EVALUATE,  weight(torch.zeros(16, 1024).to_sparse()),       "cannot be loaded"),
    (EVALUATE,  put("args", None),                               "no dictionary"),
    (EVALUATE,  flag("dataset", "birds"),                        "birds: unknown data set"),
    (EVALUATE,  flag("batch_size", "many"),                      "stored flags are not valid"),
    (EVALUATE,  flag("model", "os.system"),                      "stored flags are not valid"),
    (TRAIN,     put("optimizer_state_dict", {}),                 "optimiser or scheduler"),
    (TRAIN,     altered(state_of_another_shape),                 "optimiser or scheduler"),
    (TRAIN,     put("scheduler_state_dict", None),               "optimiser or scheduler"),
    (TRAIN,     forged("scheduler", "last_epoch", value=-7),     "last_epoch is -7, not 1"),
    (TRAIN,     forged("scheduler", "base_lrs", value=[torch.ones(2)]), "base_lrs is [tensor"),
    (TRAIN,     forged("optimizer", "param_groups", 0, "lr", value="x"), "lr is 'x', not 0.0001"),
    (TRAIN,     forged("optimizer", "param_groups", 0, "betas", value=(5, 5)), "betas is (5, 5)"),
    (TRAIN,     forged("optimizer", "param_groups", 0),          "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "param_groups"),             "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg"),    "it has step, exp_avg_sq, not"),
    (TRAIN,     forged("optimizer", "state", 279, value=[1]),    "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 10**6, value={}),   "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 279, "step", value=torch.tensor(-9.0)), "step is"),
    (TRAIN,     forged("optimizer", "state", 279, "step", value="x"), "optimiser or scheduler"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg", value=torch.ones(16).int()), "int32"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg", value=torch.ones(16) / 0), "finite"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg_sq", value=-torch.ones(16)), "negative"),
    (TRAIN,     forged("optimizer", "state", 279, "exp_avg", value=torch.ones(1).expand(16)),
     "ordinary"),
    (TRAIN,     put("criterion_state_dict", {"metric_loss.proxies": torch.zeros(9, 8)}), "(9, 8)"),
    (TRAIN,     put("epoch", "two"),                             "are not a training run's"),
    (TRAIN,     put("history", []),                              "are not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": "best"}]),   "are not a training run's"),
    (TRAIN,     put("partial", {"step": -1}),                    "are not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": 1.0, "R@2": None}]), "not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": float("nan")}]), "not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": 10**400}]),  "not a training run's"),
    (TRAIN,     put("history", [{"epoch": 0, "R@1": 1.0, 5: 1}]), "not a training run's"),
    (TRAIN,     put("args", [1]),                                "are not a training run's"),
    (TRAIN,     flag("lr", float("nan")),                        "stored flags are not valid"),
    (TRAIN,     flag("nonsense", 1),                             "stored flags are not valid"),
    (TRAIN,     lambda path: published_checkpoint(path),         "--weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    make_cub(folder / "data")
    here = os.getcwd()
    os.chdir(folder)
    train.main((TINY + "--epochs 1").split())
    os.chdir(here)
    return folder


@pytest.mark.parametrize("reader, make, line", CHECKPOINTS)
def test_a_bad_checkpoint_ends_in_one_line_and_executes_nothing(
    here, capsys, trained, reader, make, line
):
    path = here / "bad.pth"
    path.write_bytes((run_folder(trained) / "cub_bn_inception_last.pth").read_bytes())
    (here / "data").symlink_to(trained / "data")
    make(path)
    before = snapshot(here)
    command = f"--resume {path} --workers 0 "
    main = evaluate.main
    if reader == TRAIN:
        main, command = train.main, command + "--epochs 2"
    assert line in fails(command, capsys, main)
    assert not (here / "executed").exists() and snapshot(here) == before


@pytest.mark.parametrize("flags, line", [
    ("",                                        "--resume"),
    ("--resume nowhere.pth",                    "nowhere.pth: no such checkpoint"),
    ("--resume {run} --json /nowhere/r.json",   "--json /nowhere/r.json"),
    ("--resume {run} --json /",                 "--json /"),
    ("--resume {run} --json /dev/null",         "--json /dev/null"),
    ("--resume /dev/zero",                      "it is a device or a pipe"),
    ("--resume {run} --dataset birds",          "--dataset birds: unknown data set"),
    ("--resume {run} --embedding-size 9",       "embedding.weight (16, 1024) instead of (18"),
    ("--resume {run} --data-root nowhere",      "tried nowhere"),
])  # fmt: skip
def test_a_bad_flag_of_evaluate_ends_in_one_line(here, capsys, trained, flags, line):
    run = run_folder(trained) / "cub_bn_inception_last.pth"
    assert line in fails(flags.format(run=run), capsys, evaluate.main)


def test_weights_of_another_form_are_refused_in_one_line(here, capsys):
    make_cub(here / "data")
    torch.save({"conv1_7x7_s2.weight": 3}, here / "odd.pth")
    assert "odd.pth: not the weights" in fails(TINY + "--weights odd.pth", capsys)


# --- fuzzing: nothing but a UserError ever comes out ----------------------------------------

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def reads_or_refuses(read):
    try:
        read()
    except UserError as error:
        assert str(error)


def mutated(data, edits):
    data = bytearray(data)
    for where, value in edits:
        data[where % len(data)] = value
    return bytes(data)


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)


@FUZZ
@given(st.lists(st.lists(st.text(max_size=8), max_size=6).map(" ".join), max_size=6).map("\n".join))
def test_fuzzed_list_files_are_read_or_refused(tmp_path, text):
    folder = tmp_path / SOP
    folder.mkdir(exist_ok=True)
    (folder / "Ebay_train.txt").write_text("header\n" + text, encoding="utf-8", newline="")
    (folder / "Ebay_test.txt").write_text("header\n" + text, encoding="utf-8", newline="")
    for split in ("train", "test"):
        reads_or_refuses(lambda: dataset.load("SOP", tmp_path, split))  # noqa: B023


@FUZZ
@given(edits=EDITS)
def test_fuzzed_mat_files_are_read_or_refused(tmp_path, edits):
    if not (tmp_path / "original").exists():
        make_cars(tmp_path)
        (tmp_path / "cars_annos.mat").rename(tmp_path / "original")
    data = (tmp_path / "original").read_bytes()
    (tmp_path / "cars_annos.mat").write_bytes(mutated(data, edits))
    reads_or_refuses(lambda: dataset.load("cars", tmp_path, "train"))


@FUZZ
@given(edits=EDITS, zipped=st.booleans(), cut=st.integers(0, 10**6))
def test_fuzzed_checkpoints_are_read_or_refused(tmp_path, edits, zipped, cut):
    state = {"model_state_dict": {"x": torch.arange(9.0)}, "epoch": 1, "args": {"lr": 0.1}}
    path = tmp_path / "fuzzed.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data = mutated(path.read_bytes(), edits)
    path.write_bytes(data[: cut % len(data)] if cut % 3 == 0 else data)
    reads_or_refuses(lambda: read_checkpoint(path))


def test_there_are_sixty_bad_inputs_in_the_tables():
    assert len(FLAGS) + len(IMAGES) + len(TREES) + len(CHECKPOINTS) >= 60
