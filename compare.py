"""Run folders side by side, seeds gathered: python compare.py logs/"""

import csv
import json
import math
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student_t

import dataset
from flags import Parser, flag_of
from runs.checkpoint import FREE_ON_RESUME
from runs.results import HELD_OUT, results_of, rows_of
from storage import replacing, require_format, require_writable, write_atomically
from utils import UserError, plural, run

# flags that do not make a setting
NOT_COMPARED = FREE_ON_RESUME | {"seed", "remark", "deterministic", "compile"}
FILES = ("args.json", "metrics.jsonl", "*_last.pth")  # any of which a run leaves


class Setting(NamedTuple):
    """Runs that differ in their seeds alone."""

    flags: dict
    metric: str  # Recall@K of the runs' least K: settings are compared by it
    seeds: dict  # {seed: {"start", "best", "last": {metric: per cent}}}


def build_parser():
    parser = Parser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("logs", nargs="+", metavar="FOLDER", help="folders with run folders anywhere below them")
    add("--baseline", metavar="FLAG=VALUE",
        help="add the difference to the runs with this flag and otherwise the same, seed by seed, "
        "with its 95 %% t-interval")  # fmt: skip
    add("--csv", metavar="PATH", help="also write the table to this file")
    add("--markdown", metavar="PATH", help="also write it as Markdown")
    add("--plot", metavar="PATH", help="also draw the last Recall@K, of the least K, to this .png")
    return parser


def read_runs(folders):
    """([Setting] of the finished runs, in the table's order, [line about each other run])."""
    settings, left_out = {}, []
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder")
        for path in sorted({file.parent for name in FILES for file in Path(folder).rglob(name)}):
            try:
                flags = json.loads((path / "args.json").read_text())["flags"]
                history = list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))
                patience = flags.get("patience")  # which ends each seed at another epoch
                compared = compared_flags(flags if patience else flags | {"epochs": len(history)})
                key = compared["dataset"], json.dumps(compared, sort_keys=True)
                file = path / "results.json"
                results = json.loads(file.read_text()) if file.exists() else results_of(history)
                rows = {title: metrics for title, _, metrics in rows_of(results)}
                metric = next(iter(rows["last"]), None)
                setting = settings.get(key) or Setting(compared, metric, {})
                if not file.exists() and flags.get("val_classes"):
                    left_out.append(f"{path}: its test images are not evaluated yet")
                elif not file.exists() and len(history) < flags["epochs"]:
                    left_out.append(f"{path}: {len(history)} of {flags['epochs']} epochs")
                elif not metric:
                    left_out.append(f"{path}: trained on all classes, not tested")
                elif flags["seed"] in setting.seeds:
                    left_out.append(f"{path}: of the setting and seed of a run before it")
                else:
                    setting.seeds[flags["seed"]] = rows
                    settings[key] = setting
            except (OSError, ValueError, LookupError, UserError) as error:
                left_out.append(f"{path}: damaged ({' '.join(str(error).split())})")
    return [setting for _, setting in sorted(settings.items())], left_out


def compared_flags(flags):
    """The flags that make a setting. Without DDML, the weights of its terms are 0."""
    own = getattr(dataset.module_of(flags["dataset"]), "OWN", None)  # says which images
    names = flags.keys() - NOT_COMPARED | {own, "epochs"}
    weights = {} if flags["disent"] else {"al": 0.0, "be": 0.0, "gam": 0.0}
    # None: not given, or of a run from before there was the flag
    chosen = {name: value for name, value in flags.items() if name in names and value is not None}
    return chosen | weights


def is_shown(metric):
    """Of the metrics of held-out classes, the one that chooses."""
    return not metric.startswith(HELD_OUT) or metric == f"{HELD_OUT}MAP@R"


def with_spread(values):
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread} ({len(values)})"


