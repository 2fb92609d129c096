"""docs/evidence.md's tables and picture, from its CSV: python -m benchmarks.evidence_tables

In tables ↑ and ↓ mark what differs from the baseline: the 95 % t-interval of the differences,
paired by seed, leaves out 0.
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from retrieval.picture import png_of
from runs.gather import paired
from runs.tables import with_spread
from storage import write_atomically
from utils import UserError, run

DOCS = Path(__file__).parent.parent / "docs"
STARTS = ("random", "pretrained")
METRICS, BASELINE = ("R@1", "MAP@R"), "Proxy-Anchor"
MEASURES = {  # column of the table: (column of the CSV, digits)
    "effective rank": ("retrieval unseen effective rank", 1),
    "rho@2": ("retrieval unseen rho@2", 3),
    "density": ("retrieval unseen density", 3),
    "alignment": ("retrieval unseen alignment", 3),
    "uniformity": ("retrieval unseen uniformity", 2),
    "gap of R@1": ("gap", 1),
    "class probe": ("retrieval unseen probe class", 1),
    "typeface probe": ("retrieval unseen probe typeface", 1),
    "entropy": ("retrieval unseen entropy", 2),
    "slope": ("retrieval unseen slope", 2),
}
HEADS = ("std", "std_specific", "share_metric", "share_agnostic", "share_specific", "share_split")


def read(path):
    """{(suite, start): {setting: {seed: {column: number or text}}}}, settings in their order."""
    found = defaultdict(lambda: defaultdict(dict))
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: as_number(text) for name, text in row.items() if text}
            if "retrieval unseen R@1" in numbers:
                numbers["gap"] = (numbers["retrieval training R@1"]
                                  - numbers["retrieval unseen R@1"])  # fmt: skip
            found[row["suite"], row["start"]][row["setting"]][int(row["seed"])] = numbers
    return found


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def column(runs, name):
    """{seed: number} of the runs of a setting; {} unless all have it."""
    return {seed: row[name] for seed, row in runs.items()} if all(
        name in row for row in runs.values()) else {}  # fmt: skip


def against(runs, baseline, name):
    """`+1.20 ± 0.80 ↑`: the difference to the baseline's runs of the same seeds."""
    told = paired(column(runs, name), column(baseline, name))
    return f"{told.mean:+.2f} ± {told.half_width:.2f}{mark(told)}" if told else ""


def mark(told):
    return {"higher": " ↑", "lower": " ↓"}.get(told.verdict, "") if told else ""


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def ablation(settings):
    """Three tables of the ablation with one start: recalls, measures, what acts at the heads."""
    baseline = settings[BASELINE]
    recalls = [
        [name, len(runs), *(with_spread(column(runs, f"last {metric}")) for metric in METRICS),
         *("" if name == BASELINE else against(runs, baseline, f"last {metric}")
           for metric in METRICS)]
        for name, runs in settings.items()
    ]  # fmt: skip
    measures = []
    for name, runs in settings.items():
        cells = []
        for key, digits in MEASURES.values():
            values = column(runs, key)
            told = paired(values, column(baseline, key)) if name != BASELINE else None
            cells.append(f"{mean(values.values()):.{digits}f}{mark(told)}" if values else "")
        measures.append([name, *cells])
    heads = [[name, *(f"{mean(values.values()):.2g}" if (values := column(runs, key)) else ""
                      for key in HEADS)]
             for name, runs in settings.items() if column(runs, "std")]  # fmt: skip
    return [
        markdown(["setting", "seeds", "R@1", "MAP@R", "R@1 - Proxy-Anchor's",
                  "MAP@R - Proxy-Anchor's"], recalls),
        markdown(["unseen classes", *MEASURES], measures),
        markdown(["at the heads", *HEADS], heads),
    ]  # fmt: skip


def losses(settings):
    """Each loss alone and with DDML."""
    rows = []
    for name, runs in settings.items():
        if both := settings.get(f"{name} + DDML"):
            values = (column(each, f"last {metric}") for metric in METRICS for each in (runs, both))
            rows.append([name, min(len(runs), len(both)), *map(with_spread, values),
                         *(against(both, runs, f"last {metric}") for metric in METRICS)])
    return [markdown(["loss", "seeds", "R@1", "R@1 with DDML", "MAP@R", "MAP@R with DDML",
                      "R@1: DDML - alone", "MAP@R: DDML - alone"], rows)]  # fmt: skip


