"""The numbers of a run: added up over an epoch, kept as its result, summed up at the end."""

import math
import time

import torch

from utils import UserError

TERMS = ("metric", "agnostic", "specific", "split")


class Epoch:
    """How far an epoch has come. Losses stay on the device until `fetch` waits for it; `seconds`
    are those spent waiting for data, and in steps."""

    def __init__(self, number, step=0, totals=None, seconds=None):
        self.number, self.step, self.totals = number, step, totals or {}
        self.seconds = seconds or {"data": 0.0, "step": 0.0}
        self.pending, self.clock = [], time.perf_counter()
        self.fetched = self.clock

    def add(self, values):
        """{term: scalar on the device}, whose memory may be the next step's."""
        self.names = list(values)
        self.pending.append(torch.stack(list(values.values())))
        self.step += 1

    def tick(self, what):
        """Book the time since the last tick."""
        now = time.perf_counter()
        self.seconds[what] += now - self.clock
        self.clock = now

    def fetch(self, files):
        """Add up what is pending; UserError where a value is not finite. Nothing is saved before
        this was called, so what such a step did to the weights never is; `files(epoch, step)` are
        those of a batch."""
        rows, self.pending, self.fetched = self.pending, [], time.perf_counter()
        first, rows = self.step - len(rows), torch.stack(rows).double().tolist() if rows else []
        for step, row in enumerate(rows, first):
            for name, value in zip(self.names, row):
                if not math.isfinite(value):
                    raise UserError(
                        f"epoch {self.number}, step {step}: the {name} is not finite; nothing of "
                        "it was saved, and the last checkpoint is good. A smaller --lr may help. "
                        f"Files of the batch: {', '.join(files(self.number, step))}"
                    )
                self.totals[name] = self.totals.get(name, 0.0) + value

    def note(self):
        """The loss of the steps that were fetched."""
        done = self.step - len(self.pending)
        return f"loss {self.totals['loss'] / done:.4f}" if done else ""

    def so_far(self):
        """What a checkpoint in mid-epoch holds of it."""
        return {"step": self.step, "totals": self.totals, "seconds": self.seconds}


def result_of(training, epoch, steps, scores, seconds_eval):
    """An epoch's line of metrics.jsonl."""
    trained = sum(epoch.seconds.values())
    return {
        "epoch": epoch.number,
        **{name: epoch.totals[name] / steps if name in epoch.totals else None
           for name in ("loss", *TERMS)},
        "lr": training.scheduler.get_last_lr()[0],
        "seconds": trained + seconds_eval,
        **{f"seconds_{what}": seconds for what, seconds in epoch.seconds.items()},
        "seconds_eval": seconds_eval,
        "images_per_second": epoch.step * training.args.batch_size / max(trained, 1e-9),
        **{metric: 100 * fraction for metric, fraction in scores.items()},
    }  # fmt: skip


def best_of(history):
    """The first epoch with the greatest R@1, or R@K of the least K; without a test, the last."""
    k = next(iter(scores_of(history[-1])), "epoch")
    return max(history, key=lambda result: result[k])


def scores_of(result):
    """The retrieval metrics of an epoch's result, Recall@K of the least K first."""
    return {key: result[key] for key in result if key.startswith(("R@", "MAP@R", "R-Precision"))}


def summary(history):
    """The published script's result file, with the last epoch beside the best."""
    if not scores_of(history[-1]):
        return (
            f"Last Epoch: {history[-1]['epoch']}\nTrained on all classes: none is left to test.\n"
        )
    lines = []
    for title, result in (("Best", best_of(history)), ("Last", history[-1])):
        lines.append(f"{title} Epoch: {result['epoch']}")
        for key, value in scores_of(result).items():
            lines.append(f"{title} {key.replace('R@', 'Recall@')}: {value:.4f}")
    # differs: the script gives the best epoch alone, and does not say how it was chosen
    lines.append("The best epoch is chosen on the test set, the last one is not.")
    return "\n".join(lines) + "\n"
