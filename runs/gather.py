"""Finished runs gathered by setting: which may share a row, and the statistics of a row."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student_t

import dataset
from runs.checkpoint import FREE_ON_RESUME
from runs.results import HELD_OUT, remarks_on_images, rows_of
from utils import UserError, plural

# Flags that may differ within a row; all others change the numbers.
NOT_COMPARED = FREE_ON_RESUME - {"epochs"} | {"seed", "fold", "remark"}
VALIDATION = "chosen", f"{HELD_OUT}MAP@R"  # the epoch and the metric that choose a setting
FILES = ("args.json", "metrics.jsonl", "*_last.pth")  # a run's folder has at least one of these


class Setting(NamedTuple):
    """Runs with the same flags and images; only seed and fold differ."""

    flags: dict
    images: dict  # {split: {"images", "classes", "digest"}}, as in results.json
    metric: str  # Recall@K of the least K
    rows: dict  # {seed: {fold: {"start", "chosen" or "best", "last": {metric: per cent}}}}
    processes: list  # each run's processes from args.json: commit, device, ...
    seen: set  # lines about test images that were trained on


def gather(folders):
    """([Setting], sorted as in a table; [a line about each run that is left out])."""
    settings, left_out = {}, []
    for path in run_folders(folders):
        try:
            described = json.loads((path / "args.json").read_text())
            if reason := why_unfinished(path, described["flags"]):
                left_out.append(f"{path}: {reason}")
                continue
            results = json.loads((path / "results.json").read_text())
            if not results["chosen_by"]:
                left_out.append(f"{path}: trained on all classes, not tested")
                continue
            flags, images, key = identity(described["flags"], results["images"])
            rows = {title: metrics for title, _, metrics in rows_of(results)}
            metric = next(name for name in rows["last"] if name.startswith("R@"))
            setting = settings.setdefault(key, Setting(flags, images, metric, {}, [], set()))
            seed, fold = (described["flags"].get(name) for name in ("seed", "fold"))
            folds = setting.rows.setdefault(seed, {})
            if fold in folds:
                left_out.append(f"{path}: has the setting and seed of another run")
                continue
            folds[fold] = rows
            setting.processes.extend([described, *described["resumed"]])
            setting.seen.update(remarks_on_images(results["images"]))
        except (OSError, ValueError, LookupError, StopIteration, UserError) as error:
            left_out.append(f"{path}: damaged ({' '.join(str(error).split())})")
    settings = [setting for _, setting in sorted(settings.items())]
    left_out += [line for each in settings for line in drop_partial_seeds(each)]
    return [each for each in settings if each.rows], left_out


def run_folders(folders):
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder")
        yield from sorted({file.parent for name in FILES for file in Path(folder).rglob(name)})


def why_unfinished(path, flags):
    """Why the run has no numbers to compare; None if it has."""
    if (path / "results.json").exists():
        return None
    epochs = len((path / "metrics.jsonl").read_text().splitlines())
    if epochs < flags["epochs"]:
        return f"{epochs} of {plural(flags['epochs'], 'epoch')}"
    return f"without results.json; python train.py --resume {path} writes it"


def identity(flags, images):
    """(flags, images, key) of a run's setting: the flags that change its numbers, the images."""
    own = dataset.own_flag(flags["dataset"])
    # None: not given, or the run is older than the flag
    compared = {name: value for name, value in flags.items()
                if value is not None and name not in NOT_COMPARED - {own}}  # fmt: skip
    if not flags["disent"]:  # DDML's weights have no effect
        compared |= {"al": 0.0, "be": 0.0, "gam": 0.0}
    used = {"train": images.get("train + val", images["train"]), "test": images["test"]}
    images = {split: {name: each[name] for name in ("images", "classes", "digest")}
              for split, each in used.items()}  # fmt: skip
    text = json.dumps([compared, images], sort_keys=True)
    return compared, images, (compared["dataset"], compared["loss"], text)


def drop_partial_seeds(setting):
    """Remove seeds that lack a fold of other seeds. Yields a line about each."""
    folds = {fold for of_seed in setting.rows.values() for fold in of_seed}
    for seed in [seed for seed, of_seed in setting.rows.items() if of_seed.keys() < folds]:
        lacking = ", ".join(map(str, sorted(folds - setting.rows.pop(seed).keys())))
        loss = f"{setting.flags['loss']}{' with DDML' * setting.flags['disent']}"
        yield f"{setting.flags['dataset']}, {loss}: seed {seed} lacks fold {lacking} of others"


def folds_of(setting):
    """The folds of each seed; [None] without --val-classes."""
    return sorted(next(iter(setting.rows.values())))


def epoch_to_compare(setting, by=None):
    """`by`; by default "chosen" if held-out classes have chosen an epoch, else "last"."""
    return by or ("chosen" if setting.flags.get("val_classes") else "last")


def by_seed(setting, which, metric, seeds=None):
    """{seed: per cent}, the mean over folds, of all seeds or of `seeds`; {} unless each of their
    runs has the metric."""
    runs = {seed: [rows.get(which, {}).get(metric) for rows in setting.rows[seed].values()]
            for seed in seeds or setting.rows}  # fmt: skip
    if any(value is None for values in runs.values() for value in values):
        return {}
    return {seed: mean(values) for seed, values in runs.items()}


def metrics_of(setting, which):
    """The names of the metrics that every run has for this epoch."""
    names = {name: None for folds in setting.rows.values() for rows in folds.values()
             for name in rows.get(which, {})}  # fmt: skip
    return [name for name in names if by_seed(setting, which, name)]


class Difference(NamedTuple):
    """Mean of paired differences, half its 95 % t-interval, number of seeds, and verdict."""

    mean: float
    half_width: float
    seeds: int
    verdict: str  # "higher", "lower" or "not told apart"

    def __str__(self):
        return f"{self.mean:+.2f} ± {self.half_width:.2f} ({self.seeds}): {self.verdict}"


def difference(setting, other, which, metric):
    """`paired` of two settings."""
    return paired(by_seed(setting, which, metric), by_seed(other, which, metric))


def paired(ours, theirs):
    """The Difference ours - theirs over the seeds that both {seed: value} have; None below two."""
    values = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    n = len(values)
    if n < 2:
        return None
    half = student_t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n)
    apart = abs(mean(values)) > half
    verdict = ("higher" if mean(values) > 0 else "lower") if apart else "not told apart"
    return Difference(mean(values), half, n, verdict)


def choose(settings):
    """[(settings of a search, their common seeds, the best setting, its seeds to report)]. The best
    has the highest mean validation MAP@R over the common seeds. It is reported on its other seeds,
    if it has any."""
    groups, found = {}, []
    for setting in settings:
        if by_seed(setting, *VALIDATION):
            groups.setdefault(group_of(setting), []).append(setting)
    for trials in groups.values():
        common = set.intersection(*(set(trial.rows) for trial in trials))
        if not common:
            raise UserError(f"--choose: {trials[0].flags['loss']} has {len(trials)} settings "
                            "without a seed in common; train all of them with the same seed")
        means = [mean(by_seed(trial, *VALIDATION, common).values()) for trial in trials]
        best = trials[means.index(max(means))]
        found.append((trials, common, best, best.rows.keys() - common or common))
    return found


def group_of(setting):
    """The same text for settings that are trials of one search."""
    names = ("dataset", "val_classes", "model", "image_size", "embedding_size", "loss", "disent")
    return str([setting.images, folds_of(setting), *map(setting.flags.get, names)])
