"""The paper's tables, trained here: make paper

Trains the three published commands with DDML and without it, three seeds each, through sweep.py,
and writes the "measured here" rows of docs/reproduction.md and the table of README.md. What is
finished is not trained again.
"""

import re
import shlex
import sys
from pathlib import Path

import dataset
import sweep
import train
from flags import Parser, at_least
from net import create_model
from runs.gather import by_seed, difference, gather
from runs.jobs import environments
from runs.tables import commit_of, images_of, with_spread
from storage import write_atomically
from utils import UserError, run

ROOT = Path(__file__).parent.parent
SHARED = ("--gpu-id 0 --loss Proxy_Anchor --model bn_inception --embedding-size 512 "
          "--batch-size 180 --warm 1 --al 1.0")  # fmt: skip
PUBLISHED = {  # data set: (the page's name of it, what its command adds)
    "cub": ("CUB", "--lr 1e-4 --bn-freeze 1 --lr-decay-step 10 --be 0.1 --gam 0.00001"),
    "cars": ("Cars", "--lr 1e-4 --bn-freeze 1 --lr-decay-step 20 --be 0.1 --gam 0.001"),
    "SOP": ("SOP", "--lr 6e-4 --bn-freeze 0 --lr-decay-step 20 --lr-decay-gamma 0.25 --be 1.0 "
                   "--gam 0.0001"),  # fmt: skip
}  # fmt: skip


def build_parser():
    usage = "python -m benchmarks.paper [flags] -- [further flags of train.py]"
    parser = Parser(description=__doc__.split("\n")[0], usage=usage)
    add = parser.add_argument
    add("--data-root", default="./data", metavar="DIR", help="folder of the data sets")
    add("--seeds", default=3, type=at_least(1), help="how many, from 1")
    add("--docs", default=ROOT, type=Path, metavar="DIR",
        help="where README.md and docs/reproduction.md are, whose rows are written")  # fmt: skip
    add("--dry-run", action="store_true", help="say what is there and what will be run")
    return parser


def training_flags(name, root, further):
    """train.py's flags for a data set, without --disent and --seed."""
    given = f"{SHARED} --dataset {name} {PUBLISHED[name][1]}"
    return [*shlex.split(given), f"--data-root={root}", *further]


def runs_of(flags, seeds):
    """The sweep's runs: with DDML and without, each seed."""
    values = [{"disent": disent, "seed": str(seed)} for disent in ("True", "False")
              for seed in range(1, seeds + 1)]  # fmt: skip
    return sweep.runs_of(values, train.build_parser(), flags)


def what_is_missing(name, flags):
    """[how to get the data or the weights that are not there]"""
    chosen, missing = train.build_parser().parse_args(flags), []
    try:
        for split in ("train", "test"):
            dataset.load(name, chosen.data_root, split)
    except UserError as error:
        missing.append(f"{error}; get it: python -m dataset.download {name} --data-root "
                       f"{chosen.data_root}")  # fmt: skip
    try:
        create_model(chosen.model, chosen.embedding_size, weights=chosen.weights)
    except UserError as error:
        missing.append(f"{error}; with the file: python -m benchmarks.paper -- --weights PATH")
    return missing


def sweep_command(flags, seeds):
    """The command that trains with DDML and without it, each seed."""
    return ["python", "sweep.py", "--grid", "disent=True,False", "--seeds", f"1-{seeds}", "--",
            *flags]  # fmt: skip


def table_rows(settings, metrics):
    """[[text]]: mean ± standard deviation of best and last epoch, and DDML minus the plain loss."""
    rows = []
    plain, ddml = sorted(settings, key=lambda setting: setting.flags["disent"])
    for method, setting in (("DDML", ddml), ("Proxy-Anchor alone", plain)):
        for which in ("best", "last"):
            cells = [with_spread(by_seed(setting, which, metric), 1) for metric in metrics]
            rows.append([f"measured here: {method}, {which} epoch", *cells])
    differences = [difference(ddml, plain, "last", metric) for metric in metrics]
    if all(differences):
        cells = [f"{each.mean:+.1f} ± {each.half_width:.1f}" for each in differences]
        rows.append(["measured here: DDML - alone, last epoch, 95 % interval", *cells])
    return rows


