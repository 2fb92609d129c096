"""What a run says on the terminal: what will happen, each epoch, and at the end what to look at."""

import shlex

import torch
from tqdm import tqdm

from distributed import all_reduce_max, rank, world_size
from flags import PRECISIONS
from runs.checkpoint import save
from runs.results import best_of, main_metric, scores_of
from utils import Interrupted, UserError, device_name, out_of_memory, plural, say


def announce(training, steps, run_folder):
    """The network by group of parameters, the work, and where it is kept."""
    args, sizes = training.args, []
    proxies = f"proxies{' of this rank' if args.shard_proxies else ''}"
    for name, group in zip(("backbone", "heads", proxies), training.optimizer.param_groups):
        sizes.append(f"{name} {sum(p.numel() for p in group['params']) / 1e6:.3g}")
    loss = f"{args.loss}{' with DDML' if args.disent else ''}"
    epochs = plural(args.epochs - len(training.history), "epoch")
    say(f"{args.model}, {loss}; million parameters: {', '.join(sizes)}")
    place = device_name(training.device)
    place += f", {world_size()} processes" if world_size() > 1 else ""
    say(f"{place}, {PRECISIONS[args.precision]}: {epochs} of {plural(steps, 'step')} of "
        f"{args.batch_size} images")  # fmt: skip
    say(f"run folder: {run_folder.folder}")


def say_epoch(result, epochs):
    """An epoch's result, and how long the rest of `epochs` will take if each takes as long."""
    rest = epochs - result["epoch"] - 1
    left = f"; {tqdm.format_interval(rest * result['seconds'])} left" if rest else ""
    say(
        f"epoch {result['epoch']}  loss {result['loss']:.4f}  {in_words(result)}"
        f"({result['seconds']:.1f} s: data {result['seconds_data']:.1f}, steps "
        f"{result['seconds_step']:.1f}, evaluation {result['seconds_eval']:.1f}; "
        f"{result['images_per_second']:.0f} images/s{left})"
    )


def early_end(error, training, run_folder):
    """What to raise for what breaks off an epoch (a signal, a damaged image, a full GPU): with what
    is saved, and how to go on."""
    epoch = training.epoch
    # a damaged image is met by one rank alone, and a save takes all of them
    can_save = isinstance(error, Interrupted) or world_size() == 1
    if epoch.step > epoch.saved and can_save and not isinstance(error, torch.OutOfMemoryError):
        save(training, run_folder)
    go_on = "continue with --resume"
    if run_folder.folder:
        go_on = f"continue with: python train.py --resume {shlex.quote(str(run_folder.folder))}"
    if isinstance(error, Interrupted):
        run_folder.wait()
        all_reduce_max(0)  # torchrun ends all at the first that ends: not before rank 0 has saved
        return Interrupted(error.number, go_on)
    saved = bool(training.history or epoch.saved)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(out_of_memory(error) + ("; the last checkpoint is good" if saved else ""))
    all_saved = epoch.step == epoch.saved
    kept = "What was trained is saved" if all_saved else "The last checkpoint is good"
    return type(error)(f"{error}. {kept}; with a good file in its place, {go_on}")


def in_words(result):
    return "".join(f"{key} {value:.2f}  " for key, value in scores_of(result).items())


def conclude(history, run_folder, wandb=None):
    """Best and last epoch, and what to look at; `wandb` is an address or a command."""
    if rank():
        return
    last, metric = history[-1], main_metric(history[-1])
    if metric:
        for title, result in (("best", best_of(history, metric)), ("last", last)):
            print(f"{title}: epoch {result['epoch']}  {in_words(result)}".rstrip())
        print("The best epoch is chosen on the test images, the last one is not.")
    else:
        print("Trained on all classes: none is left to test.")
    folder = run_folder.folder
    print(f"run folder: {folder}")
    if run_folder.page.exists():
        print(f"  to look at: {run_folder.page.resolve().as_uri()}")
    elif metric:
        page = shlex.quote(str(run_folder.page))
        print(f"  to look at: python evaluate.py {shlex.quote(str(folder))} --page {page}")
    best_file = run_folder.best if run_folder.best.exists() else run_folder.last
    print(f"  to evaluate: {best_file}")
    if wandb:
        print(f"  wandb: {wandb}")
