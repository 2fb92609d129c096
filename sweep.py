"""Many runs of train.py: every combination of flags, random draws, seeds and folds.

It keeps no state: a run's folder says whether it is finished, and its lock whether it is running.
"""

import json
import re
import shlex
import subprocess
import sys
from itertools import combinations, product
from math import inf
from pathlib import Path

import numpy as np

import dataset
import train
from dataset.images import counts_of
from flags import Parser, at_least, flag_of
from runs.checkpoint import FREE_ON_RESUME
from runs.folder import RunFolder
from runs.jobs import Run, command_of, environments, show, state_of, work
from runs.naming import differences, run_folder_path, settings
from runs.start import stored
from utils import Interrupted, Stop, UserError, did_you_mean, plural, run, say

COMPARE = [sys.executable, str(Path(__file__).resolve().with_name("compare.py"))]


def build_parser():
    usage = "python sweep.py [flags] -- [flags of train.py]"
    parser = Parser(description=__doc__.split("\n")[0], usage=usage)
    add = parser.add_argument
    add("--grid", nargs="+", action="extend", metavar="FLAG=A,B",
        help="flags of train.py and their values; each combination is a run")  # fmt: skip
    add("--sample", type=at_least(1), metavar="N", help="N random draws from --range")
    add("--range", nargs="+", action="extend", metavar="FLAG=LOW:HIGH[:log]",
        help="ranges to draw from: uniformly, or with :log in the logarithm")  # fmt: skip
    add("--sample-seed", default=0, type=at_least(0),
        help="seed of the draws; a larger --sample starts with the same draws")  # fmt: skip
    add("--seeds", type=seeds, metavar="1-5", help="run each with these seeds: 1-5, or 1,3,7")
    add("--folds", type=at_least(2), metavar="N",
        help="run each with --fold 0 to N-1; --val-classes is then 1/N by default")  # fmt: skip
    add("--jobs", type=at_least(1), help="runs at a time; by default one a GPU, or one on a CPU")
    add("--shard", default="1/1", type=shard, metavar="I/N",
        help="take every N-th run, starting with the I-th: for job arrays")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands of unfinished runs, run none")
    return parser


