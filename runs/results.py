"""The numbers of a run: summed over an epoch, kept as its result, summarised at the end."""

import math
import time

import torch

from utils import UserError

TERMS = ("metric", "agnostic", "specific", "split")


class Epoch:
    """How far an epoch has come. Losses stay on the device until `fetch` reads them."""

    def __init__(self, number, files, step=0, totals=None, seconds=None):
        """`files(number, step)`: the files of a batch; `seconds`: {"data": ..., "step": ...}."""
        self.number, self.files, self.step, self.totals = number, files, step, totals or {}
        self.seconds = seconds or {"data": 0.0, "step": 0.0}
        self.saved = step  # steps in the last checkpoint
        self.pending, self.clock = [], time.perf_counter()
        self.fetched = self.clock

    def add(self, values):
        """Count a step; values: {term: scalar}, copied because CUDA graphs overwrite them."""
        self.names = list(values)
        self.pending.append(torch.stack(list(values.values())))
        self.step += 1

    def tick(self, what=None):
        """Add the time since the last tick to `what`."""
        now = time.perf_counter()
        if what:
            self.seconds[what] = self.seconds.get(what, 0.0) + now - self.clock
        self.clock = now

    def fetch(self):
        """Add the pending losses to the totals. Every save fetches first, so that nothing is saved
        of a step that is not finite."""
        rows, self.pending, self.fetched = self.pending, [], time.perf_counter()
        first, rows = self.step - len(rows), torch.stack(rows).double().tolist() if rows else []
        for step, row in enumerate(rows, first):
            for name, value in zip(self.names, row):
                self.require_finite(step, name, value)
                self.totals[name] = self.totals.get(name, 0.0) + value

    def require_finite(self, step, name, value):
        if not math.isfinite(value):
            raise UserError(
                f"epoch {self.number}, step {step}: the {name} is not finite; nothing of it was "
                "saved, what was saved before is good. A smaller --lr may help. Files of the "
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
    """The epoch's line of metrics.jsonl; retrieved: by retrieval.evaluate, None without a test."""
    epoch, seconds = training.epoch, training.epoch.seconds
    images = epoch.step * training.args.batch_size
    terms = {name: epoch.totals[name] / steps if name in epoch.totals else None
             for name in ("loss", *TERMS)}  # fmt: skip
    scores = retrieved.scores if retrieved else {}
    return {
        "epoch": epoch.number,
        **terms,
        "lr": training.scheduler.get_last_lr()[0],
        "seconds": sum(seconds.values()),
        **{f"seconds_{what}": spent for what, spent in seconds.items()},
        "images_per_second": images / (seconds["data"] + seconds["step"]),
        **{name: 100 * fraction for name, fraction in scores.items()},
    }


def main_metric(result):
    """The name of Recall@K of the smallest K, usually R@1; None without a test."""
    return next(iter(scores_of(result)), None)


def best_of(history, metric):
    """The first epoch with the highest `metric`; the last epoch if that is None."""
    return max(history, key=lambda result: result[metric or "epoch"])


def scores_of(result):
    """The retrieval metrics of an epoch's result, Recall@K of the smallest K first."""
    return {key: result[key] for key in result if key.startswith(("R@", "MAP@R", "R-Precision"))}


def summary(history):
    """The published script's result file, with the last epoch beside the best."""
    last, metric = history[-1], main_metric(history[-1])
    if not metric:
        return f"Last Epoch: {last['epoch']}\nTrained on all classes: none is left to test.\n"
    lines = []
    for title, result in (("Best", best_of(history, metric)), ("Last", last)):
        lines.append(f"{title} Epoch: {result['epoch']}")
        for key, value in scores_of(result).items():
            lines.append(f"{title} {key.replace('R@', 'Recall@')}: {value:.4f}")
    # differs: the script writes the best epoch alone, and not how it was chosen
    lines.append("The best epoch is chosen on the test set, the last one is not.")
    return "\n".join(lines) + "\n"