def table_of(settings, baseline):
    """[{column: text}]: a row for each setting, and below each data set's the paper's."""
    names = {name for setting in settings for name in setting.flags}
    differing = [
        name for name in sorted(names - {"dataset", "loss", "epochs"})
        if len({json.dumps(setting.flags.get(name)) for setting in settings}) > 1
    ]  # fmt: skip
    rows = []
    for data_set, group in groupby(settings, key=lambda setting: setting.flags["dataset"]):
        paper = getattr(dataset.module_of(data_set), "PAPER", {})
        title = dataset.title(data_set)
        for setting in group:
            flags, metric, results = setting.flags, setting.metric, list(setting.seeds.values())
            row = {"data set": title, "loss": flags["loss"]}
            row |= {flag_of(name): str(flags.get(name)) for name in differing}
            row["epochs"] = str(flags["epochs"])
            for which in ("start", "best", "last"):
                rows_of_seeds = [each[which] for each in results if which in each]
                names = dict.fromkeys(name for metrics in rows_of_seeds for name in metrics)
                for name in filter(is_shown, names):
                    values = [metrics[name] for metrics in rows_of_seeds if name in metrics]
                    row[f"{which} {name}"] = with_spread(values)
            if metric in paper and flags["disent"] and flags["loss"] == "Proxy_Anchor":
                ours = mean(each["best"][metric] for each in results)
                row[f"best {metric} - paper's"] = f"{ours - paper[metric]:+.2f}"
            if baseline:
                row[f"last {metric} - baseline's"] = difference(setting, settings, baseline)
            rows.append(row)
        if paper:
            quoted = {f"best {name}": f"{value:.1f}" for name, value in paper.items()}
            rows.append({"data set": title, "loss": "the paper's: Proxy_Anchor, DDML"} | quoted)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [columns, *[[row.get(column, "") for column in columns] for row in rows]]


def difference(setting, settings, baseline):
    """The mean difference to the baseline's runs of the same seeds, with its interval."""
    if has(setting, baseline):
        return "baseline"
    flags, metric, seeds = setting
    flag, _ = baseline
    ignored = dict.fromkeys((flag, "al", "be", "gam") if flag == "disent" else (flag,))
    for other in settings:
        if has(other, baseline) and other.flags | ignored == flags | ignored:
            if metric not in next(iter(other.seeds.values()))["last"]:
                return f"the baseline has no {metric}"
            differences = [
                result["last"][metric] - other.seeds[seed]["last"][metric]
                for seed, result in seeds.items() if seed in other.seeds
            ]  # fmt: skip
            n = len(differences)
            if n < 2:
                return f"{plural(n, 'seed')} in common"
            half = student_t.ppf(0.975, n - 1) * stdev(differences) / math.sqrt(n)
            return f"{mean(differences):+.2f} ± {half:.2f} ({n})"
    return "none with the rest equal"


def has(setting, baseline):
    """Whether the setting has the flag's value, as typed."""
    flag, text = baseline
    value = setting.flags.get(flag)
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()


def plot(settings):
    """The seeds of each setting as dots, and their mean as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(settings)), layout="constrained")
    axes = figure.add_subplot(xlabel="last Recall@K (%)")
    labels = []
    for row, (flags, metric, seeds) in enumerate(settings):
        values = [result["last"][metric] for result in seeds.values()]
        axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.5)
        axes.plot(mean(values), row, "|", color="C0", markersize=20, markeredgewidth=2)
        weights = "/".join(f"{flags[name]:g}" for name in ("al", "be", "gam"))
        method = f"DDML {weights}" if flags["disent"] else "plain"
        labels.append(f"{dataset.title(flags['dataset'])}, {flags['loss']}, {flags['model']}\n"
                      f"{method}, lr {flags['lr']:g}, {metric}")  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure


def main(argv=None):
    args = build_parser().parse_args(argv)
    require_writable(args, "csv", "markdown", "plot")
    require_format(args, plot={".png": ()})
    settings, left_out = read_runs(args.logs)
    flag, _, value = (args.baseline or "").partition("=")
    baseline = args.baseline and (flag.lstrip("-").replace("-", "_"), value)
    if baseline and not any(has(setting, baseline) for setting in settings):
        raise UserError(f"--baseline {args.baseline}: no finished run has it; FLAG=VALUE, as in "
                        "disent=False")  # fmt: skip
    table = table_of(settings, baseline)
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in table]
    print("".join(lines) if settings else "no finished run")
    for line in left_out:
        print(f"left out: {line}")
    if args.csv:
        with replacing(Path(args.csv).resolve()) as new, open(new, "w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
    if args.markdown:
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        write_atomically(Path(args.markdown).resolve(), text.encode())
    if args.plot and settings:
        with replacing(Path(args.plot).resolve()) as new:
            plot(settings).savefig(new, format="png", dpi=150)


if __name__ == "__main__":
    run(main)
