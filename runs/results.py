"""The numbers of a run: summed over an epoch, written as its result, summarised at the end."""

import math
import time

import torch

from utils import UserError

HELD_OUT = "val/"  # prefix of the metrics of held-out classes (--val-classes)
TERMS = ("metric", "agnostic", "specific", "split")
AT_THE_HEADS = ("std", "std_specific", *(f"share_{term}" for term in TERMS))  # of the last step


class Epoch:
    """The progress of an epoch. Losses stay on the device until `fetch` reads them."""

    def __init__(self, number, files, step=0, totals=None, seconds=None):
        """`files(number, step)`: the files of a batch; `seconds`: {"data": ..., "step": ...}."""
        self.number, self.files, self.step, self.totals = number, files, step, totals or {}
        self.seconds = seconds or {"data": 0.0, "step": 0.0}
        self.saved = step  # steps in the last checkpoint
        self.pending, self.clock = [], time.perf_counter()
        self.fetched = self.clock
        self.asked = None  # in runs.safety.of_all_ranks

    def add(self, values):
        """Count a step; values: {term: scalar}, copied because CUDA graphs overwrite them."""
        self.pending.append((list(values), torch.stack(list(values.values()))))
        self.step += 1

    def tick(self, what=None):
        """Add the time since the last tick to `what`."""
        now = time.perf_counter()
        if what:
            self.seconds[what] = self.seconds.get(what, 0.0) + now - self.clock
        self.clock = now

    def fetch(self):
        """Add the pending losses to the totals. Every save fetches first, so a step that is not
        finite is never saved."""
        rows, self.pending, self.fetched = self.pending, [], time.perf_counter()
        numbers = iter(torch.cat([row for _, row in rows]).double().tolist() if rows else [])
        for step, (names, _) in enumerate(rows, self.step - len(rows)):
            for name in names:
                value = next(numbers)
                self.require_finite(step, name, value)
                self.totals[name] = self.totals.get(name, 0.0) + value

    def require_finite(self, step, name, value):
        if not math.isfinite(value):
            raise UserError(
                f"epoch {self.number}, step {step}: the {name} is not finite; this step was not "
                "saved, and earlier saves are good. A smaller --lr may help. Files of the "
                f"batch: {', '.join(self.files(self.number, step))}"
            )

    def note(self):
        """The mean loss of the fetched steps."""
        done = self.step - len(self.pending)
        return f"loss {self.totals['loss'] / done:.4f}" if done else ""

    def so_far(self):
        """The state of an unfinished epoch, for a checkpoint."""
        return {"step": self.step, "totals": self.totals, "seconds": self.seconds}


def result_of(training, steps, retrieved):
    """The epoch's line of metrics.jsonl; retrieved: from retrieval.evaluate, or None."""
    epoch, seconds = training.epoch, training.epoch.seconds
    images = epoch.step * training.args.batch_size
    terms = {name: epoch.totals[name] / steps if name in epoch.totals else None
             for name in ("loss", *TERMS)}  # fmt: skip
    return {
        "epoch": epoch.number,
        **terms,
        **{name: epoch.totals[name] for name in AT_THE_HEADS if name in epoch.totals},
        "lr": training.scheduler.get_last_lr()[0],
        "seconds": sum(seconds.values()),
        **{f"seconds_{what}": spent for what, spent in seconds.items()},
        "images_per_second": images / (seconds["data"] + seconds["step"]),
        **(with_prefix(retrieved.scores, training.args) if retrieved else {}),
    }


def with_prefix(scores, args):
    """{metric: per cent}; the names of metrics of held-out classes get their prefix."""
    return {f"{HELD_OUT if args.val_classes else ''}{name}": scores[name] for name in scores}


def main_metric(result):
    """The metric that chooses the best epoch: MAP@R of held-out classes, else Recall@K of the
    smallest K; None if nothing was evaluated."""
    scores = scores_of(result)
    return f"{HELD_OUT}MAP@R" if f"{HELD_OUT}MAP@R" in scores else next(iter(scores), None)


