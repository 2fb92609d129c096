"""The paper's claim, tested on kanji: python -m benchmarks.evidence ablation

Trains every setting of a suite, seed by seed, through sweep.py's queue; measures each finished run
with evaluate.py --diagnose, and keeps it as a row of docs/evidence.csv. A run that has its row is
not trained again, and one that was killed goes on.
"""

import csv
import io
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean

import sweep
import train
from benchmarks import lite0
from dataset import kanji
from flags import Parser, at_least
from runs.jobs import environments, state_of
from runs.results import rows_of
from storage import write_atomically
from utils import UserError, plural, run, say

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs/evidence.csv"
HERE = {  # sized for two CPU cores
    "characters": 400, "side": 64,
    "common": "--batch-size 90 --embedding-size 128 --epochs 20 --lr-decay-step 14 "
              "--lr-decay-gamma 0.25",
    "random": "--model resnet18 --image-size 48 --weights none --warm 0 --bn-freeze 0 --lr 6e-4",
    "pretrained": "--model timm/tf_efficientnet_lite0 --image-size 64 --weights LITE0 --warm 1 "
                  "--bn-freeze 1 --lr 3e-4",
    "seconds": {"random": 900, "pretrained": 450},  # a run, on one quiet core
}  # fmt: skip
LONG = {  # for a GPU; never run so far
    "characters": kanji.ALL, "side": 224,
    "common": "--image-size 224 --batch-size 180 --embedding-size 512",
    "random": "--model bn_inception --weights none --warm 0 --bn-freeze 0 --lr 6e-4 --epochs 40 "
              "--lr-decay-step 20 --lr-decay-gamma 0.25",
    "pretrained": "--model bn_inception --weights imagenet --warm 1 --bn-freeze 1 --lr 1e-4 "
                  "--epochs 20 --lr-decay-step 10",
    "seconds": {"random": 2500, "pretrained": 1200},  # a guess
}  # fmt: skip
STARTS = ("random", "pretrained")
WEIGHTS = {"al": "1", "be": "0.1", "gam": "1e-4"}  # al and be as published for CUB, gam for SOP
LOSSES = ("Proxy_Anchor", "Proxy_NCA", "NormSoftmax", "CosFace", "ArcFace", "SoftTriple")
KEY = ("suite", "start", "setting", "seed")  # columns that name a run


def with_terms(*names):
    return " ".join(["--disent True", *(f"--{name} {WEIGHTS[name]}" for name in names)])


def ablation(lr):
    """{setting: flags}: each of DDML's terms alone, all of them, all but one."""
    found = {
        "Proxy-Anchor": "", "second head, weights 0": with_terms(),
        "+ agnostic": with_terms("al"), "+ specific": with_terms("be"),
        "+ split": with_terms("gam"), "all": with_terms(*WEIGHTS),
        "all - agnostic": with_terms("be", "gam"), "all - specific": with_terms("al", "gam"),
        "all - split": with_terms("al", "be"),
    }  # fmt: skip
    free = {f"{name}, l2-norm False": f"{found[name]} --l2-norm False"
            for name in ("Proxy-Anchor", "all")}  # fmt: skip
    return found | free


def losses(lr):
    """{setting: flags}: every proxy loss, alone and with DDML."""
    return {f"{loss}{' + DDML' * ddml}": f"--loss {loss} {with_terms(*WEIGHTS) * ddml}"
            for loss in LOSSES for ddml in (False, True)}  # fmt: skip


def weights(lr):
    """{setting: flags}: DDML's weights over two decades, one at a time, and as many trials for
    the plain loss: its margin and learning rate."""
    tried = {"al": ("0.1", "0.3", "3", "10"), "be": ("0.01", "0.03", "0.3", "1"),
             "gam": ("1e-5", "3e-5", "3e-4", "1e-3")}  # fmt: skip
    found = {"all": with_terms(*WEIGHTS)}
    found |= {f"all, {name} {value}": f"{with_terms(*WEIGHTS)} --{name} {value}"
              for name, values in tried.items() for value in values}  # fmt: skip
    found |= {f"plain, mrg {margin}": f"--mrg {margin}" for margin in (0, 0.05, 0.1, 0.2, 0.3)}
    found |= {f"plain, mrg {margin}, lr x {factor}": f"--mrg {margin} --lr {factor * lr:g}"
              for margin in (0.1, 0.2) for factor in (0.25, 0.5, 2, 4)}  # fmt: skip
    return {name: f"{flags} --val-classes 0.25" for name, flags in found.items()}


