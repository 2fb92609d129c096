"""A few queries with their nearest images, as a figure."""

import torch

from retrieval.page import small_picture


def draw_neighbours(images, similarities, indices, count=8):
    """A row for each of `count` queries, evenly spaced, with its `neighbours`: a tick and a line
    for those of its class, a cross and dashes for others."""
    from matplotlib.figure import Figure

    queries, top = indices.shape
    rows = torch.linspace(0, queries - 1, min(count, queries)).long()
    figure = Figure(figsize=(1.2 * (top + 1), 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), top + 1, squeeze=False)
    for cells, query in zip(axes, rows.tolist()):
        for cell, index in zip(cells, (query, *indices[query].tolist())):
            cell.imshow(small_picture(images.paths[index]))
            cell.set(xticks=[], yticks=[])
        name = images.classes[images.labels[query]][:16].encode(errors="replace").decode()
        cells[0].set_title(name, fontsize="small", parse_math=False)
        for cell, similarity, index in zip(cells[1:], similarities[query], indices[query]):
            match = images.labels[index] == images.labels[query]
            cell.set_title(f"{'✓' if match else '✗'} {similarity:.2f}", fontsize="small")
            colour, style = ("#008055", "-") if match else ("#c0392b", "--")
            cell.spines[:].set(color=colour, linestyle=style, linewidth=2)
    return figure
