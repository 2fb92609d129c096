"""Recall@K of a checkpoint, or of a run folder's best one: python evaluate.py CHECKPOINT

With several checkpoints, such as the folds of one data set: each alone, then their concatenated
embeddings.
"""

from pathlib import Path
from statistics import mean

import dataset
from dataset.check import load_split
from dataset.files import WHITE
from dataset.images import union
from distributed import init_processes, rank
from flags import SWITCH, Parser, add_data_flags, add_network_flags, share
from loading.loader import Loading, test_loader
from net import CHOICES, model_name
from net.export import MODEL_FILES, concatenate, save_model
from retrieval.evaluate import describe, evaluate, retrieve
from retrieval.export import EMBEDDING_FILES, export
from retrieval.metrics import recall_at_k  # noqa: F401 (as an API)
from retrieval.page import results_page
from retrieval.search import NEIGHBOURS, neighbours
from runs.calibration import calibrate_checkpoint, images_to_calibrate_on
from runs.checkpoint import epoch_of
from runs.diagnosis import diagnose_checkpoint
from runs.findings import check_findings, show_finding
from runs.finish import draw_curves
from runs.results import remarks_on_images, results_of
from runs.sources import NOT_OF_THE_RUN, network_of, resolve_flags
from runs.start import facts_of
from storage import require_format, require_writable, write_atomically, write_json
from utils import UserError, run, say, set_precision

OUTPUTS = ("json", "export", "page", "save_model")  # flags that name a file to write

USAGE = """python evaluate.py RUN [flags]; the flags of the data and the network are the run's, so
most evaluations need only these:
  --metrics                       MAP@R and R-Precision too
  --page OUT.html                 queries and their neighbours, to look at
  --calibrate, --diagnose         how similar is similar enough; what training did to the embedding
  --export OUT, --save-model OUT  embeddings or network, to use elsewhere"""


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0], usage=USAGE)
    add = parser.add_argument
    add("checkpoint", nargs="*", help="train.py's or published ones, or run folders")
    add("--resume", metavar="CHECKPOINT", help="the same, as the published script has it")
    add("--remark", default="", metavar="TEXT", help="printed with the result")
    add("--json", metavar="PATH", help="also write the metrics, in per cent, to this file")
    add("--export", metavar="PATH",
        help="also write embeddings, classes and paths to this .npz, or with hits, neighbours and "
        "the images themselves to this .parquet")  # fmt: skip
    add("--page", metavar="PATH", help="also write a page of queries and neighbours, to look at")
    add("--diagnose", **SWITCH,
        help="how training and unseen classes are embedded: numbers, *_diagnosis.png beside the "
        "checkpoint, and both on the run's page")  # fmt: skip
    add("--factors", metavar="FILE.csv",
        help="path and factors of images: --diagnose also probes how well each can be read")
    add("--calibrate", **SWITCH,
        help="from which cosine on two pictures count as the same: calibration.json and "
        "*_calibration.png beside the checkpoint")  # fmt: skip
    add("--fmr", type=share, metavar="RATE",
        help="the share of pairs of different classes that may count as the same; default 0.01")
    add("--save-model", metavar="PATH",
        help="instead of evaluating, write the network to this .onnx or .pt2, and beside it "
        "*_input.py, which makes its input from a picture; needs no data set")  # fmt: skip
    add_data_flags(parser, dataset.canonical_name, dataset.CHOICES, batch_size=150)
    add_network_flags(parser, model_name, CHOICES)
    for action in parser._actions:  # else --help would name train.py's defaults
        if action.default and action.dest not in NOT_OF_THE_RUN:
            action.help += " (default: the run's, else %(default)s)"
    return parser


def save_networks(sources, models):
    """Write the networks as one file. UserError unless all take the same input."""
    args = sources[0][0]
    for name in ("json", "export", "page", "diagnose", "calibrate"):
        if getattr(args, name):
            raise UserError(f"--{name}: --save-model evaluates nothing; give each its own command")
    kinds = {(flags.image_size, model.interpolation) for (flags, _), model in zip(sources, models)}
    if len(kinds) > 1:
        raise UserError(f"--save-model {args.save_model}: these networks take images of different "
                        "sizes, or resized in different ways; save one at a time")  # fmt: skip
    save_model(models, args.save_model, args.image_size, args.background or WHITE)


def evaluate_all(sources, models, images, loadings):
    """Returns ([(title, {metric: per cent})], Retrieved), a row for each network. Several networks
    add two rows, their mean and their concatenation, and Retrieved is the concatenation's."""
    args, rows, found = sources[0][0], [], []
    asked = dataset.ks(args.dataset, args.ks), images.queries, args.metrics

    def report(title, scores):
        rows.append((title, scores))
        if rank() == 0:
            print(f"{title} {args.remark}".strip())
            for metric, percent in scores.items():
                print(f"{metric} : {percent:.3f}")

    for (flags, _), model, loading in zip(sources, models, loadings):
        set_precision(flags.precision)
        loader = test_loader(images, args.batch_size, loading)
        found.append(evaluate(model.to(loading.device), loader, *asked))
        report(flags.checkpoint, found[-1].scores)
    if len(found) == 1:
        return rows, found[0]
    means = {metric: mean(scores[metric] for _, scores in rows) for metric in rows[0][1]}
    report(f"mean of {len(found)}", means)
    embeddings = concatenate([each.embeddings for each in found])
    whole = retrieve(embeddings, images.labels.to(embeddings.device), *asked)
    report(f"concatenation of {len(found)}", whole.scores)
    return rows, whole


