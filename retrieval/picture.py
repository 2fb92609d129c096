"""Figures: queries with their nearest images, a diagnosis, a calibration."""

import io

import torch

from retrieval.page import small_picture


def png_of(figure, dpi):
    """A matplotlib figure as a PNG's bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def draw_neighbours(images, similarities, indices, count=8):
    """A row for each of `count` evenly spaced queries, with its `neighbours`. Those of its class
    have a tick and a line, others a cross and dashes."""
    from matplotlib.figure import Figure

    queries, top = indices.shape
    rows = torch.linspace(0, queries - 1, min(count, queries)).long()
    figure = Figure(figsize=(1.2 * (top + 1), 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), top + 1, squeeze=False)
    for cells, query in zip(axes, rows.tolist()):
        for cell, index in zip(cells, (query, *indices[query].tolist())):
            cell.imshow(small_picture(images.paths[index], images.background))
            cell.set(xticks=[], yticks=[])
        name = images.classes[images.labels[query]][:16].encode(errors="replace").decode()
        cells[0].set_title(name, fontsize="small", parse_math=False)
        for cell, similarity, index in zip(cells[1:], similarities[query], indices[query]):
            match = images.labels[index] == images.labels[query]
            cell.set_title(f"{'✓' if match else '✗'} {similarity:.2f}", fontsize="small")
            colour, style = ("#008055", "-") if match else ("#c0392b", "--")
            cell.spines[:].set(color=colour, linestyle=style, linewidth=2)
    return figure


def draw_diagnosis(diagnosis, title):
    """A PNG's bytes: spectra, entropy between two classes, bars of the measures and of the probes,
    for each head on training and on unseen classes."""
    from matplotlib.figure import Figure

    factors = {probe["of"] for probe in diagnosis["probes"]}
    heights = [3.4, 4.6, 1.5 + 0.42 * len(factors)]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    lines, bars, probed = figure.subfigures(3, 1, height_ratios=heights)
    figure.suptitle(f"{title}: training and unseen classes, {diagnosis['classes']:,} each with "
                    f"N = {diagnosis['images']:,} images; d = {diagnosis['dimensions']}")
    draw_lines(lines, diagnosis)
    draw_bars(bars, diagnosis)
    draw_probes(probed, diagnosis)
    return png_of(figure, 110)


def draw_calibration(calibration, counts, title):
    """A PNG's bytes: the cosines of pairs of one class and of different classes with the threshold,
    and the share that matches by threshold. counts: {kind of pair: [bins]}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title)
    density, rates = figure.subplots(1, 2)
    (used,) = sum(counts.values()).nonzero()
    first, last, bins = int(used[0]), int(used[-1]), len(counts["one class"])
    width = 2 ** max(0, (last - first).bit_length() - 7)  # bins in a bar, for 64 to 128 bars
    edges = torch.linspace(-1, 1, bins + 1).numpy()
    for (kind, each), colour, style in zip(counts.items(), ("#0060a8", "#d1600a"), ("-", "--")):
        bars = each.reshape(-1, width).sum(axis=1) / each.sum() * bins / 2 / width
        density.stairs(bars, edges[::width], fill=True, facecolor=(colour, 0.35), edgecolor=colour,
                       linestyle=style, linewidth=1.2,
                       label=f"{calibration['pairs'][kind]:,} pairs of {kind}")
        matching = 100 * (1 - each.cumsum() / each.sum())
        rates.plot(edges[1:], matching, style, color=colour, label=f"of {kind}, % that match")
    low, high = calibration["intervals"]["threshold"]
    for axes in (density, rates):
        axes.axvspan(low, high, color="k", alpha=0.12, linewidth=0)
        axes.axvline(calibration["threshold"], color="k", linewidth=1.2,
                     label=f"threshold {calibration['threshold']:.3f} and its 95 % interval")
        axes.set(xlim=(edges[first], edges[last + 1]), xlabel="cosine of two pictures")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    density.set_title("density of the pairs' cosines", fontsize="medium")
    density.set_ylim(0, 1.3 * density.get_ylim()[1])  # room for the legend
    rates.set(yscale="log", ylim=(100 / max(counts["different classes"].sum(), 10), 130))
    rates.yaxis.set_major_formatter("{x:g}")
    rates.set_title("% of pairs that match, by threshold", fontsize="medium")
    density.legend(fontsize="small", loc="upper left")
    rates.legend(fontsize="small", loc="lower left")
    return png_of(figure, 110)