def weights(settings):
    """What held-out classes have chosen of DDML's weights, and of the plain loss's settings."""
    rows, chosen = [], {}
    for method in ("plain", "all"):
        trials = {name: runs for name, runs in settings.items() if name.startswith(method)}
        best = max(trials, key=lambda name: trials[name][1]["chosen val/MAP@R"])
        chosen[method] = {seed: row for seed, row in trials[best].items() if seed > 1}
        rows.append([best, len(trials), f"{trials[best][1]['chosen val/MAP@R']:.2f}",
                     len(chosen[method]),
                     *(with_spread(column(chosen[method], f"chosen {metric}"))
                       for metric in METRICS)])  # fmt: skip
    rows[1] += [against(chosen["all"], chosen["plain"], f"chosen {metric}") for metric in METRICS]
    rows[0] += ["", ""]
    tried = [[name, f"{runs[1]['chosen val/MAP@R']:.2f}", f"{runs[1]['chosen MAP@R']:.2f}"]
             for name, runs in settings.items()]  # fmt: skip
    return [
        markdown(["chosen", "of trials", "its validation MAP@R", "other seeds", "R@1", "MAP@R",
                  "R@1 - plain's", "MAP@R - plain's"], rows),
        markdown(["trial (seed 1)", "validation MAP@R", "test MAP@R"], tried),
    ]  # fmt: skip


# short: the ablation with 200 + 200 characters and a third to a half of the steps
TABLES = {"ablation": ablation, "short": ablation, "losses": losses, "weights": weights}


def draw(table, path):
    """The ablation, a row for each start: the learning curves of Proxy-Anchor and of all terms, and
    each setting's differences to Proxy-Anchor with 95 % intervals, hollow for a single seed."""
    from matplotlib.figure import Figure

    shown = {"R@1 of unseen classes (%)": "last R@1",
             "effective rank of unseen classes": "retrieval unseen effective rank"}  # fmt: skip
    starts = [start for start in STARTS if ("ablation", start) in table]
    figure = Figure(figsize=(14, 0.5 + 3 * len(starts)), layout="constrained")
    panels = figure.subplots(len(starts), 3, squeeze=False)
    for start, (curves, *places) in zip(starts, panels):
        settings = table["ablation", start]
        draw_curves(curves, settings)
        curves.set(title=f"{start} weights: learning curves, a line for each seed")
        for axes, (title, key) in zip(places, shown.items()):
            draw_differences(axes, settings, key)
            axes.set(title=title)
    write_atomically(path, png_of(figure, 110))


def draw_curves(axes, settings):
    for name, colour in ((BASELINE, "C0"), ("all", "C1")):
        for number, row in enumerate(settings.get(name, {}).values()):
            recalls = [float(text) for text in row["curve R@1"].split()]
            label = {} if number else {"label": name}
            axes.plot(range(1, len(recalls) + 1), recalls, color=colour, linewidth=1, **label)
    axes.set(xlabel="epoch", ylabel="R@1 of unseen classes (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_differences(axes, settings, key):
    names, base = [name for name in settings if name != BASELINE], column(settings[BASELINE], key)
    for y, name in enumerate(names):
        ours = column(settings[name], key)
        if told := paired(ours, base):
            colour = {"higher": "C2", "lower": "C3"}.get(told.verdict, "0.5")
            axes.errorbar(told.mean, y, xerr=told.half_width, fmt="o", color=colour, capsize=3)
        else:  # one seed so far: no interval
            differences = [ours[seed] - base[seed] for seed in ours.keys() & base.keys()]
            axes.plot(differences, [y] * len(differences), "o", color="0.5", fillstyle="none")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"difference to Proxy-Anchor's {mean(base.values()):.1f}",
             ylim=(len(names) - 0.5, -0.5))  # fmt: skip
    axes.grid(axis="x", alpha=0.3)


def write(docs=DOCS):
    """Write evidence.md's tables, each between `<!-- suite start -->` and `<!-- end -->`."""
    table = read(docs / "evidence.csv")
    page = docs / "evidence.md"
    text = page.read_text()
    for (suite, start), settings in table.items():
        made = "\n".join(TABLES[suite.removesuffix("-long")](settings))
        head, found, rest = text.partition(f"<!-- {suite} {start} -->\n")
        if not found:
            raise UserError(f"{page}: has no line <!-- {suite} {start} -->, below which to write")
        text = head + found + made + rest[rest.index("<!-- end -->") :]
    write_atomically(page, text.encode())
    if any(suite == "ablation" for suite, _ in table):
        draw(table, docs / "evidence.png")


if __name__ == "__main__":
    run(write, "benchmarks.evidence_tables")
