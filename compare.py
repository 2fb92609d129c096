"""Run folders side by side, seeds gathered: python compare.py logs/"""

import csv
import io
import json
import math
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

import dataset
from flags import Parser, flag_of
from runs.checkpoint import FREE_ON_RESUME
from runs.results import best_of, main_metric, scores_of
from storage import require_format, require_writable, write_atomically
from utils import UserError, plural, run

# what does not make a setting
ASIDE = FREE_ON_RESUME | {"seed", "remark", "deterministic", "compile"}
FILES = ("args.json", "metrics.jsonl", "*_last.pth")  # any of which a run leaves

DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, UserError)


def build_parser():
    parser = Parser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("logs", nargs="+", metavar="FOLDER", help="folders with run folders anywhere below them")
    add("--baseline", metavar="FLAG=VALUE",
        help="add the difference to the runs with this flag and otherwise the same, seed by seed, "
        "with its 95 %% t-interval")  # fmt: skip
    add("--csv", metavar="PATH", help="also write the table to this file")
    add("--markdown", metavar="PATH", help="also write it as Markdown")
    add("--plot", metavar="PATH", help="also draw the last R@1 of each setting, to this .png")
    return parser


def read_runs(folders):
    """({(setting, seed): history} of finished runs, [line about a run that is not])."""
    finished, others = {}, []
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder")
        found = {file.parent for name in FILES for file in Path(folder).rglob(name)}
        for path in sorted(found):
            try:
                flags = json.loads((path / "args.json").read_text())["flags"]
                lines = (path / "metrics.jsonl").read_text().splitlines()
                history = [json.loads(line) for line in lines]
                key = setting_of(flags | {"epochs": len(history)}), flags["seed"]
                if len(history) < flags["epochs"]:
                    others.append(f"{path}: {len(history)} of {flags['epochs']} epochs")
                elif not scores_of(history[-1]):
                    others.append(f"{path}: trained on all classes, not tested")
                elif key in finished:
                    others.append(f"{path}: of the setting and seed of a run before it")
                else:
                    finished[key] = history
            except DAMAGE as error:
                others.append(f"{path}: damaged ({' '.join(str(error).split())})")
    return finished, others


def setting_of(flags):
    """What a run was of, but for its seed; the weights of terms that are not there are 0."""
    own = getattr(dataset.module_of(flags["dataset"]), "OWN", None)  # says which images
    kept = flags.keys() - ASIDE | {own, "epochs"}
    setting = {name: value for name, value in flags.items() if name in kept}
    if not flags["disent"]:
        setting |= {"al": 0.0, "be": 0.0, "gam": 0.0}
    return json.dumps(setting, sort_keys=True)


def gather(runs):
    """{setting: {seed: {"last R@K", "best R@K": per cent}}}."""
    settings = {}
    for (setting, seed), history in runs.items():
        numbers = {}
        best = best_of(history, main_metric(history[-1]))
        for which, result in (("last", history[-1]), ("best", best)):
            numbers |= {f"{which} {name}": value for name, value in scores_of(result).items()}
        settings.setdefault(setting, {})[seed] = numbers
    return settings


def with_spread(values):
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread} ({len(values)})"


def table_of(settings, baseline):
    """Rows {column: text}: those of a data set side by side, below them the paper's."""
    flags = {setting: json.loads(setting) for setting in settings}
    have_columns = {"dataset", "loss", "epochs"}
    names = sorted({name for chosen in flags.values() for name in chosen} - have_columns)
    differing = [
        name for name in names
        if len({json.dumps(chosen.get(name)) for chosen in flags.values()}) > 1
    ]  # fmt: skip
    rows = []
    for data_set in sorted({chosen["dataset"] for chosen in flags.values()}):
        paper = getattr(dataset.module_of(data_set), "PAPER", {})
        title = dataset.title(data_set)
        for setting, chosen in sorted(flags.items()):
            if chosen["dataset"] != data_set:
                continue
            numbers = list(settings[setting].values())
            row = {"data set": title, "loss": chosen["loss"]}
            row |= {flag_of(name): str(chosen.get(name)) for name in differing}
            row["epochs"] = str(chosen["epochs"])
            for column in numbers[0]:
                row[column] = with_spread([each[column] for each in numbers if column in each])
            if paper and chosen["disent"] and chosen["loss"] == "Proxy_Anchor":
                ours = mean(each["best R@1"] for each in numbers)
                row["best R@1 - paper's"] = f"{ours - paper['R@1']:+.2f}"
            if baseline:
                row["last R@1 - baseline's"] = paired(setting, settings, flags, baseline)
            rows.append(row)
        if paper:
            quoted = {f"best {name}": f"{value:.1f}" for name, value in paper.items()}
            rows.append({"data set": title, "loss": "the paper's: Proxy_Anchor, DDML"} | quoted)
    return rows