COLOURS = {"retrieval": "#0060a8", "specific": "#d1600a", "pixels": "#8a8a8a"}


def look_of(head, side):
    """(label, colour, line style, opacity). Training is solid, unseen is light and dashed."""
    unseen = side == "unseen"
    return f"{head}, {side}", COLOURS[head], "--" if unseen else "-", 0.45 if unseen else 1.0


def sides_of(diagnosis):
    return [(*look_of(head, side), numbers) for head, sides in diagnosis["heads"].items()
            for side, numbers in sides.items()]  # fmt: skip


def draw_lines(figure, diagnosis):
    panels = {"spectrum": ("spectrum s / sum(s), not centred", "singular value, by size"),
              "centred spectrum": ("the same of centred embeddings", "singular value, by size"),
              "entropy along": ("entropy between two classes (nats)", "along the line, 0 to 1")}
    sides = sides_of(diagnosis)
    panels = {name: words for name, words in panels.items() if name in sides[0][-1]}
    for axes, (name, (title, below)) in zip(figure.subplots(1, len(panels)), panels.items()):
        for label, colour, style, _, numbers in sides:
            values = numbers[name]
            x = torch.arange(1, len(values) + 1)
            x = (x - 1) / (len(values) - 1) if name == "entropy along" else x
            axes.plot(x, values, style, color=colour, label=label)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(below)
        axes.grid(alpha=0.3)
        if name != "entropy along":
            axes.set(yscale="log", ylim=(1e-6, 1))
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_bars(figure, diagnosis):
    sides = sides_of(diagnosis)
    shown = [name for name in diagnosis["definitions"] if name in sides[0][-1]]
    cells = figure.subplots(2, -(-len(shown) // 2)).flatten()
    for axes, name in zip(cells, shown):
        values = [numbers[name] for *_, numbers in sides]
        places = [i + 0.4 * (i // 2) for i in range(len(values))]
        for x, value, (_, colour, style, alpha, _) in zip(places, values, sides):
            bar = axes.bar(x, value, color=colour, alpha=alpha, edgecolor=colour, linestyle=style)
            text = f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
            axes.bar_label(bar, [text], fontsize="x-small")
        axes.set_title(name, fontsize="medium")
        axes.margins(y=0.15)
        axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    for axes in cells[len(shown) :]:
        axes.set_visible(False)


def draw_probes(figure, diagnosis):
    names, probes = ["pixels", *diagnosis["heads"]], diagnosis["probes"]
    factors = list(dict.fromkeys((probe["of"], probe["kind"]) for probe in probes))
    sides = [side for side in diagnosis["heads"]["retrieval"]
             if any(probe["side"] == side for probe in probes)]  # fmt: skip
    cells = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, side in zip(cells, sides):
        for result in (probe for probe in probes if probe["side"] == side):
            row = factors.index((result["of"], result["kind"]))
            for i, name in enumerate(names):
                _, colour, style, alpha = look_of(name, side)
                y, value = row + 0.8 * ((i + 0.5) / len(names) - 0.5), max(result[name], 0)
                bar = axes.barh(y, value, 0.8 / len(names), color=colour, alpha=alpha,
                                edgecolor=colour, linestyle=style)  # fmt: skip
                axes.bar_label(bar, [f" {round(result[name])}"], fontsize="x-small")
            axes.vlines(result["chance"], row - 0.45, row + 0.45, "k", linewidth=2)
        axes.set(xlim=(0, 108), ylim=(len(factors) - 0.4, -0.6), yticks=range(len(factors)),
                 yticklabels=[f"{name} ({kind})" for name, kind in factors],
                 xlabel="% on held-out images; class: accuracy, number: R²")  # fmt: skip
        axes.set_title(f"linear probes, {side} classes", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    for name in names:  # drawn for the legend only
        axes.barh(0, 0, color=COLOURS[name], label=name)
    axes.plot([], [], "k", linewidth=2, label="chance")
    figure.legend(loc="outside lower center", ncols=4)
