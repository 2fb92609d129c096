"""Tables of run folders, averaged over seeds: python compare.py logs/"""

import csv
from pathlib import Path
from statistics import mean
from textwrap import fill

from flags import Parser
from retrieval.picture import png_of
from runs.gather import VALIDATION, by_seed, choose, difference, epoch_to_compare, folds_of, gather
from runs.results import HELD_OUT
from runs.tables import (
    OF_LOSS,
    full_table,
    grouped_by_images,
    images_of,
    in_columns,
    labels_of,
    notes_on,
    short_table,
    with_spread,
)
from storage import replacing, require_format, require_writable, write_atomically
from utils import UserError, plural, run

WIDTH = 100  # columns of text
# {flag of --baseline: other flags that may then differ from the baseline too}
BRINGS = {"disent": ("al", "be", "gam"), "loss": OF_LOSS}


def build_parser():
    parser = Parser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("logs", nargs="+", metavar="FOLDER", help="folders with run folders anywhere below them")
    add("--by", choices=["chosen", "last", "best"],
        help="the epoch to compare: chosen by held-out classes, the last, or the best on the test "
        "images; by default chosen for runs with --val-classes, last for others")  # fmt: skip
    add("--baseline", action="append", metavar="FLAG=VALUE",
        help="compare with the runs that have this value and otherwise the same flags, seed by "
        "seed; may be repeated; by default disent=False, if there are runs of both")  # fmt: skip
    add("--choose", action="store_true",
        help="also name the setting of each loss and network with the best validation MAP@R")
    add("--all", action="store_true", help="print every column, however wide")
    add("--csv", metavar="PATH", help="also write every column to this file")
    add("--markdown", metavar="PATH", help="also write every column as Markdown")
    add("--plot", metavar="PATH", help="also draw Recall@K of the smallest K, to this .png")
    return parser


def parse_baseline(given, settings):
    """{flag: text} of --baseline; {} if there is none."""
    if not given:
        both = {setting.flags["disent"] for setting in settings} == {True, False}
        return {"disent": "False"} if both else {}
    pairs = (text.lstrip("-").partition("=") for text in given)
    baseline = {flag.replace("-", "_"): value for flag, _, value in pairs}
    if settings and not any(has(setting, baseline) for setting in settings):
        raise UserError(f"--baseline {' '.join(given)}: no finished run has it; give FLAG=VALUE, "
                        "as in disent=False")  # fmt: skip
    return baseline


def has(setting, baseline):
    """Whether the setting has the baseline's values, as typed."""

    def equal(value, text):
        try:
            return float(value) == float(text)
        except (TypeError, ValueError):
            return str(value).lower() == text.lower()

    return all(equal(setting.flags.get(flag), text) for flag, text in baseline.items())


def comparison(setting, settings, baseline, by):
    """The Difference to the baseline, or why there is none."""
    if has(setting, baseline):
        return "baseline"
    ignored = dict.fromkeys(name for flag in baseline for name in (flag, *BRINGS.get(flag, ())))
    found = [other for other in settings if has(other, baseline) and other.images == setting.images
             and other.flags | ignored == setting.flags | ignored]  # fmt: skip
    if not found:
        return "no baseline with otherwise equal flags"
    if len(found) > 1:
        return f"{len(found)} baselines with otherwise equal flags: add a --baseline to name one"
    if folds_of(setting) != folds_of(found[0]):
        return f"has folds {in_order(folds_of(setting))}, the baseline has others"
    which = epoch_to_compare(setting, by)
    if not by_seed(setting, which, setting.metric):
        return f"has no {which} epoch"
    told = difference(setting, found[0], which, setting.metric)
    return told or "fewer than 2 seeds in common with the baseline"


def in_words(told, metric):
    """A comparison as the end of a sentence."""
    if isinstance(told, str):
        return told
    interval = f"{told.half_width:.2f} (95 % interval of {told.seeds} seeds)"
    if told.verdict == "not told apart":
        return (f"{metric} is not told apart from the baseline's by {told.seeds} seeds: "
                f"{told.mean:+.2f} ± {interval}")  # fmt: skip
    return f"{metric} is {told.verdict} than the baseline's by {abs(told.mean):.2f} ± {interval}"


