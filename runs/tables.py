"""Settings as text: labels and tables."""

from itertools import groupby
from statistics import mean, stdev
from textwrap import wrap

import dataset
from flags import flag_of
from recipe import own_values
from runs.gather import by_seed, epoch_to_compare, folds_of, metrics_of
from runs.results import HELD_OUT
from utils import plural

OF_LOSS = ("mrg", "alpha", "proxy_lr_factor")  # flags whose default depends on the loss
IN_METHOD = {"dataset", "loss", "disent", "al", "be", "gam", *OF_LOSS}  # what `method_of` shows
PAPERS = {"model": "bn_inception", "embedding_size": 512, "batch_size": 180, "image_size": 224}
ORDER = {"start": 1, "chosen": 2, "best": 3, "last": 4, "difference": 5}  # of columns
PAPERS_METHOD = {"loss": "Proxy_Anchor", "disent": True}


def method_of(flags):
    """`Proxy_Anchor --mrg 0.2, DDML 1 0.1 1e-05`: the loss, and DDML's al, be and gam."""
    own = own_values(flags["loss"])
    parts = [flags["loss"], *(f"{flag_of(name)} {flags[name]}" for name in OF_LOSS
                              if flags.get(name) != own[name])]  # fmt: skip
    weights = f", DDML {flags['al']:g} {flags['be']:g} {flags['gam']:g}"
    return " ".join(parts) + weights * flags["disent"]


def differing(settings):
    """The flags that differ among the settings."""
    names = {name for setting in settings for name in setting.flags}
    return [name for name in sorted(names)
            if len({str(setting.flags.get(name)) for setting in settings}) > 1]  # fmt: skip


def labels_of(settings):
    """A label for each setting: its method, and the other flags that differ."""
    names = [name for name in differing(settings) if name not in IN_METHOD]
    return [", ".join([method_of(setting.flags),
                       *(f"{flag_of(name)} {setting.flags.get(name)}" for name in names)])
            for setting in settings]  # fmt: skip


def grouped_by_images(settings):
    """[(data set, settings)]: a group has one data set, the same images and held-out share."""

    def key(setting):
        flags = setting.flags
        return dataset.title(flags["dataset"]), str(setting.images), str(flags.get("val_classes"))

    return [(title, list(group)) for (title, *_), group in groupby(sorted(settings, key=key), key)]


def with_spread(values, digits=2):
    """`mean ± standard deviation` of {seed: per cent}; "" if there are none."""
    spread = f" ± {stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values.values()):.{digits}f}{spread}" if values else ""


def seeds_of(setting):
    """The number of seeds, `3`, or with --val-classes of seeds and folds, `3x4`."""
    folds = f"x{len(folds_of(setting))}" if setting.flags.get("val_classes") else ""
    return f"{len(setting.rows)}{folds}"


def is_like_the_papers(setting):
    """Whether the setting has the paper's network, sizes and images."""
    module, flags = dataset.module_of(setting.flags["dataset"]), setting.flags
    published = getattr(module, "PUBLISHED", {})
    counts = {split: (each["images"], each["classes"]) for split, each in setting.images.items()}
    same = flags.items() >= PAPERS.items() and not flags.get("val_classes")
    return same and hasattr(module, "PAPER") and published == counts


def papers(group):
    """The paper's {metric: per cent} if one of the settings is like the paper's, else {}."""
    alike = any(map(is_like_the_papers, group))
    return dataset.module_of(group[0].flags["dataset"]).PAPER if alike else {}


