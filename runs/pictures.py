"""What a finished run leaves to look at."""

import io

from distributed import rank
from retrieval.evaluate import describe
from retrieval.page import results_page
from retrieval.picture import draw_neighbours
from retrieval.search import NEIGHBOURS, neighbours
from runs.results import TERMS, best_of, main_metric, scores_of
from runs.tracking import log_picture
from storage import write_atomically


def draw(run_folder, history, test, retrieved, wandb_run):
    """Draw the finished run's curves and, if there are `test` images, a page of what the last
    epoch's network retrieves."""
    if rank():
        return
    curves = draw_curves(history)
    if test:
        last, best = history[-1], best_of(history, main_metric(history[-1]))
        head = {
            "title": run_folder.folder.name,
            "about": f"{describe('test', test)}. Below, the last epoch's network.",
            "metrics": [
                (f"last epoch, {last['epoch']}", scores_of(last)),
                (f"best epoch, {best['epoch']}, chosen on these images", scores_of(best)),
            ],
            "curves": curves,
        }
        nearest = neighbours(retrieved.embeddings, NEIGHBOURS, test.queries)
        write_atomically(run_folder.page, results_page(head, test, retrieved.hits, nearest))
        if wandb_run:
            log_picture(wandb_run, draw_neighbours(test, *nearest))
    write_atomically(run_folder.curves, curves)


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
    metrics.set(title="test images (%)")
    rate.step(epochs, [result["lr"] for result in history], ".-", where="mid")
    rate.set(title="learning rate", ylim=(0, None))
    for axes in (losses, metrics, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
