"""Before the first step: what the network retrieves. After some: how long the run will take."""

import time

import torch
from tqdm import tqdm

from recipe import prepare_epoch
from runs.report import say_start
from runs.results import with_prefix
from utils import plural, say, shows

SECONDS = 5  # of steps to measure, if the epoch has as many
SMALL = "timm/mobilenetv3_large_100"


def evaluate_start(training, evaluate_unseen):
    """Evaluate a new run's network before its first step, into training.start. Returns an
    evaluation's seconds: 0 if there will be none, None if it is not known."""
    args, begun = training.args, time.perf_counter()
    if not evaluate_unseen:
        return 0
    if training.start or training.history or training.epoch.step:
        return None
    prepare_epoch(training.model, 0, args.warm, args.bn_freeze)  # else --compile compiles twice
    training.start = with_prefix(evaluate_unseen().scores, args)
    say_start(training.start)
    return None if args.compile else time.perf_counter() - begun  # torch compiled, too


class Forecast:
    """Says once how long a run takes. steps: of an epoch; seconds_eval: from evaluate_start."""

    def __init__(self, steps, seconds_eval):
        self.steps, self.seconds_eval = steps, seconds_eval
        self.number, self.first, self.said = None, None, False

    def look(self, training, images):
        """Call this after each step is timed; images: the step's input."""
        args, epoch = training.args, training.epoch
        if self.said or not shows():
            return
        total, is_last = sum(epoch.seconds.values()), epoch.step == self.steps
        if self.number != epoch.number:  # an epoch's first step is slower
            self.number, self.first = epoch.number, (epoch.step, total)
        done, seconds = epoch.step - self.first[0], total - self.first[1]
        if self.steps == 1:
            done, seconds = 1, total
        if not done or seconds < SECONDS and not is_last:
            return
        on_gpu, warms_up = training.device.type == "cuda", epoch.number < args.warm < args.epochs
        if on_gpu and epoch.pending or warms_up and (on_gpu or args.compile):
            return  # steps that a GPU may not have made yet; the first full epoch will tell
        pace = full_pace = seconds / done
        if warms_up:
            full_pace += seconds_of_backward(training, images)
        with tqdm.external_write_mode():  # the epoch's bar is on the line
            self.report(training, pace, full_pace)
        self.said = True
        epoch.tick()  # so that this is not counted as part of a step

    def report(self, training, pace, full_pace):
        """pace, full_pace: seconds a step, now and after warm-up."""
        args, history, evaluation = training.args, training.history, self.seconds_eval
        if history and evaluation != 0:
            evaluation = history[-1]["seconds_eval"]
        epochs = args.epochs - len(history)
        warm = max(0, min(args.warm, args.epochs) - len(history))
        steps = self.steps * (warm * pace + (epochs - warm) * full_pace)
        seconds = steps + epochs * (evaluation or 0)
        each = f"{full_pace:.3g} s a step{' after warm-up' if full_pace > pace else ''}"
        if evaluation is None:
            each += "; evaluations are not counted"
        elif evaluation:
            each += f", {evaluation:.3g} s an evaluation"
        say(f"about {in_words(seconds)} for {plural(epochs, 'epoch')}: {each}")
        if seconds >= 3600 and training.device.type == "cpu" and not args.resume:
            faster = [f"--model {SMALL}"] * (args.model != SMALL)
            faster += [f"--image-size below {args.image_size}"]
            faster += ["--cache ram"] * (args.cache == "none")
            say(f"  faster on a CPU: {', '.join(faster)} (docs/speed.md)")


def seconds_of_backward(training, images):
    """Seconds that the backward pass of the whole network takes, which warm-up does not make. In
    eval mode it draws no random number and moves no statistic; gradients are not kept."""
    args, model = training.args, training.model
    model.eval().requires_grad_(True)
    output = model(images)
    heads = output if model.disent else [output]
    begun = time.perf_counter()
    parameters = [*model.parameters()]
    torch.autograd.grad(sum(head.sum() for head in heads), parameters, allow_unused=True)
    seconds = time.perf_counter() - begun
    prepare_epoch(model, training.epoch.number, args.warm, args.bn_freeze)
    return seconds


def in_words(seconds):
    """`40 s`, `12 min` or `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