def seeds(text):
    """argparse type: `1-5`, `1,3,7` or both."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        some = range(int(first), int(last if dash else first) + 1)
        if not some:
            raise ValueError(text)
        found += some
    return found


def shard(text):
    """argparse type: `I/N`, as (I, N)."""
    index, count = map(int, text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(text)
    return index, count


shard.__name__ = "shard (1/N to N/N)"


def texts_of(texts, where, parser):
    """{name: TEXT} of the FLAG=TEXT given to --grid or --range (`where`)."""
    found, known = {}, parser._option_string_actions
    for text in texts or ():
        typed, _, values = text.partition("=")
        flag = flag_of(typed.replace("-", "_"))
        if flag not in known:
            near = did_you_mean(flag, known)
            raise UserError(f"{where} {text}: train.py has no flag {flag}{near}")
        if not all(values.split(",")):
            raise UserError(f"{where} {text}: a value is empty")
        name = known[flag].dest
        if name in found:
            raise UserError(f"{where} {text}: {flag} is given twice; put its values in one list")
        if name in FREE_ON_RESUME | {"remark"}:
            raise UserError(f"{where} {text}: {flag} does not make another run; give it after --")
        found[name] = values
    return found


def require_one_source(sources):
    """UserError if a flag is in two of {where: names}."""
    for (one, names), (other, others) in combinations(sources.items(), 2):
        for name in names & others:
            raise UserError(f"{flag_of(name)}: given {one} and {other}; leave one of them out")


def draw(name, text, parser, *key):
    """A value of the range LOW:HIGH[:log], to 3 digits, as text. Depends on name and key only."""
    where, parts = f"--range {name}={text}", re.fullmatch("([^:]+):([^:]+)(:log)?", text)
    try:
        low, high = float(parts[1]), float(parts[2])
    except (TypeError, ValueError):
        raise UserError(f"{where}: LOW:HIGH or LOW:HIGH:log, as in al=0.1:10:log") from None
    if not -inf < low < high < inf:
        raise UserError(f"{where}: LOW has to be below HIGH, and both finite")
    if parts[3] and low <= 0:
        raise UserError(f"{where}: with :log both ends have to be above 0")
    u = np.random.default_rng([*key, *name.encode()]).random()
    value = low * (high / low) ** u if parts[3] else low + (high - low) * u
    for end in (parts[1], parts[2]):  # train.py's own error names an end that it refuses
        parser.parse_args([f"{flag_of(name)}={end}"])
    try:
        parser.parse_args([f"{flag_of(name)}={value:.3g}"])
        return f"{value:.3g}"
    except UserError:  # the flag takes whole numbers
        return str(round(value))


def values_of_runs(args, parser, rest):
    """[{flag: text}]: grid x draws x seeds x folds; rest: the flags after --."""
    _, given = train.parse_flags(parser, rest)
    grid, ranges = texts_of(args.grid, "--grid", parser), texts_of(args.range, "--range", parser)
    if bool(ranges) != bool(args.sample):
        raise UserError("--sample N and --range: each needs the other")
    own_share = args.folds and "val_classes" not in given
    shared = {"val_classes": str(1 / args.folds)} if own_share else {}
    require_one_source({
        "in --grid": grid.keys(), "in --range": ranges.keys(), "after --": given.keys(),
        "by --seeds": {"seed"} if args.seeds else set(),
        "by --folds": {"fold", *shared} if args.folds else set(),
    })  # fmt: skip
    check_given(given, args.folds)
    draws = [
        {name: draw(name, text, parser, args.sample_seed, i) for name, text in ranges.items()}
        for i in range(args.sample or 1)
    ]
    axes = [
        *([{name: text} for text in texts.split(",")] for name, texts in grid.items()),
        draws,
        [{"seed": str(seed)} for seed in args.seeds or ()] or [{}],
        [{"fold": str(i), **shared} for i in range(args.folds or 0)] or [{}],
    ]
    return [dict(pair for part in parts for pair in part.items()) for parts in product(*axes)]


def check_given(given, folds):
    """UserError if a flag after -- cannot be used in a sweep."""
    for name in given.keys() & {"resume", "overwrite"}:
        raise UserError(f"{flag_of(name)}: a sweep continues what is not finished; leave it out")
    if given.get("gpu_id", 0) > 0:
        raise UserError(f"--gpu-id {given['gpu_id']}: each run gets a GPU of its own; leave it out,"
                        " and choose with CUDA_VISIBLE_DEVICES")  # fmt: skip
    if folds and "val_classes" in given and folds > (there := int(1 / given["val_classes"] + 1e-9)):
        raise UserError(f"--folds {folds}: --val-classes {given['val_classes']} makes {there}")


def runs_of(values_of_runs, parser, rest):
    """[Run], one a folder. Flags without effect, such as --gam without DDML, are left out."""
    found = {}
    for values in values_of_runs:
        flags = {name: f"{flag_of(name)}={text}" for name, text in values.items()}
        args, _ = train.parse_flags(parser, [*rest, *flags.values()])
        effective, _ = settings(args, parser)
        flags = [flags[name] for name in flags if effective[name] == getattr(args, name)]
        one = Run(run_folder_path(args, parser), [*rest, *flags], args)
        other, its = found.setdefault(one.folder, (one, effective))
        if its != effective:  # --weights of two files with one name
            raise UserError(f"{' '.join(one.flags)}: its run folder is that of "
                            f"{' '.join(other.flags)}; give each its own --remark, after --")
    return [one for one, _ in found.values()]


def refuse_other_runs(runs):
    """UserError if a run's folder holds a run of other flags or, if finished, of other images."""
    parser, known = train.build_parser(), {}
    for each in runs:
        args, path = each.args, RunFolder(each.folder, "").summary
        other = differences(args, parser, stored(each.folder).get("flags", {}))
        if not other and path.exists() and not args.skip_unreadable:
            there = json.loads(path.read_text())["images"]
            there["train"] = there.get("train + val", there["train"])
            data = args.dataset, args.data_root, args.train_on, args.background
            if data not in known:
                known[data] = images_here(*data)
            if any(there[split]["digest"] != known[data][split]["digest"] for split in known[data]):
                other = [f"other images than those in --data-root {args.data_root}"]
        if other:
            raise UserError(f"{each.folder}: holds a run of {', '.join(other)}; give this sweep a "
                            "--LOG_DIR or --remark of its own, after --")  # fmt: skip


def images_here(name, root, train_on, background):
    """{split: counts and digest} of the images that a run would train and test on."""
    splits = dataset.read(name, root)
    images = {"train": dataset.image_set(name, splits, train_on, background=background)}
    if train_on == "train":
        images["test"] = dataset.image_set(name, splits, "test", background=background)
    return counts_of(images)


def complete(runs, places, head):
    """Run what is missing. places: an environment for each concurrent run. Returns a line for each
    failed run."""
    refuse_other_runs(runs)
    missing = [each for each in runs if state_of(each) != "done"]
    if not missing:
        return []
    say(f"{head}: {len(missing)} to run, {len(places)} at a time")
    for each in missing:
        each.folder.mkdir(parents=True, exist_ok=True)
    with Stop() as stop:
        failed = show(work(missing, places, stop), len(missing))
    if stop.signal:
        done = sum(state_of(each) == "done" for each in runs)
        raise Interrupted(stop.signal, f"{done} of {plural(len(runs), 'run')} are finished; the "
                          "same command goes on")  # fmt: skip
    return failed


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    args, rest, parser = build_parser().parse_args(argv[:at]), argv[at + 1 :], train.build_parser()
    values = values_of_runs(args, parser, rest)
    runs, (index, shards) = runs_of(values, parser, rest), args.shard
    head = f"{plural(len(values), 'combination')}, {plural(len(runs), 'run')}"
    if shards > 1:
        runs = runs[index - 1 :: shards]
        head += f", {len(runs)} in shard {index}/{shards}"
    if args.dry_run:
        for each in runs:
            if (state := state_of(each)) in ("new", "begun"):
                print(shlex.join(command_of(each, state)))
        return 0
    failed = complete(runs, environments(args.jobs), head)
    status = subprocess.run([*COMPARE, *(each.folder for each in runs)]).returncode if runs else 0
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else status


if __name__ == "__main__":
    run(main)