def facts(name, settings):
    """What the rows were measured with, one line."""
    processes = [each for setting in settings for each in setting.processes]
    seeds = sorted({seed for setting in settings for seed in setting.rows})
    commits, devices = map(commit_of, processes), (each["device"] for each in processes)
    line = (f"Measured here: seeds {', '.join(map(str, seeds))}; commit "
            f"{', '.join(sorted({*commits}))}; {', '.join(sorted({*devices}))}.")  # fmt: skip
    counts = {split: (each["images"], each["classes"])
              for split, each in settings[0].images.items()}  # fmt: skip
    if counts != dataset.module_of(name).PUBLISHED:
        line += f" Not the published images: {images_of(settings[0])}."
    return line


def write_rows(page, title, settings, name):
    """Replace the "measured here" rows of the table that begins with `title`, and the line below
    the table that says what they were measured with."""
    lines, header = page.read_text().splitlines(), f"| {title} |"
    starts = [number for number, line in enumerate(lines) if line.startswith(header)]
    if not starts:
        raise UserError(f"{page}: has no table that begins with {header}")
    start = starts[0]
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    metrics = [cell.strip() for cell in lines[start].split("|")[2:-1]]
    kept = [line for line in lines[start:end] if not line.startswith("| measured here")]
    rows = [f"| {' | '.join(row)} |" for row in table_rows(settings, metrics)]
    after = lines[end:]
    if after[1:2] and after[1].startswith("Measured here: "):
        after = after[2:]
    lines = [*lines[:start], *kept, *rows, "", facts(name, settings), *after]
    write_atomically(page.resolve(), "\n".join([*lines, ""]).encode())


def write_summary(readme, title, settings, name):
    """Fill the row of README's table: R@1, the paper's and ours."""
    plain, ddml = sorted(settings, key=lambda setting: setting.flags["disent"])
    cells = [with_spread(by_seed(setting, which, "R@1"), 1)
             for setting, which in ((ddml, "best"), (ddml, "last"), (plain, "last"))]  # fmt: skip
    row = f"| {' | '.join([title, str(dataset.module_of(name).PAPER['R@1']), *cells])} |"
    text, found = re.subn(f"^\\| {title} \\|.*$", row, readme.read_text(), flags=re.M)
    if found != 1:
        raise UserError(f"{readme}: has no row that begins with | {title} |, or several")
    write_atomically(readme.resolve(), text.encode())


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    args, further = build_parser().parse_args(argv[:at]), argv[at + 1 :]
    there = []
    for name in PUBLISHED:
        flags = training_flags(name, args.data_root, further)
        print(f"{name}: {2 * args.seeds} runs: {shlex.join(sweep_command(flags, args.seeds))}")
        if missing := what_is_missing(name, flags):
            print(*(f"  not now: {reason}" for reason in missing), sep="\n")
        else:
            there.append((name, flags))
    if not there:
        raise UserError("nothing to run: get what is missing, as said above, and run this again")
    if args.dry_run:
        return 0
    failed = []
    for name, flags in there:
        runs = runs_of(flags, args.seeds)
        failed += sweep.complete(runs, environments(None), name)
        settings, left_out = gather(each.folder for each in runs)
        if [len(setting.rows) for setting in settings] != [args.seeds, args.seeds]:
            print(f"{name}: the rows wait until all runs are finished", *left_out, sep="\n")
            continue
        if settings[0].images != settings[1].images:
            print(f"{name}: the rows are not written: some runs are of other images")
            continue
        write_rows(args.docs / "docs/reproduction.md", PUBLISHED[name][0], settings, name)
        write_summary(args.docs / "README.md", PUBLISHED[name][0], settings, name)
        print(f"{args.docs}: wrote the measured rows of {name}")
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    run(main, "benchmarks.paper")