def full_table(settings, compared, by):
    """[[text]] of every column, with a header; a data set ends with the paper's row. compared: {id
    of a setting: Difference or reason}."""
    names = [name for name in differing(settings) if name not in ("dataset", "loss", "epochs")]
    rows = []
    for title, group in grouped_by_images(settings):
        paper = papers(group)
        for setting in group:
            flags, metric = setting.flags, setting.metric
            row = {"data set": title, "loss": flags["loss"]}
            row |= {flag_of(name): str(flags.get(name, "")) for name in names}
            row |= {split: counts_of(setting, split) for split in ("train", "test")}
            row |= {"epochs": str(flags["epochs"]), "seeds": seeds_of(setting)}
            row |= {"notes": "; ".join(notes_on(setting))}
            for which in ("start", "chosen", "best", "last"):
                row |= {f"{which} {name}": with_spread(by_seed(setting, which, name))
                        for name in metrics_of(setting, which)}  # fmt: skip
            if is_like_the_papers(setting) and flags.items() >= PAPERS_METHOD.items():
                best = mean(by_seed(setting, "best", metric).values())
                row[f"difference of best {metric} to the paper's"] = f"{best - paper[metric]:+.2f}"
            if told := compared.get(id(setting)):
                which = epoch_to_compare(setting, by)
                row[f"difference of {which} {metric} to the baseline's"] = str(told)
            rows.append(row)
        if paper:
            quoted = {f"best {name}": f"{value:.1f}" for name, value in paper.items()}
            rows.append({"data set": title, "loss": "the paper's: Proxy_Anchor, DDML"} | quoted)
    return as_lists(rows, lambda column: ORDER.get(column.split()[0], 0))


def as_lists(rows, order=lambda column: 0):
    """[{column: text}] -> [[text]] with a header, without empty columns."""
    columns = dict.fromkeys(name for row in rows for name, text in row.items() if text)
    columns = sorted(columns, key=order)
    return [columns, *[[row.get(column, "") for column in columns] for row in rows]]


def short_table(group, by):
    """[[text]] of the main columns, with a header."""
    rows = []
    for label, setting in zip(labels_of(group), group):
        which = epoch_to_compare(setting, by)
        row = {"setting": label, "seeds": seeds_of(setting), "epoch": which}
        for name in (setting.metric, "MAP@R", f"{HELD_OUT}MAP@R"):
            start = by_seed(setting, "start", name) if name != "MAP@R" else {}
            row[f"start {name}"] = f"{mean(start.values()):.2f}" if start else ""
            row[name] = with_spread(by_seed(setting, which, name))
        rows.append(row)
    metric = group[0].metric
    if metric in papers(group):
        rows.append({"setting": "the paper's: Proxy_Anchor, DDML", "epoch": "best",
                     metric: f"{papers(group)[metric]:.1f}"})  # fmt: skip
    return as_lists(rows)


def in_columns(table, width=None):
    """The table as aligned lines; the first column is wrapped so that they fit into `width`."""
    widths = [max(map(len, column)) for column in zip(*table)]
    if width:
        widths[0] = min(widths[0], max(20, width - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for first, *rest in table:
        head, *more = wrap(first, widths[0], break_on_hyphens=False)
        lines.append("  ".join(map(str.ljust, [head, *rest], widths)).rstrip())
        lines += [f"  {line}" for line in more]
    return lines


def counts_of(setting, split):
    counts = setting.images[split]
    return f"{counts['images']:,} images of {plural(counts['classes'], 'class')}"


def images_of(setting):
    """The numbers of training and test images, in words."""
    share = setting.flags.get("val_classes")
    held_out = f", {share:g} of them held out" if share else ""
    train, test = (counts_of(setting, split) for split in ("train", "test"))
    return f"trained on {train}{held_out}, tested on {test}"


def commit_of(process):
    return process["commit"][:7] + " with changes" * process["uncommitted_changes"]


def notes_on(setting):
    """Lines such as `mixes 2 devices (A, B)` about a row's code and machines, and lines about its
    test images that were trained on."""
    facts = {"commits": [], "devices": [], "numbers of processes": [], "versions of torch": []}
    for each in setting.processes:
        values = commit_of(each), each["device"], each["processes"], each["versions"]["torch"]
        for known, value in zip(facts.values(), values):
            if str(value) not in known:
                known.append(str(value))
    mixed = [f"mixes {len(values)} {what} ({', '.join(values)})"
             for what, values in facts.items() if len(values) > 1]  # fmt: skip
    return mixed + sorted(setting.seen)
