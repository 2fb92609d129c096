"""A run's curves as a picture."""

import io

from runs.results import TERMS, scores_of


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
