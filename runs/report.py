"""What a run says on the terminal: what will happen, each epoch, and at the end what to look at."""

import shutil
import sys
import textwrap

from tqdm import tqdm

from runs.results import best_of, scores_of
from utils import plural, say


def announce(training, steps, device_name, folder):
    """The network by group of parameters, the work, and where it is kept."""
    args, sizes = training.args, []
    for name, group in zip(("backbone", "heads", "proxies"), training.optimizer.param_groups):
        sizes.append(f"{name} {sum(p.numel() for p in group['params']) / 1e6:.2f}")
    loss = f"{args.loss}{' with DDML' if args.disent else ''}"
    epochs = plural(args.epochs - len(training.history), "epoch")
    say(f"{args.model}, {loss}; million parameters: {', '.join(sizes)}")
    say(f"{device_name}, float32: {epochs} of {plural(steps, 'step')} of {args.batch_size} images")
    say(f"run folder: {folder}")


def say_epoch(result, epochs):
    """An epoch's result, and how long the rest of `epochs` will take if each takes as long."""
    scores = "".join(f"{key} {value:.2f}  " for key, value in scores_of(result).items())
    rest = epochs - result["epoch"] - 1
    left = f"; {tqdm.format_interval(rest * result['seconds'])} left" if rest else ""
    line = (
        f"epoch {result['epoch']}  loss {result['loss']:.4f}  {scores}"
        f"({result['seconds']:.1f} s: data {result['seconds_data']:.1f}, steps "
        f"{result['seconds_step']:.1f}, evaluation {result['seconds_eval']:.1f}; "
        f"{result['images_per_second']:.0f} images/s{left})"
    )
    if sys.stdout.isatty():
        line = textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent="  ")
    say(line)


def conclude(history, run_folder, wandb=None):
    """Best and last epoch, and what to look at; `wandb` is an address or a command."""
    last, best = history[-1], best_of(history)
    if scores_of(last):
        widths = {key: max(8, len(key) + 2) for key in scores_of(last)}
        print("    " + "".join(f"{key:>{width}}" for key, width in widths.items()))
        for title, result in (("best", best), ("last", last)):
            values = "".join(f"{result[key]:{width}.2f}" for key, width in widths.items())
            print(f"{title}{values}  epoch {result['epoch']}")
        print("The best epoch is chosen on the test images, the last one is not.")
    else:
        print("Trained on all classes: none is left to test.")
    print(f"run folder: {run_folder.folder}")
    for file in (run_folder.page, run_folder.curves):
        if file.exists():
            print(f"  {file.resolve().as_uri()}")
    for checkpoint in (run_folder.best, run_folder.last):
        if checkpoint.exists():
            print(f"  {checkpoint.name}")
    if wandb:
        print(f"  {wandb}")
