"""A few queries with their nearest images, as a figure."""

import torch

from retrieval.page import small_picture
from retrieval.search import nearest


def draw_neighbours(images, embeddings, count=8, top=8):
    """`count` queries of an ImageSet, the same ones whatever the network, each with the `top`
    nearest of embeddings [N, d]; those of its class have a tick and a line, others a cross and
    dashes."""
    from matplotlib.figure import Figure

    asked, first = images.queries or len(images), images.queries or 0
    rows = torch.linspace(0, asked - 1, min(count, asked)).long()
    excluded = rows.to(embeddings.device) if images.queries is None else None
    similarities, indices = nearest(embeddings[rows], embeddings[first:], top, excluded)
    figure = Figure(figsize=(1.2 * (top + 1), 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), top + 1, squeeze=False)
    found_by = zip(axes, rows.tolist(), similarities.tolist(), (indices + first).tolist())
    for cells, query, near, found in found_by:
        for cell, index in zip(cells, (query, *found)):
            cell.imshow(small_picture(images.paths[index]))
            cell.set(xticks=[], yticks=[])
        for cell in cells[1 + len(found) :]:
            cell.set_axis_off()
        name = images.classes[images.labels[query]][:16].encode(errors="replace").decode()
        cells[0].set_title(name, fontsize="small", parse_math=False)
        for cell, similarity, index in zip(cells[1:], near, found):
            right = images.labels[index] == images.labels[query]
            cell.set_title(f"{'✓' if right else '✗'} {similarity:.2f}", fontsize="small")
            colour, style = ("#008055", "-") if right else ("#c0392b", "--")
            cell.spines[:].set(color=colour, linestyle=style, linewidth=2)
    return figure