SUITES = {"ablation": (ablation, 5), "losses": (losses, 3), "weights": (weights, 1)}
REPEATED = range(2, 5)  # seeds of what `weights` has chosen


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("suite", choices=SUITES, help="ablation: DDML's terms; losses: each proxy loss "
        "with DDML and without; weights: al, be and gam, chosen on held-out classes")  # fmt: skip
    add("--seeds", type=at_least(1), help="how many; by default the suite's")
    add("--only", nargs="+", metavar="SETTING", help="these settings alone, e.g. Proxy-Anchor all")
    add("--starts", nargs="+", choices=STARTS, default=STARTS, help="by default both")
    add("--jobs", type=at_least(1), help="runs at a time; by default one a GPU, or two")
    add("--long", action="store_true", help="224 px, bn_inception, 2,961 characters: for a GPU")
    add("--root", default="evidence", type=Path, metavar="DIR", help="for images and run folders")
    add("--table", default=TABLE, type=Path, metavar="CSV", help="where the rows are kept")
    add("--dry-run", action="store_true", help="say what will be run, and what it costs")
    return parser


def read_table(path):
    """{key: row} of the runs that are measured."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write_table(path, table):
    columns = dict.fromkeys(name for row in table.values() for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.values())
    write_atomically(path.resolve(), text.getvalue().encode())


def settings_of(suite, scale, starts=STARTS):
    """{(start, setting): flags of train.py}"""
    found = {}
    for start in starts:
        shared = f"--dataset kanji --metrics {scale['common']} {scale[start]}"
        lr = train.build_parser().parse_args(shlex.split(shared)).lr
        for setting, flags in SUITES[suite][0](lr).items():
            found[start, setting] = f"{shared} {flags}".strip()
    return found


def wanted(args, settings, table):
    """All runs, ordered by seed: an interrupted suite has about as many seeds of each setting."""
    suite = args.suite + "-long" * args.long
    seeds = range(1, (args.seeds or SUITES[args.suite][1]) + 1)
    keys = [(suite, *each, str(seed)) for seed in seeds for each in settings]
    if args.suite == "weights" and all(key in table for key in keys):
        chosen = chosen_of([table[key] for key in keys])
        keys += [(suite, start, setting, str(seed)) for seed in REPEATED
                 for start, setting in chosen]  # fmt: skip
    return keys


def chosen_of(rows):
    """[(start, setting)] with the best validation MAP@R, of DDML and of the plain loss."""
    groups = {}
    for row in rows:
        groups.setdefault((row["start"], row["setting"].split(",")[0]), []).append(row)
    best = (max(group, key=lambda row: float(row["chosen val/MAP@R"])) for group in groups.values())
    return [(row["start"], row["setting"]) for row in best]


def run_of(key, settings, args):
    """The sweep's Run of a key."""
    _, start, setting, seed = key
    flags = settings[start, setting].replace("LITE0", str(args.root / "lite0.pth"))
    own = f"--seed {seed} --data-root {args.root} --LOG_DIR {args.root / 'logs'}"
    flags = shlex.split(f"{flags} {own} --cache ram --workers 1 --wandb disabled")
    return sweep.runs_of([{}], train.build_parser(), flags)[0]


def prepare(args, scale):
    """Draw the characters, and make the pretrained weights."""
    args.root.mkdir(parents=True, exist_ok=True)
    kanji.prepare(args.root, scale["characters"], scale["side"])
    if "LITE0" in scale["pretrained"] and not (args.root / "lite0.pth").exists():
        lite0.convert(args.root / "lite0.pth")


