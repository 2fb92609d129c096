"""Recall@K of a checkpoint, or of a run folder's best one: python evaluate.py CHECKPOINT"""

from pathlib import Path

import dataset
from distributed import init_processes, rank
from flags import SWITCH, Parser, add_data_flags, add_network_flags, given_flags, parse_stored
from loading.loader import Loading, batches, test_loader
from net import CHOICES, model_name, network_from, state_and_flags
from net.export import MODEL_FILES, save_model
from retrieval.evaluate import describe, evaluate
from retrieval.export import EMBEDDING_FILES, export
from retrieval.metrics import recall_at_k  # noqa: F401 (as an API)
from retrieval.page import results_page
from retrieval.search import NEIGHBOURS, neighbours
from runs.checkpoint import epoch_of
from runs.diagnosis import check_diagnosis, diagnose_checkpoint, write_diagnosis
from runs.finish import draw_curves
from runs.folder import checkpoint_in
from runs.results import results_of
from runs.start import facts_of
from storage import read_checkpoint, require_format, require_writable, write_atomically, write_json
from utils import UserError, run, say, set_precision, warn

OUTPUTS = ("json", "export", "page", "save_model")  # flags that name a file to write


def build_parser():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="train.py's or a published one, or a run folder")
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
    add("--save-model", metavar="PATH",
        help="also write the network to this .onnx or .pt2: pixels in, embeddings out")  # fmt: skip
    add_data_flags(parser, dataset.canonical_name, dataset.CHOICES, batch_size=150)
    add_network_flags(parser, model_name, CHOICES)
    return parser


def resolve_flags(parser, argv):
    """(flags, checkpoint). A flag comes from the command line, else from the checkpoint's flags,
    else from the shapes of its weights, else from the default."""
    args, given = given_flags(parser, argv)
    if bool(args.checkpoint) == bool(args.resume):
        parser.error("name one checkpoint or run folder")
    path = checkpoint_in(args.checkpoint or args.resume)
    checkpoint = read_checkpoint(path)
    _, theirs = state_and_flags(checkpoint, path)
    if theirs.get("train_on") == "all" and not {"dataset", "data_root"} & given.keys():
        raise UserError(f"{path}: trained on all classes of {theirs['dataset']}, so that none are "
                        "left to test it on; name another data set with --dataset, or, for its "
                        "exports, its own with --data-root")  # fmt: skip
    unused = {*OUTPUTS, "checkpoint", "resume", "gpu_id", "workers", "remark"}
    if given.get("dataset", theirs.get("dataset")) != theirs.get("dataset"):
        unused |= {"ks", "data_root"}
    kept = vars(args).keys() - unused
    stored = {flag: value for flag, value in theirs.items() if flag in kept}
    args = parse_stored(parser, stored, path)
    vars(args).update(given, checkpoint=path)
    if "dataset" in theirs:
        trained, tested = images_of(theirs), images_of(vars(args))
        if trained != tested:
            say(f"{path}: trained on {trained}, tested on {tested}")
        elif theirs.get("train_on") == "all":
            warn(f"{path} was trained on all classes of {args.dataset}: its recall here says "
                 "nothing about unseen ones")  # fmt: skip
    return args, checkpoint


def images_of(flags):
    """The data set's name, and of one's own images, the path."""
    own = getattr(dataset.module_of(flags["dataset"]), "OWN", None)
    place = f" ({Path(flags[own]).resolve()})" if own in flags else ""
    return f"{dataset.title(flags['dataset'])}{place}"


def in_shape_of_results(path, checkpoint, scores):
    """As in results.json: what is not a run's best checkpoint is a last one."""
    row, history = {"epoch": epoch_of(checkpoint), "metrics": scores}, checkpoint.get("history")
    if not (history and path.endswith("_best.pth")):
        return {"chosen_by": None, "start": None, "chosen": None, "last": row}
    chosen_by = results_of(history)["chosen_by"]
    return {"chosen_by": chosen_by, "start": None, "chosen": row, "last": None}


def write_outputs(args, checkpoint, images, about, scores, retrieved, diagnosis):
    """Write the files that flags name."""
    nearest = None  # at SOP's size, searching takes minutes
    if args.page or (args.export or "").lower().endswith(".parquet"):
        nearest = neighbours(retrieved.embeddings, NEIGHBOURS, images.queries)
    if args.export:
        export(args.export, images, retrieved, nearest)
    if args.page:
        history = checkpoint.get("history")
        curves = draw_curves(history) if history else None
        head = {"title": args.checkpoint, "about": about, "curves": curves,
                "metrics": [("this evaluation", scores)]}  # fmt: skip
        page = results_page(head, images, retrieved.hits, nearest)
        write_atomically(Path(args.page).resolve(), page)
        print(f"{args.page}: to look at in a browser")
    if args.json:
        write_json(Path(args.json).resolve(), {
            **scores, "dataset": args.dataset, "data_root": args.data_root, "split": "test",
            "checkpoint": args.checkpoint, "epoch": epoch_of(checkpoint),
            **in_shape_of_results(args.checkpoint, checkpoint, scores),
            **facts_of({"test": images}, retrieved.embeddings.device),
            **({"diagnosis": diagnosis} if diagnosis else {}),
        })  # fmt: skip
    if diagnosis:
        write_diagnosis(args.checkpoint, epoch_of(checkpoint), diagnosis, args.page)


def main(argv=None):
    args, checkpoint = resolve_flags(build_parser(), argv)
    require_writable(args, *OUTPUTS)
    require_format(args, export=EMBEDDING_FILES, save_model=MODEL_FILES)
    device = init_processes(args.gpu_id)
    check_diagnosis(args)
    set_precision(args.precision)
    model = network_from(
        checkpoint, args.checkpoint, model=args.model, embedding_size=args.embedding_size,
        l2_norm=args.l2_norm, precision=args.precision,
    )  # fmt: skip
    model.num_features(args.image_size)  # ends here where the network cannot take it

    images = dataset.load(args.dataset, args.data_root, "test")
    about = describe(f"{dataset.title(args.dataset)} test", images)
    say(about)
    loading = Loading(args.image_size, args.workers, device, model.interpolation)
    if args.save_model and rank() == 0:
        few = test_loader(images, 8, loading._replace(workers=0))
        save_model(model, args.save_model, next(batches(few, device))[0])
    loader = test_loader(images, args.batch_size, loading)
    ks = dataset.ks(args.dataset, args.ks)
    model, diagnosis = model.to(device), None
    if args.diagnose:  # first, as it may refuse
        diagnosis = diagnose_checkpoint(args, checkpoint, model, images, loading)
    retrieved = evaluate(model, loader, ks, images.queries, args.metrics)
    if rank():
        return
    scores = {metric: 100 * fraction for metric, fraction in retrieved.scores.items()}
    print(f"{args.checkpoint} {args.remark}".strip())
    for metric, percent in scores.items():
        print(f"{metric} : {percent:.3f}")
    write_outputs(args, checkpoint, images, about, scores, retrieved, diagnosis)


if __name__ == "__main__":
    run(main)