def in_shape_of_results(sources, epoch, scores):
    """The keys of results.json: `chosen` for *_best.pth, `last` for others, neither for both."""
    row, chosen_by = {"epoch": epoch, "metrics": scores}, set()
    for flags, checkpoint in sources:
        history = checkpoint.get("history") if flags.checkpoint.endswith("_best.pth") else None
        chosen_by.add(history and results_of(history)["chosen_by"])
    alike = len(chosen_by) == 1
    (chosen_by,) = chosen_by if alike else [None]
    return {"chosen_by": chosen_by, "start": None, "chosen": row if chosen_by else None,
            "last": row if alike and not chosen_by else None}  # fmt: skip


def for_json(sources, rows, facts):
    """The content of --json. Several checkpoints give the metrics of their concatenation."""
    (args, checkpoint), (_, scores) = sources[0], rows[-1]
    paths, several, epoch = args.checkpoint, {}, epoch_of(checkpoint)
    if len(sources) > 1:
        separated = [{"checkpoint": flags.checkpoint, "epoch": epoch_of(each), "metrics": metrics}
                     for (flags, each), (_, metrics) in zip(sources, rows)]  # fmt: skip
        several = {"separated": separated, "mean": rows[-2][1]}
        paths, epoch = [each["checkpoint"] for each in separated], None
    return {
        **scores, "dataset": args.dataset, "data_root": args.data_root, "split": "test",
        "checkpoint": paths, "epoch": epoch,
        **in_shape_of_results(sources, epoch, scores), **several, **facts,
    }  # fmt: skip


def write_outputs(sources, images, about, rows, facts, retrieved):
    """Write the files that flags name."""
    (args, checkpoint), nearest = sources[0], None  # at SOP's size, searching takes minutes
    if args.page or (args.export or "").lower().endswith(".parquet"):
        nearest = neighbours(retrieved.embeddings, NEIGHBOURS, images.queries)
    if args.export:
        export(args.export, images, retrieved, nearest)
    if args.page:
        history = checkpoint.get("history") if len(sources) == 1 else None
        curves = draw_curves(history) if history else None
        titled = rows if len(rows) > 1 else [("this evaluation", rows[0][1])]
        head = {"title": rows[-1][0], "about": about, "curves": curves, "metrics": titled}
        page = results_page(head, images, retrieved.hits, nearest)
        write_atomically(Path(args.page).resolve(), page)
        print(f"{args.page}: to look at in a browser")
    if args.json:
        write_json(Path(args.json).resolve(), for_json(sources, rows, facts))


def main(argv=None):
    sources = resolve_flags(build_parser(), argv, OUTPUTS)
    args, checkpoint = sources[0]
    require_writable(args, *OUTPUTS)
    require_format(args, export=EMBEDDING_FILES, save_model=MODEL_FILES)
    device = init_processes(args.gpu_id)
    check_findings(args, sources)
    models = [network_of(*source) for source in sources]
    if args.save_model:
        return save_networks(sources, models) if rank() == 0 else None
    loadings = [Loading(flags.image_size, args.workers, device, model.interpolation)
                for (flags, _), model in zip(sources, models)]  # fmt: skip
    images = load_split(args, "test")
    about = describe(f"{dataset.title(args.dataset)} test", images)
    say(about)
    unseen = images_to_calibrate_on(args, checkpoint, images)
    findings = {}
    if args.diagnose:  # first, as it may refuse
        set_precision(args.precision)
        model = models[0].to(device)
        findings["diagnosis"] = diagnose_checkpoint(args, checkpoint, model, images, loadings[0])
    rows, retrieved = evaluate_all(sources, models, images, loadings)
    if rank():
        return
    known = union([checkpoint.get("trained_on") for _, checkpoint in sources])
    facts = facts_of({"test": images, **unseen}, device, known)
    if unseen:
        findings["calibration"] = calibrate_checkpoint(
            args, checkpoint, models[0], unseen, loadings[0], retrieved.embeddings, facts["images"])
    facts |= {what: found for what, (found, *_) in findings.items()}
    remarks = remarks_on_images(facts["images"])
    if known:
        remarks += [f"{flags.checkpoint} does not know what it was trained on."
                    for flags, checkpoint in sources if not checkpoint.get("trained_on")]
    for line in remarks:
        print(line)
    write_outputs(sources, images, " ".join([about, *remarks]), rows, facts, retrieved)
    for what, (_, lines, draw) in findings.items():
        show_finding(what, args.checkpoint, epoch_of(checkpoint), lines, draw, args.page)


if __name__ == "__main__":
    run(main)