def measure(settings, root, finished, environment):
    """The row of a finished run, whose checkpoints are then deleted: hundreds fill a disk.
    finished: its key and its Run."""
    key, job = finished
    last = next(job.folder.glob("*_last.pth"))
    found = job.folder / "diagnosis.json"
    command = [sys.executable, ROOT / "evaluate.py", last, "--diagnose", "--json", found,
               "--factors", root / "kanji/factors.csv", "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{last}: {done.stderr.strip()}")
    described, results, history = (
        (job.folder / name).read_text() for name in ("args.json", "results.json", "metrics.jsonl")
    )
    described, results = json.loads(described), json.loads(results)
    history = [json.loads(line) for line in history.splitlines()]
    row = dict(zip(KEY, key)) | {
        "flags": settings[key[1], key[2]], "commit": described["commit"][:7],
        "device": described["device"], "seconds": sum(result["seconds"] for result in history),
    }  # fmt: skip
    for title, _, metrics in rows_of(results):
        row |= {f"{title} {name}": value for name, value in metrics.items()
                if name.removeprefix("val/") in ("R@1", "MAP@R")}  # fmt: skip
    row["curve R@1"] = " ".join(f"{result['R@1']:.2f}" for result in history)  # of each epoch
    row |= {name: value for name, value in history[-1].items() if name.startswith(("std", "share"))}
    diagnosis = json.loads(found.read_text())["diagnosis"]
    for head, sides in diagnosis["heads"].items():
        for side, measures in sides.items():
            row |= {f"{head} {side} {name}": value for name, value in measures.items()
                    if not isinstance(value, list)}  # fmt: skip
    for probe in diagnosis["probes"]:
        row |= {f"{of} {probe['side']} probe {probe['of']}": probe[of]
                for of in ("chance", "pixels", *diagnosis["heads"])}  # fmt: skip
    for file in job.folder.glob("*.pth"):
        file.unlink()
    return {name: f"{value:.5g}" if isinstance(value, float) else value
            for name, value in row.items()}  # fmt: skip


def cost_of(keys, table, scale, jobs):
    """Hours, from the seconds of the suite's measured runs with the same start, else `scale`'s."""
    known = {start: [float(row["seconds"]) for key, row in table.items()
                     if any(key[:2] == (other[0], start) for other in keys)]
             for start in STARTS}  # fmt: skip
    seconds = {start: mean(known[start]) if known[start] else scale["seconds"][start]
               for start in STARTS}  # fmt: skip
    return sum(seconds[key[1]] for key in keys) / jobs / 3600


def run_some(keys, settings, args, places, table):
    """Train and measure the runs of `keys`, a few at a time; their rows go into `table`. Returns
    the lines of those that failed."""
    failed = []
    for first in range(0, len(keys), 2 * len(places)):
        jobs = {key: run_of(key, settings, args) for key in keys[first : first + 2 * len(places)]}
        failed += sweep.complete(list(jobs.values()), places, f"{first} of {len(keys)} are done")
        finished = [(key, job) for key, job in jobs.items() if state_of(job) == "done"]
        with ThreadPoolExecutor(len(places)) as pool:
            rows = pool.map(partial(measure, settings, args.root), finished, cycle(places))
            table |= {key: row for (key, _), row in zip(finished, rows)}
        write_table(args.table, table)
    return failed


def main(argv=None):
    args = build_parser().parse_args(argv)
    table, scale = read_table(args.table), LONG if args.long else HERE
    settings, failed = settings_of(args.suite, scale, args.starts), []
    if args.only:
        settings = {key: flags for key, flags in settings.items() if key[1] in args.only}
    places = environments(args.jobs or (None if args.long else 2))
    keys = [key for key in wanted(args, settings, table) if key not in table]
    hours = cost_of(keys, table, scale, len(places))
    say(f"{args.suite}: {plural(len(keys), 'run')}, {len(places)} at a time, about {hours:.1f} h")
    if args.dry_run:
        return 0
    prepare(args, scale)
    while keys and not failed:  # `weights` has more to do once it has chosen
        failed = run_some(keys, settings, args, places, table)
        keys = [key for key in wanted(args, settings, table) if key not in table]
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    run(main, "benchmarks.evidence")