def best_of(history, metric):
    """The first epoch with the highest `metric`; the last epoch if that is None."""
    return max(history, key=lambda result: result[metric or "epoch"])


def is_finished(history, args):
    """Whether training has ended: all epochs are done, or --patience has run out."""
    if not history or len(history) >= args.epochs or not args.patience:
        return len(history) >= args.epochs
    best = best_of(history, main_metric(history[-1]))
    return history[-1]["epoch"] - best["epoch"] >= args.patience


def scores_of(result):
    """The retrieval metrics of an epoch's result, Recall@K of the smallest K first."""
    kinds = ("R@", "MAP@R", "R-Precision")
    return {key: result[key] for key in result if key.removeprefix(HELD_OUT).startswith(kinds)}


def results_of(history, start=None, tested=None, **facts):
    """The content of results.json. start: {metric: per cent} before training; tested: {"chosen",
    "last": {metric: per cent}} of the test images, at the end of a run with --val-classes."""
    last, metric = history[-1], main_metric(history[-1])
    rows = {"chosen": best_of(history, metric), "last": last}
    where = "held-out classes" if metric and metric.startswith(HELD_OUT) else "the test images"
    return {
        "chosen_by": metric and f"{metric.removeprefix(HELD_OUT)} of {where}",
        "start": start and {"epoch": None, "metrics": start},
        **{name: {"epoch": result["epoch"],
                  "metrics": {**(tested or {}).get(name, {}), **scores_of(result)}}
           for name, result in rows.items()},
        **facts,
    }  # fmt: skip


def rows_of(results):
    """[(title, epoch or None, {metric: per cent})]: before training, of the chosen epoch, and of
    the last. The title is "best" if the test images have chosen the epoch."""
    held_out = HELD_OUT in "".join(results["last"]["metrics"])
    titles = {"start": "start", "chosen": "chosen" if held_out else "best", "last": "last"}
    return [(title, results[name]["epoch"], results[name]["metrics"])
            for name, title in titles.items() if results[name] and results[name]["metrics"]]


def remarks_on(results):
    """Lines that a reader of these numbers should know."""
    if not results["chosen_by"]:
        return ["Trained on all classes: none is left to test."]
    lines = ["The best epoch is chosen on the test images, the last one is not."]
    if HELD_OUT in "".join(results["last"]["metrics"]):
        lines = [f"The chosen epoch is the best by {results['chosen_by']}; test images had no part "
                 "in that."]  # fmt: skip
    start, last = (results[name] and results[name]["metrics"] for name in ("start", "last"))
    metric = main_metric(last)
    if start and last[metric] < start[metric]:
        lines.append(f"The last epoch is worse than the network before training: {metric} "
                     f"{last[metric]:.2f} after, {start[metric]:.2f} before.")  # fmt: skip
    return lines + remarks_on_images(results.get("images", {}))


def remarks_on_images(images):
    """A line about each split with images or classes that were trained on; images: {split:
    counts}, from runs.start.facts_of."""
    lines = []
    for split, counts in images.items():
        seen = [f"{number:,} of {counts[what]:,} {what}"
                for what, number in counts.get("trained_on", {}).items() if number]  # fmt: skip
        lines += [f"{split}: {', '.join(seen)} were trained on."] if seen else []
    return lines


def summary(results):
    """The published script's result file, with the start and the last epoch added."""
    if not results["chosen_by"]:
        return f"Last Epoch: {results['last']['epoch']}\n{remarks_on(results)[0]}\n"
    lines = []
    for title, epoch, metrics in sorted(rows_of(results)):  # best first, as published
        if epoch is not None:
            lines.append(f"{title.capitalize()} Epoch: {epoch}")
        for key, value in metrics.items():
            lines.append(f"{title.capitalize()} {key.replace('R@', 'Recall@')}: {value:.4f}")
    # differs: the script writes only the best epoch, and not how it was chosen
    return "\n".join(lines + remarks_on(results)) + "\n"
