"""The names of run folders and checkpoints: the published ones, and any flags that differ."""

import re
from hashlib import sha256
from pathlib import Path

import dataset
from flags import flag_of
from recipe import own_values
from runs.checkpoint import FREE_ON_RESUME

# Flags whose values are in the published names.
NAMED = {"dataset", "model", "loss", "embedding_size", "disent", "al", "be", "gam", "optimizer",
         "lr", "batch_size", "seed", "remark"}  # fmt: skip
SHORT = {"data_root": "", "model": "", "optimizer": "", "image_size": "size",
         "batch_size": "batch", "embedding_size": "embedding", "lr_decay_step": "decay",
         "lr_decay_gamma": "gamma", "weight_decay": "wd", "proxy_lr_factor": "proxylr",
         "train_on": "on", "val_classes": "val"}  # fmt: skip


def settings(args, parser):
    """{flag: value} of the flags that change what is computed, and the same of their usual values:
    those of the data set's published command, else the defaults."""
    own = dataset.own_flag(args.dataset)
    deciding = sorted(vars(args).keys() - FREE_ON_RESUME | {own or "dataset"})
    usual = {name: parser.get_default(name) for name in deciding}
    usual |= own_values(args.loss) | getattr(dataset.module_of(args.dataset), "RECIPE", {})
    given = {name: getattr(args, name) for name in deciding}
    ks = dataset.ks(args.dataset, args.ks)
    given["ks"] = None if ks == dataset.ks(args.dataset) else ks
    chosen = {name: usual[name] if value is None else value for name, value in given.items()}
    if not args.disent:
        chosen |= {"al": 0.0, "be": 0.0, "gam": 0.0}  # without DDML they have no effect
    return chosen, usual


def run_folder_path(args, parser):
    """The published name; flags with unusual values are appended."""
    chosen, usual = settings(args, parser)
    al, be, gam = chosen["al"], chosen["be"], chosen["gam"]
    parts = [
        args.model.replace("/", "_"), args.loss, f"embedding{args.embedding_size}",
        f"al{al}", f"be{be}", f"gam{gam}", args.optimizer, f"lr{args.lr}",
        f"batch{args.batch_size}",
    ]  # fmt: skip
    if args.disent and not al + be + gam:
        parts.append("disent")
    parts += unusual(chosen, usual, chosen.keys() - NAMED)
    if args.seed != 1:
        parts.append(f"seed{args.seed}")
    folder = f"logs_{dataset.title(args.dataset)}"
    parts += [args.remark.removeprefix("_")] if args.remark else []
    return Path(args.LOG_DIR, folder, "_".join(parts))


def unusual(chosen, usual, names):
    """[`size96`] of the flags among `names` that do not have their usual value."""
    return [SHORT.get(name, name.replace("_", "")) + text_of(chosen[name])
            for name in sorted(names) if chosen[name] != usual[name]]  # fmt: skip


def setting_name(args, parser):
    """The run's group in wandb: method, DDML's weights and what is unusual, without seed and fold;
    at most 100 characters, of 128 that wandb takes."""
    chosen, usual = settings(args, parser)
    parts = [title_for_wandb(args)]
    parts += ["ddml"] if args.disent else []
    parts += [args.loss] if args.loss != "Proxy_Anchor" or not args.disent else []
    if args.disent:
        parts += [f"{name}{chosen[name]:g}" for name in ("al", "be", "gam")]
    other = {"dataset", "loss", "disent", "al", "be", "gam", "seed", "fold", "remark"}
    name = "-".join(parts + unusual(chosen, usual, chosen.keys() - other))
    return name if len(name) <= 100 else f"{name[:91]}-{sha256(name.encode()).hexdigest()[:8]}"


def title_for_wandb(args):
    return re.sub(r"[/\\#?%:]", "_", dataset.title(args.dataset))  # what it forbids


def text_of(value):
    if isinstance(value, list):
        return "-".join(map(str, value))
    return Path(value).resolve().name.lstrip("#") if isinstance(value, str) else f"{value:.15g}"


def file_prefix(args):
    return f"{dataset.title(args.dataset)}_{args.model.replace('/', '_')}"


def differences(args, parser, flags):
    """[`--lr 0.1, there 0.2`] for each flag that has another value in `flags`."""
    chosen, _ = settings(args, parser)
    unused = () if args.disent else ("al", "be", "gam")
    return [f"{flag_of(name)} {value}, there {flags[name]}" for name, value in chosen.items()
            if name in flags and flags[name] != value and name not in unused]  # fmt: skip
