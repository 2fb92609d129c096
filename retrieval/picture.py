"""A few queries with their nearest images, as a figure."""

import torch

from retrieval.page import small_picture


def draw_neighbours(images, similarities, indices, count=8):
    """`count` queries of an ImageSet, the same ones whatever the network, each with its
    `neighbours`; those of its class have a tick and a line, others a cross and dashes."""
    from matplotlib.figure import Figure

    asked, top = indices.shape
    rows = torch.linspace(0, asked - 1, min(count, asked)).long()
    figure = Figure(figsize=(1.2 * (top + 1), 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), top + 1, squeeze=False)
    found_by = (part[rows].tolist() for part in (similarities, indices))
    for cells, query, near, found in zip(axes, rows.tolist(), *found_by):
        for cell, index in zip(cells, (query, *found)):
            cell.imshow(small_picture(images.paths[index]))
            cell.set(xticks=[], yticks=[])
        name = images.classes[images.labels[query]][:16].encode(errors="replace").decode()
        cells[0].set_title(name, fontsize="small", parse_math=False)
        for cell, similarity, index in zip(cells[1:], near, found):
            right = images.labels[index] == images.labels[query]
            cell.set_title(f"{'✓' if right else '✗'} {similarity:.2f}", fontsize="small")
            colour, style = ("#008055", "-") if right else ("#c0392b", "--")
            cell.spines[:].set(color=colour, linestyle=style, linewidth=2)
    return figure
