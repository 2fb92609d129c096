"""All that a GPU is for, on the one that is here, in about ten minutes: steps beside their
roofline, embedding, saving, recall, loading, the CUB command from end to end. Needs a GPU."""

import contextlib
import gc
import io
import json
import os
import shlex
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import train
import utils
from benchmarks.input import write_photo
from benchmarks.timing import report
from dataset.images import ImageSet
from loading.cache import keep_on_device
from loading.loader import Loading, batches, in_parallel, train_loader
from net import compile_modules
from recipe import build_training, loss_noise, prepare_epoch, settle_loss, train_step
from retrieval.metrics import recall_at_k
from runs.checkpoint import capture, largest_of
from utils import UserError, set_precision

DEVICE = torch.device("cuda")
B, SIZE, WORKERS = 180, 224, 16
PRODUCT, COPY = 8192, 2**30  # the side of a matrix, bytes: for the ceilings
GALLERY, PER_CLASS = 60502, 59  # images of SOP, and of a class of CUB
EPOCHS = {"none": 3, "ram": 3, "gpu": 20}  # by --cache
GFLOP, MB = 12.2, 58  # of an image in a step: arithmetic, and traffic in 16 bit
CUB = "--dataset cub --disent True --al 1.0 --be 0.1 --gam 0.00001 --weights none --wandb disabled "
DEMO = (
    CUB.replace("cub", "demo") + "--image-size 64 --batch-size 32 --embedding-size 64 --epochs 12 "
    "--lr 1e-3 --lr-decay-step 8 --warm 0 --bn-freeze 0 "
)
SETTINGS = {
    "fp32": "",
    "fp32, NCHW": "",
    "fp32, compiled": "--compile",
    "tf32": "--precision tf32",
    "bf16": "--precision bf16",
    "bf16, NCHW": "--precision bf16",
    "bf16, compiled": "--precision bf16 --compile",
    "bf16, compiled, CUDA graphs": "--precision bf16 --compile reduce-overhead",
    "bf16, BatchNorm trained": "--precision bf16 --bn-freeze 0",
    "bf16, warm-up": "--precision bf16 --warm 9",
}


