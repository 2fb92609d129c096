"""What a finished run leaves to look at."""

from distributed import rank
from retrieval.evaluate import describe
from retrieval.page import results_page
from retrieval.picture import draw_neighbours
from retrieval.search import NEIGHBOURS, neighbours
from runs.curves import draw_curves
from runs.results import best_of, main_metric, scores_of
from runs.tracking import log_picture
from storage import write_atomically


def draw(run_folder, history, test, retrieved, wandb_run):
    """The finished run's pictures: its curves, and, of the `test` images if there are any, what its
    last epoch's network has retrieved."""
    if rank():
        return
    curves = draw_curves(history)
    if test:
        last, best = history[-1], best_of(history, main_metric(history[-1]))
        metrics = {
            f"last epoch, {last['epoch']}": scores_of(last),
            f"best epoch, {best['epoch']}, chosen on these images": scores_of(best),
        }
        about = f"{describe('test', test)}. Below, the last epoch's network."
        near = neighbours(retrieved.embeddings, NEIGHBOURS, test.queries)
        page = results_page(
            run_folder.folder.name, about, metrics, test, retrieved.hits, near, curves
        )
        write_atomically(run_folder.page, page)
        if wandb_run:
            log_picture(wandb_run, draw_neighbours(test, *near))
    write_atomically(run_folder.curves, curves)
