"""What a run prints: what will happen, each epoch, and at the end what to look at."""

import shlex

from tqdm import tqdm

from distributed import rank, world_size
from flags import PRECISIONS
from runs.results import remarks_on, rows_of, scores_of
from utils import device_name, plural, say


def announce(training, steps, run_folder):
    """Say the sizes of the network, the amount of work, and the run folder."""
    args, sizes = training.args, []
    proxies = f"proxies{' of this rank' if args.shard_proxies else ''}"
    for name, group in zip(("backbone", "heads", proxies), training.optimizer.param_groups):
        sizes.append(f"{name} {sum(p.numel() for p in group['params']) / 1e6:.3g}")
    loss = f"{args.loss}{' with DDML' if args.disent else ''}"
    say(f"{args.model}, {loss}; million parameters: {', '.join(sizes)}")
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    epochs = plural(args.epochs - len(training.history), "epoch")
    say(f"{device_name(training.device)}{processes}, {PRECISIONS[args.precision]}: {epochs} of "
        f"{plural(steps, 'step')} of {args.batch_size} images")  # fmt: skip
    say(f"run folder: {run_folder.folder}")


def say_start(metrics):
    """Say how the network retrieves before it is trained."""
    say(f"before training  {in_words(metrics)}".rstrip())


def say_epoch(result, args):
    """Say an epoch's result, and after warm-up the time left if each epoch takes as long."""
    rest = args.epochs - result["epoch"] - 1
    if result["epoch"] < args.warm < args.epochs:
        rest = 0
    left = f"; {tqdm.format_interval(rest * result['seconds'])} left" if rest else ""
    say(
        f"epoch {result['epoch']}  loss {result['loss']:.4f}  {in_words(result)}"
        f"({result['seconds']:.1f} s: data {result['seconds_data']:.1f}, steps "
        f"{result['seconds_step']:.1f}, evaluation {result['seconds_eval']:.1f}; "
        f"{result['images_per_second']:.0f} images/s{left})"
    )


def in_words(result):
    return "".join(f"{key} {value:.2f}  " for key, value in scores_of(result).items())


def conclude(results, run_folder, wandb=None):
    """Print the results, and what to look at; `wandb`: an address or a command."""
    if rank():
        return
    for title, epoch, metrics in rows_of(results):
        when = "" if epoch is None else f"epoch {epoch}  "
        print(f"{title}: {when}{in_words(metrics)}".rstrip())
    for line in remarks_on(results):
        print(line)
    folder = run_folder.folder
    print(f"run folder: {folder}")
    if run_folder.page.exists():
        print(f"  to look at: {run_folder.page.resolve().as_uri()}")
    elif results["chosen_by"]:
        page = shlex.quote(str(run_folder.page))
        print(f"  to look at: python evaluate.py {shlex.quote(str(folder))} --page {page}")
    if results["chosen_by"]:
        print(f"  to evaluate: {run_folder.best if run_folder.best.exists() else run_folder.last}")
    else:
        command = f"python evaluate.py {shlex.quote(str(run_folder.last))}"
        print(f"  to evaluate, on other classes: {command} --dataset folder --data-root DIR")
        print(f"  to ship: {command} --save-model network.pt2")
    if wandb:
        print(f"  wandb: {wandb}")
