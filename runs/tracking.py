"""Logging to wandb, which is imported only where it is used."""

import contextlib
import io
import netrc
import os
import warnings
from functools import partial
from urllib.parse import urlparse

import torch
from PIL import Image

from retrieval.picture import png_of
from runs.naming import title_for_wandb
from runs.results import results_of, rows_of, scores_of
from utils import Interrupted, UserError, warn

WANDB_MODES = ("online", "offline", "disabled", "run", "dryrun")


def wandb_mode(requested):
    """The mode of --wandb; `auto` is online with an account, offline without. Nobody is asked for a
    key (differs: the script wants an account)."""
    if requested == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_account() else "offline")
        if mode not in WANDB_MODES:
            raise UserError(f"WANDB_MODE={mode}: choose from {', '.join(WANDB_MODES)}")
        return mode
    if requested == "online" and not has_wandb_account():
        raise UserError("--wandb online: no account on this machine; run `wandb login`, set "
                        "WANDB_API_KEY, or use --wandb offline")  # fmt: skip
    return requested


def has_wandb_account():
    """Whether there is a key for wandb's server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    try:
        url = urlparse(wandb.Settings().base_url)
    except ValueError as error:  # pydantic's, of several lines
        raise UserError(f"wandb's settings, WANDB_BASE_URL among them: {error}") from error
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) for host in (url.hostname, url.netloc))


@contextlib.contextmanager
def track(args, mode, setting, folder, run_id, config, history):
    """In a `with`: the wandb run `run_id`, or a new one; None if mode is `disabled`. `setting`: its
    group. Epochs of `history` that it lacks are logged. wandb shows an exception as failed, a
    signal as preempted."""
    if mode == "disabled":
        yield None
        return
    run = start_wandb(args, mode, setting, folder, run_id, config)
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    for done in range(run.starting_step, len(history)):  # from 0 in an offline run's new file
        log_epoch(run, history[: done + 1])
    try:
        yield run
    except BaseException as error:  # `with run` would print a traceback
        if isinstance(error, Interrupted):
            run.mark_preempting()
        run.finish(exit_code=1)
        raise
    run.finish()


def start_wandb(args, mode, setting, folder, run_id, config):
    import wandb

    fold = f"-f{args.fold}" if args.val_classes else ""
    start = partial(
        wandb.init, id=run_id, resume="allow" if run_id else None, dir=str(folder), config=config,
        name=os.environ.get("WANDB_NAME") or f"{setting}{fold}-s{args.seed}{args.remark}",
        project=os.environ.get("WANDB_PROJECT") or f"{title_for_wandb(args)[:90]}_DDML+PA",
        group=os.environ.get("WANDB_RUN_GROUP") or setting,
        tags=[args.loss, "DDML" if args.disent else "plain", args.model],
        settings=wandb.Settings(init_timeout=30, silent=True),
    )  # fmt: skip
    try:
        return start(mode=mode)
    except wandb.errors.Error as error:
        if args.wandb == "online":
            raise UserError(f"--wandb online: {error}; use --wandb offline") from error
        warn(f"wandb cannot be reached, logging offline ({' '.join(str(error).split())})")
        wandb.teardown()  # the failed attempt still holds its run
        return start(mode="offline")


def log_epoch(run, history, **more):
    """Log the newest epoch, with recalls as fractions like the published script's, and summarise.
    `run` is None without wandb."""
    if run is None:
        return
    result = history[-1]
    numbers = {name: value for name, value in result.items() if value is not None}
    fractions = {name: percent / 100 for name, percent in scores_of(result).items()}
    run.log({**numbers, **fractions, **more}, step=result["epoch"])
    summarise(run, results_of(history))


def summarise(run, results):
    """wandb's summary: before training, the chosen or best epoch and the last, as fractions."""
    for which, epoch, metrics in rows_of(results) if run else ():
        run.summary[f"{which}/epoch"] = epoch
        for name, percent in metrics.items():
            run.summary[f"{which}/{name}"] = percent / 100


def memory_of(device):
    """The largest memory of a GPU that was in use so far; empty for the CPU."""
    gpu = device.type == "cuda"
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if gpu else {}


def log_picture(run, figure):
    """Log a matplotlib figure with the last epoch."""
    import wandb

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's font lacks some letters
        picture = io.BytesIO(png_of(figure, 100))
    run.log({"retrieval": wandb.Image(Image.open(picture))}, step=run.step)


def address_of(run):
    """A run's URL, or the command that uploads an offline one; None without wandb."""
    return run and (f"wandb sync {run.settings.sync_dir}" if run.offline else run.url)
