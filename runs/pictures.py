"""What a finished run leaves to look at."""

from retrieval.page import results_page
from retrieval.picture import draw_neighbours
from retrieval.search import NEIGHBOURS, neighbours
from runs.curves import draw_curves
from runs.results import best_of, scores_of
from runs.tracking import log_picture
from storage import write_atomically


def draw(run_folder, history, about, test, retrieved, wandb_run):
    """The finished run's pictures: its curves, and what its last epoch's network retrieves."""
    curves = draw_curves(history)
    if test:
        (embeddings, hits), last, best = retrieved, history[-1], best_of(history)
        metrics = {
            f"last epoch, {last['epoch']}": scores_of(last),
            f"best epoch, {best['epoch']}, chosen on these images": scores_of(best),
        }
        near = neighbours(embeddings, NEIGHBOURS, test.queries)
        page = results_page(run_folder.folder.name, about, metrics, test, hits, near, curves)
        write_atomically(run_folder.page, page)
        if wandb_run:
            log_picture(wandb_run, draw_neighbours(test, *near))
    write_atomically(run_folder.curves, curves)