def paired(setting, settings, flags, baseline):
    """The mean difference of the last R@1 to the baseline of the same seeds, with its interval."""
    name, value = baseline
    aside = {name} | ({"al", "be", "gam"} if name == "disent" else set())

    def rest(chosen):
        return {flag: chosen[flag] for flag in chosen if flag not in aside}

    if is_value(flags[setting].get(name), value):
        return "baseline"
    for other, chosen in flags.items():
        if is_value(chosen.get(name), value) and rest(chosen) == rest(flags[setting]):
            ours, theirs = settings[setting], settings[other]
            differences = [
                ours[seed]["last R@1"] - theirs[seed]["last R@1"] for seed in ours if seed in theirs
            ]
            if len(differences) < 2:
                return f"{plural(len(differences), 'seed')} in common"
            n = len(differences)
            half = student_t.ppf(0.975, n - 1) * stdev(differences) / math.sqrt(n)
            return f"{mean(differences):+.2f} ± {half:.2f} ({n})"
    return "none with the rest equal"


def is_value(value, text):
    """Whether a flag's value is what was typed."""
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value).lower() == text.lower()


def columns_of(rows):
    return list(dict.fromkeys(column for row in rows for column in row))


def as_text(rows, markdown=False):
    columns = columns_of(rows)
    cells = [columns, *[[row.get(column, "") for column in columns] for row in rows]]
    if markdown:
        cells.insert(1, ["---"] * len(columns))
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "".join(f"{line}\n" for line in lines)


def as_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_png(settings):
    """The last R@1 of each setting's seeds, a dot each, and their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(settings)), layout="constrained")
    axes = figure.add_subplot(xlabel="last R@1 (%)")
    labels = []
    for row, (setting, seeds) in enumerate(sorted(settings.items())):
        flags = json.loads(setting)
        values = [numbers["last R@1"] for numbers in seeds.values()]
        axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.5)
        axes.plot(mean(values), row, "|", color="C0", markersize=20, markeredgewidth=2)
        method = "DDML " + "/".join(f"{flags[w]:g}" for w in ("al", "be", "gam"))
        labels.append(f"{dataset.title(flags['dataset'])}, {flags['loss']}, {flags['model']}\n"
                      f"{method if flags['disent'] else 'plain'}, lr {flags['lr']:g}")  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def main(argv=None):
    args = build_parser().parse_args(argv)
    require_writable(args, "csv", "markdown", "plot")
    require_format(args, plot={".png": ()})
    runs, others = read_runs(args.logs)
    settings = gather(runs)
    name, _, value = (args.baseline or "").partition("=")
    baseline = value and (name.lstrip("-").replace("-", "_"), value)
    flags = [json.loads(setting) for setting in settings]
    has_it = baseline and any(is_value(chosen.get(baseline[0]), value) for chosen in flags)
    if args.baseline and not has_it:
        raise UserError(f"--baseline {args.baseline}: no finished run has it; FLAG=VALUE, as in "
                        "disent=False")  # fmt: skip
    picture = args.plot and settings and as_png(settings)
    rows = table_of(settings, baseline)
    print(as_text(rows) if rows else "no finished run")
    for line in others:
        print(f"left out: {line}")
    if args.csv:
        write_atomically(Path(args.csv).resolve(), as_csv(rows).encode())
    if args.markdown:
        write_atomically(Path(args.markdown).resolve(), as_text(rows, markdown=True).encode())
    if picture:
        write_atomically(Path(args.plot).resolve(), picture)


if __name__ == "__main__":
    run(main)
