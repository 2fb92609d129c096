"""The wandb side of a run; wandb is imported only where it is used."""

import contextlib
import netrc
import os
import re
from urllib.parse import urlparse

import dataset
from utils import UserError, warn

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
def track(args, mode, folder, run_id):
    """The wandb run, new or with `run_id` continued; None, and wandb is not imported, if mode is
    `disabled`. An exception ends it as failed, without wandb printing a traceback of its own."""
    if mode == "disabled":
        yield None
        return
    run = start_wandb(args, mode, folder, run_id)
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def start_wandb(args, mode, folder, run_id):
    import wandb

    project = re.sub(r"[/\\#?%:]", "_", dataset.title(args.dataset))[:100]  # what wandb forbids
    settings = {
        "project": f"{project}_DDML+PA", "name": folder.name, "dir": str(folder),
        "config": vars(args),
    }  # fmt: skip
    try:
        return wandb.init(
            mode=mode, id=run_id, resume="allow" if run_id else None,
            settings=wandb.Settings(init_timeout=30), **settings,
        )  # fmt: skip
    except wandb.errors.Error as error:
        if args.wandb == "online":
            raise UserError(f"--wandb online: {error}; use --wandb offline") from error
        warn(f"wandb cannot be reached, logging offline ({' '.join(str(error).split())})")
        wandb.teardown()  # the failed attempt still holds its run
        return wandb.init(mode="offline", **settings)