def seconds_of(function, rounds=10):
    """Median of calls that are waited for."""
    times = []
    for _ in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def ceilings():
    """({precision: FLOP/s of a product}, bytes/s of a copy), measured."""
    flops, n = {}, PRODUCT
    for precision, dtype in (
        ("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)
    ):  # fmt: skip
        set_precision(precision)
        x = torch.randn(n, n, device=DEVICE, dtype=dtype)
        flops[precision] = 2 * n**3 / seconds_of(partial(torch.mm, x, x))
    x = torch.empty(COPY, dtype=torch.uint8, device=DEVICE)
    return flops, 2 * len(x) / seconds_of(partial(torch.empty_like(x).copy_, x))


def step_with(flags, layout=torch.channels_last):
    """(a training step of 180 images of the CUB command, its Training)."""
    args = train.build_parser().parse_args(shlex.split(CUB + flags))
    settle_loss(args)
    set_precision(args.precision, args.deterministic)
    training = build_training(args, 100, DEVICE, None)
    model = training.model.to(memory_format=layout)
    if args.compile:
        compile_modules(model, [training.criterion], args.compile)
    prepare_epoch(model, 1, args.warm, args.bn_freeze)
    torch.manual_seed(0)
    pixels = torch.randint(256, (B, SIZE, SIZE, 3), dtype=torch.uint8).to(DEVICE)
    labels = (torch.arange(B) % 100).to(DEVICE)

    def step():
        noise = loss_noise((B, args.embedding_size), DEVICE)
        images = model.prepare(pixels).contiguous(memory_format=layout)
        return train_step(model, training.criterion, training.optimizer, images, labels, noise)

    return step, training


def steps():
    """A step at each setting, and the share of what the measured ceilings would allow."""
    flops, bandwidth = ceilings()
    report([{"precision": name, "TFLOP/s": rate / 1e12, "copy GB/s": bandwidth / 1e9}
            for name, rate in flops.items()], __doc__)  # fmt: skip
    rows = []
    for name, flags in SETTINGS.items():
        gc.collect()  # else the row before it would count in the peak
        torch.compiler.reset()
        torch.cuda.reset_peak_memory_stats()
        rows.append(row_of(name, flags, flops, bandwidth))
    report(rows, __doc__)


def row_of(name, flags, flops, bandwidth):
    layout = torch.contiguous_format if "NCHW" in name else torch.channels_last
    step, training = step_with(flags, layout)
    seconds = seconds_of(step)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        values = step()
        torch.cuda.synchronize()
    precision = training.args.precision
    traffic = MB * 1e6 * (1 if precision == "bf16" else 2) / bandwidth
    roof = B * max(GFLOP * 1e9 / flops[precision], traffic)
    return {
        "step in": name,
        "ms": 1000 * seconds,
        "images/s": B / seconds,
        # a warm-up has no backward pass through the backbone
        "of the roofline": roof / seconds if not training.args.warm > 1 else float("nan"),
        "kernels and copies": sum(e.device_type.name == "CUDA" for e in seen.events()),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "its loss": float(values["loss"]),  # after as many steps from the same weights
    }


def determinism():
    """--deterministic: whether two runs of five steps end in the same bits, and what it costs."""
    free, _ = step_with("")
    ends = []
    for _ in range(2):
        step, training = step_with("--deterministic")
        for _ in range(5):
            step()
        ends.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    bound = seconds_of(step)
    set_precision("fp32")
    report([{"--deterministic": "same bits" if torch.equal(*ends) else "OTHER BITS",
             "time of a step, times": bound / seconds_of(free)}], __doc__)  # fmt: skip


def embedding_and_saving():
    rows = []
    for precision in ("fp32", "tf32", "bf16"):
        step, training = step_with(f"--precision {precision}")
        step()  # after which the optimiser has a state to be saved
        pixels = torch.randint(256, (B, SIZE, SIZE, 3), dtype=torch.uint8, device=DEVICE)
        images = training.model.eval().prepare(pixels)
        with torch.inference_mode():
            embeddings = B / seconds_of(partial(training.model.embed, images))
        save = seconds_of(lambda training=training: (capture(training), largest_of(training)))
        rows.append({"precision": precision, "embeddings/s": embeddings,
                     "s a save holds up training": save})  # fmt: skip
    report(rows, __doc__)


def recall():
    """At SOP's size, beside one float32 product, in a process that has asked for TF32."""
    set_precision("tf32")
    torch.manual_seed(0)
    labels = torch.arange(GALLERY, device=DEVICE) // 5
    centres = torch.randn(int(labels[-1]) + 1, 512, device=DEVICE)
    x = F.normalize(centres[labels] + 2.2 * torch.randn(len(labels), 512, device=DEVICE))
    ours = seconds_of(lambda: recall_at_k(x, labels, (1, 10, 100, 1000)), 3)
    set_precision("fp32")
    product = seconds_of(lambda: [rows @ x.T for rows in x.split(8192)], 3)
    report([{"recall at SOP's size": "", "ours s": ours, "product s": product,
             "ours / product": ours / product}], __doc__)  # fmt: skip


def crops():
    """--cache gpu's batches of 180, beside those that Pillow makes in workers."""
    with tempfile.TemporaryDirectory() as root:
        jobs = [(Path(root, f"{i}.jpg"), i) for i in range(B)]
        in_parallel(write_job, jobs, WORKERS, "drawing photographs")
        images = ImageSet([(str(path), "photographs") for path, _ in jobs])
        cpu = torch.device("cpu")
        theirs = train_loader(images, B, 0, Loading(SIZE, 0, cpu))
        ours, _ = keep_on_device(images, theirs, None, Loading(SIZE, WORKERS, DEVICE))
        (made, *_), (expected, *_) = next(iter(ours)), next(batches(theirs, cpu))
        difference = (made.cpu().int() - expected.int()).abs()
    report([{"crops of --cache gpu": "", "ms a batch": 1000 * seconds_of(lambda: next(iter(ours))),
             "grey levels off Pillow's": int(difference.max())}], __doc__)  # fmt: skip


def run_of(flags):
    """metrics.jsonl of a run of train.py, and its seconds from start to end."""
    with tempfile.TemporaryDirectory() as logs, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        train.main(shlex.split(f"{flags} --workers {WORKERS} --LOG_DIR {logs}"))
        seconds = time.perf_counter() - start
        (lines,) = Path(logs).glob("*/*/metrics.jsonl")
        return [json.loads(line) for line in lines.read_text().splitlines()], seconds


def runs():
    """The CUB command on as many made-up photographs, by --cache."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        first = [Path(root, f"CUB_200_2011/images/{c + 1:03d}.Bird/0.jpg") for c in range(200)]
        in_parallel(write_job, list(zip(first, range(200))), WORKERS, "drawing photographs")
        jobs = [(path, i) for path in first for i in range(1, PER_CLASS)]
        in_parallel(write_shifted, jobs, WORKERS, "shifting them")
        for cache, epochs in EPOCHS.items():
            flags = f"{CUB} --data-root {root} --precision bf16 --cache {cache} --epochs {epochs}"
            history, seconds = run_of(flags)
            rows.append({
                "--cache": cache,
                "epochs": epochs,
                "images/s": statistics.median(e["images_per_second"] for e in history[1:]),
                "s of evaluation": statistics.median(e["seconds_eval"] for e in history[1:]),
                "s of 60 such epochs": 60 * statistics.median(e["seconds"] for e in history[1:]),
                "s from start to end": seconds,
            })  # fmt: skip
    report(rows, __doc__)


def write_job(job):
    path, seed = job
    path.parent.mkdir(parents=True, exist_ok=True)
    write_photo(path, seed)


def write_shifted(job):
    """Another image of a class: to draw each one would take minutes."""
    path, number = job
    pixels = np.roll(np.asarray(Image.open(path)), 8 * number, axis=1)
    Image.fromarray(pixels).save(path.with_name(f"{number}.jpg"), quality=93)


def demo_recalls():
    """`make demo`'s command with two seeds, in float32 and in bfloat16."""
    rows = []
    for precision in ("fp32", "bf16"):
        ends = [run_of(f"{DEMO} --precision {precision} --seed {seed}")[0][-1] for seed in (1, 2)]
        rows.append({"demo": precision, **{f"R@1, seed {seed}": end["R@1"]
                                           for seed, end in enumerate(ends, start=1)}})  # fmt: skip
    report(rows, __doc__)


PARTS = (steps, determinism, embedding_and_saving, recall, crops, runs, demo_recalls)


def main():
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here, and everything in this benchmark needs one")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    print(torch.cuda.get_device_name(), torch.__version__)
    print("goals: 0.25 of the roofline, recall within 2 products, 60 CUB epochs in under 90 s")
    for part in PARTS:
        part()


if __name__ == "__main__":
    utils.run(main, "benchmarks.gpu")
