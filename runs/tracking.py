"""The wandb side of a run; wandb is imported only where it is used."""

import contextlib
import io
import netrc
import os
import re
import warnings
from functools import partial
from urllib.parse import urlparse

import torch
from PIL import Image

import dataset
from runs.results import best_of, main_metric, scores_of
from utils import Interrupted, UserError, warn

WANDB_MODES = {"online": "online", "offline": "offline", "disabled": "disabled",
               "run": "online", "dryrun": "offline"}  # fmt: skip


def wandb_mode(requested):
    """`auto` is online with an account and offline without one; nobody is ever asked for a key
    (differs: the script wants an account)."""
    if requested == "auto" and os.environ.get("WANDB_MODE"):
        mode = os.environ["WANDB_MODE"]
        if mode not in WANDB_MODES:
            raise UserError(f"WANDB_MODE={mode}: choose from {', '.join(WANDB_MODES)}")
        return WANDB_MODES[mode]
    if requested == "auto":
        return "online" if has_wandb_account() else "offline"
    if requested == "online" and not has_wandb_account():
        raise UserError(
            "--wandb online: no account on this machine; run `wandb login`, set WANDB_API_KEY, "
            "or use --wandb offline"
        )
    return requested


def has_wandb_account():
    """Whether there is a key for the server that wandb would use; asks nobody for one."""
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
def track(args, mode, folder, run_id, config, history):
    """The wandb run, new or with `run_id` continued; None, and wandb is not imported, if mode is
    `disabled`. What it lacks of `history` is logged. An exception ends it as failed, a signal as
    preempted, without wandb printing a traceback of its own."""
    if mode == "disabled":
        yield None
        return
    run = start_wandb(args, mode, folder, run_id, config)
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    for done in range(run.starting_step, len(history)):  # 0 in a new file of an offline run
        log_epoch(run, history[: done + 1])
    try:
        yield run
    except BaseException as error:
        if isinstance(error, Interrupted):
            run.mark_preempting()
        run.finish(exit_code=1)
        raise
    run.finish()


def start_wandb(args, mode, folder, run_id, config):
    import wandb

    title = re.sub(r"[/\\#?%:]", "_", dataset.title(args.dataset))[:90]  # what wandb forbids
    method = f"ddml-{args.loss}" if args.disent else args.loss
    group = f"{title}-{'ddml' if method == 'ddml-Proxy_Anchor' else method}"
    settings = {
        "name": os.environ.get("WANDB_NAME") or f"{group}-s{args.seed}{args.remark}",
        "project": os.environ.get("WANDB_PROJECT") or f"{title}_DDML+PA",
        "group": os.environ.get("WANDB_RUN_GROUP") or group,
        "tags": [args.loss, "DDML" if args.disent else "plain", args.model],
        "dir": str(folder), "config": config,
    }  # fmt: skip
    start = partial(
        wandb.init, id=run_id, resume="allow" if run_id else None,
        settings=wandb.Settings(init_timeout=30, silent=True), **settings,
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
    """The newest of the results, recalls as the published script's fractions, and the best. Nothing
    where `run` is None."""
    if run is None:
        return
    result, best = history[-1], best_of(history, main_metric(history[-1]))
    in_percent = scores_of(result)
    numbers = {name: value for name, value in result.items() if value is not None}
    run.log(numbers | {name: in_percent[name] / 100 for name in in_percent} | more,
            step=result["epoch"])  # fmt: skip
    for which, chosen in (("last", result), ("best", best)):
        run.summary[f"{which}/epoch"] = chosen["epoch"]
        for name, value in scores_of(chosen).items():
            run.summary[f"{which}/{name}"] = value / 100


def memory_of(device):
    """The most that was taken of a GPU's memory so far."""
    if device.type != "cuda":
        return {}
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def log_picture(run, figure):
    """A matplotlib figure, beside the last epoch's numbers."""
    import wandb

    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's font lacks
        figure.savefig(picture)
    run.log({"retrieval": wandb.Image(Image.open(picture))}, step=run.step)


def address_of(run):
    """Where a run is seen, or the command that sends an offline one there; None without wandb."""
    if run is None:
        return None
    return f"wandb sync {run.settings.sync_dir}" if run.offline else run.url
