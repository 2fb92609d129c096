"""What a finished run leaves: results.json, a page and its curves."""

from functools import partial

import dataset
from dataset.check import load_split
from distributed import from_rank_0, rank
from loading.loader import Loading, test_loader
from retrieval.evaluate import describe, evaluate
from retrieval.page import results_page
from retrieval.picture import draw_neighbours, png_of
from retrieval.search import NEIGHBOURS, neighbours
from runs.results import TERMS, remarks_on_images, results_of, rows_of, scores_of, summary
from runs.start import facts_of
from runs.tracking import log_picture, summarise
from storage import read_checkpoint, write_atomically, write_json
from utils import say


def test_once(training, images, run_folder):
    """The end of a run with --val-classes: the test images by the last and by the chosen network.
    Returns (what the chosen one retrieves, {"chosen", "last": {metric: per cent}})."""
    args, model = training.args, training.model
    images["test"] = load_split(args, "test")
    say(describe(f"{dataset.title(args.dataset)} test", images["test"]))
    loading = Loading(args.image_size, args.workers, training.device, model.interpolation)
    loader = test_loader(images["test"], args.batch_size, loading)
    ks, tested = dataset.ks(args.dataset, args.ks), {}
    for name, path in (("last", run_folder.last), ("chosen", run_folder.best)):
        checkpoint = from_rank_0(partial(read_checkpoint, path))
        model.load_state_dict(checkpoint["model_state_dict"])
        retrieved = evaluate(model, loader, ks, images["test"].queries, at_r=True)
        tested[name] = retrieved.scores
    return retrieved, tested


def finish(run_folder, training, images, retrieved, tested, wandb_run):
    """Write the results and draw. retrieved: what the page shows of the test images, None without
    any; tested: as in results_of. Returns the results, on rank 0."""
    if rank():
        return None
    facts = facts_of(images, training.device, training.trained_on)
    results = results_of(training.history, training.start, tested, **facts)
    summarise(wandb_run, results)
    write_atomically(run_folder.results, summary(results).encode())
    write_json(run_folder.summary, results)
    curves = draw_curves(training.history)
    if test := images.get("test"):
        network = "chosen" if tested else "last epoch's"
        titles = {"start": "before training", "last": "last epoch, {}",
                  "best": f"best epoch, {{}}, chosen by {results['chosen_by']}",
                  "chosen": f"chosen epoch, {{}}, the best by {results['chosen_by']}"}  # fmt: skip
        head = {
            "title": run_folder.folder.name, "curves": curves,
            "metrics": [(titles[row].format(epoch), metrics)
                        for row, epoch, metrics in rows_of(results)],
            "about": " ".join([f"{describe('test', test)}. Below, the {network} network.",
                               *remarks_on_images(results["images"])]),
        }  # fmt: skip
        nearest = neighbours(retrieved.embeddings, NEIGHBOURS, test.queries)
        write_atomically(run_folder.page, results_page(head, test, retrieved.hits, nearest))
        if wandb_run:
            log_picture(wandb_run, draw_neighbours(test, *nearest))
    write_atomically(run_folder.curves, curves)
    if training.args.keep == "best" and run_folder.best.exists():
        run_folder.last.unlink()
    return results


def draw_curves(history):
    """Loss terms, retrieval metrics and learning rate by epoch: a PNG's bytes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [result["epoch"] for result in history]
    figure = Figure(figsize=(12, 4), layout="constrained")
    losses, metrics, rate = figure.subplots(1, 3)
    for term in TERMS:
        if history[-1][term] is not None:
            losses.plot(epochs, [result[term] for result in history], ".-", label=term)
    losses.set(title="loss terms, unweighted", yscale="symlog")
    for name in scores_of(history[-1]):
        metrics.plot(epochs, [result.get(name) for result in history], ".-", label=name)
    metrics.set(title="retrieval (%)")
    rate.step(epochs, [result["lr"] for result in history], ".-", where="mid")
    rate.set(title="learning rate", ylim=(0, None))
    for axes in (losses, metrics, rate):
        axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return png_of(figure, 120)