def report(settings, compared, by):
    """The short tables, with verdicts and notes."""
    yield "mean ± standard deviation over the seeds; 3x4: 3 seeds, each the mean of its 4 folds\n"
    for title, group in grouped_by_images(settings):
        yield f"{title}: {images_of(group[0])}"
        yield from in_columns(short_table(group, by), WIDTH)
        for label, setting in zip(labels_of(group), group):
            told = compared.get(id(setting), "baseline")
            if told != "baseline":
                metric = f"{epoch_to_compare(setting, by)} {setting.metric}"
                yield in_lines(f"{label}: {in_words(told, metric)}")
            if notes := notes_on(setting):
                yield in_lines(f"note: {label}: {'; '.join(notes)}")
        yield ""


def in_lines(text):
    return fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def report_choice(settings):
    """A line about the best setting of each search, and one if searches had unequal trials."""
    groups = choose(settings)
    if not groups:
        raise UserError("--choose: no finished run has --val-classes, by which to choose")
    for trials, common, best, seeds in groups:
        label = labels_of(trials)[trials.index(best)]
        metrics = [f"{name} {with_spread(by_seed(best, 'chosen', name, seeds))}"
                   for name in (best.metric, "MAP@R")]  # fmt: skip
        yield in_lines(
            f"chosen of {plural(len(trials), 'setting')} by {HELD_OUT}MAP@R "
            f"{with_spread(by_seed(best, *VALIDATION, common))} (seeds {in_order(common)}; "
            f"folds {in_order(folds_of(best))}): {best.flags['dataset']}, {label}; its test: "
            f"{', '.join(metrics)} (seeds {in_order(seeds)})"
        )
    if len(counts := {len(trials) for trials, *_ in groups}) > 1:
        yield in_lines(f"note: between {min(counts)} and {max(counts)} settings were tried; a fair "
                       "comparison tries equally many of each")  # fmt: skip


def in_order(seeds):
    return ", ".join(map(str, sorted(seeds)))


def plot(settings, by):
    """The seeds of each setting as dots, and their mean as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.6 * len(settings)), layout="constrained")
    axes = figure.add_subplot(xlabel="Recall@K (%)")
    ticks = []
    for title, group in grouped_by_images(settings):
        where = f"{title}, {images_of(group[0])}"
        for label, setting in zip(labels_of(group), group):
            which = epoch_to_compare(setting, by)
            values = by_seed(setting, which, setting.metric).values()
            row = len(ticks)
            axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.5)
            if values:
                axes.plot(mean(values), row, "|", color="C0", markersize=20, markeredgewidth=2)
            ticks.append(fill(f"{label}; {which} {setting.metric}; {where}", 80))
    axes.set_yticks(range(len(ticks)), ticks)
    axes.set_ylim(len(ticks) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure


def main(argv=None):
    args = build_parser().parse_args(argv)
    require_writable(args, "csv", "markdown", "plot")
    require_format(args, plot={".png": ()})
    settings, left_out = gather(args.logs)
    baseline = parse_baseline(args.baseline, settings)
    compared = {}
    if baseline:
        compared = {id(setting): comparison(setting, settings, baseline, args.by)
                    for setting in settings}  # fmt: skip
    table = full_table(settings, compared, args.by) if settings else []
    lines = in_columns(table) if args.all else report(settings, compared, args.by)
    print(*(lines if settings else ["no finished run"]), sep="\n")
    if args.choose:
        print(*report_choice(settings), sep="\n")
    for line in left_out:
        print(f"left out: {line}")
    if args.csv:
        with replacing(Path(args.csv).resolve()) as new, open(new, "w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
    if args.markdown and settings:
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        write_atomically(Path(args.markdown).resolve(), text.encode())
    if args.plot and settings:
        write_atomically(Path(args.plot).resolve(), png_of(plot(settings, args.by), 150))


if __name__ == "__main__":
    run(main)
