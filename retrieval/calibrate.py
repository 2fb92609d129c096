"""`evaluate.py --calibrate`: the least cosine at which two pictures count as the same.

A pair of one class is genuine, a pair of two classes is an impostor. A pair matches if its cosine
is at least the threshold. FMR (false match rate) is the share of impostors that match, FNMR the
share of genuine pairs that do not.
"""

import numpy as np
import torch

from retrieval.search import exact_products
from utils import UserError, plural, progress

BINS = 2**13  # of cosines from -1 to 1: thresholds are multiples of 2^-12 = 0.00024
GROUPS = 128  # of classes, in the bootstrap: 270 MB of counts
RESAMPLES = 500
TILE = 2**23  # cosines in memory
FEW = 20  # with fewer classes the intervals are too narrow


def check_pairs(images, fmr):
    """UserError if an ImageSet has too few pairs to tell a false match rate of `fmr`."""
    sides = images.labels[: images.queries], images.labels[images.queries or 0 :]
    first, second = (side.bincount(minlength=len(images.classes)) for side in sides)
    genuine = int(first @ second)
    impostor = len(sides[0]) * len(sides[1]) - genuine
    if images.queries is None:  # each pair counts once, and an image has none with itself
        genuine, impostor = (genuine - len(images)) // 2, impostor // 2
    if not genuine or not impostor:
        kind = "different classes" if genuine else "one class"
        raise UserError(f"--calibrate: {plural(len(images), 'image')} of "
                        f"{plural(len(images.classes), 'class')} have no pair of {kind}; it needs "
                        "two classes, and two images of one of them")  # fmt: skip
    if fmr < 1 / impostor:
        raise UserError(f"--fmr {fmr:g}: the {impostor:,} pairs of different classes here cannot "
                        f"tell a rate below {1 / impostor:.2g}")  # fmt: skip


def bins_of(cosines):
    """The bin of each cosine, as an array; no cosine below an edge is put above it."""
    bins = (cosines * (BINS // 2)).floor_().add_(BINS // 2).clamp_(0, BINS - 1)
    return bins.short().cpu().numpy()


@torch.inference_mode()
@exact_products()
def count_pairs(embeddings, labels, queries=None, groups=GROUPS):
    """(genuine [G, BINS], impostor [P, BINS], sides [2, P]): all pairs, counted by cosine, of each
    of G groups of classes, and of the groups sides[:, p], which may be one and the same.

    A group is a class; beyond `groups` classes it is several, drawn at random. embeddings [N, d]
    are L2-normalised. Pairs are of the first `queries` images with the rest; None: of all images.
    """
    labels = labels.cpu().numpy()
    classes = labels.max() + 1
    G = min(classes, groups)
    group = (np.random.default_rng(0).permutation(classes) % G)[labels]

    def by_group(start, stop):
        """Indices of the images, sorted by group, and where each group begins and ends."""
        ends = np.bincount(group[start:stop], minlength=G).cumsum()
        return group[start:stop].argsort(kind="stable") + start, np.array([0, *ends])

    rows, of_row = by_group(0, queries)
    columns, of_column = (rows, of_row) if queries is None else by_group(queries, None)
    sides, slot = np.array(np.triu_indices(G)), np.zeros((G, G), int)
    slot[tuple(sides)] = slot[tuple(sides[::-1])] = np.arange(len(sides[0]))
    genuine, impostor = np.zeros((G, BINS), np.int32), np.zeros((len(sides[0]), BINS), np.int32)
    gallery, most = embeddings[columns].float(), max(1, TILE // len(columns))
    for i in progress(range(G), G, "calibration"):
        first = i if queries is None else 0  # earlier groups have counted their pairs with this one
        for start in range(of_row[i], of_row[i + 1], most):
            part = rows[start : min(start + most, of_row[i + 1])]
            bins = bins_of(gallery[of_column[first] :] @ embeddings[part].float().T)
            tiles = np.split(bins, of_column[first + 1 : -1] - of_column[first])
            for j, tile in enumerate(tiles, first):
                if i == j:
                    there = columns[of_column[j] : of_column[j + 1], None]
                    same, once = labels[there] == labels[part], there > part
                    genuine[i] += np.bincount(tile[same & once], minlength=BINS)
                    tile = tile[~same & once]
                impostor[slot[i, j]] += np.bincount(tile.ravel(), minlength=BINS)
    return genuine, impostor, sides


def measures(genuine, impostor, fmr, at=None):
    """{measure: [...]} of counts [..., BINS]. threshold: the smallest edge with FMR <= fmr;
    measured_fmr, fnmr: at edge number `at`, by default the threshold's; eer: mean of FMR and FNMR
    at the edge where they differ least; auc: how often a genuine pair has a greater cosine than an
    impostor, half if both are in one bin."""
    none, share = np.zeros((*genuine.shape[:-1], 1)), impostor / impostor.sum(-1, keepdims=True)
    # FMR and FNMR at each of the BINS + 1 edges
    matching = np.concatenate([impostor[..., ::-1].cumsum(-1)[..., ::-1], none], axis=-1)
    missed = np.concatenate([none, genuine.cumsum(-1)], axis=-1)
    matching, missed = matching / matching[..., :1], missed / missed[..., -1:]
    chosen = (matching <= fmr).argmax(axis=-1)
    at = chosen if at is None else at
    crossing = np.abs(matching - missed).argmin(axis=-1)

    def value(rates, edge):
        edges = np.broadcast_to(edge, rates.shape[:-1])[..., None]
        return np.take_along_axis(rates, edges, axis=-1)[..., 0]

    return {
        "threshold": chosen / (BINS // 2) - 1,
        "measured_fmr": value(matching, at), "fnmr": value(missed, at),
        "eer": (value(matching, crossing) + value(missed, crossing)) / 2,
        "auc": (share * (1 - (missed[..., :-1] + missed[..., 1:]) / 2)).sum(axis=-1),
    }  # fmt: skip


def resampled(genuine, impostor, sides, resamples=RESAMPLES):
    """Bootstrap: (genuine, impostor) [B, BINS] of B samples of G groups, drawn with replacement.

    A group drawn w times is w groups: its genuine pairs count w times, its impostors with a group
    drawn w' times count w * w' times. Pairs between copies of a group do not count. Samples without
    genuine pairs or without impostors are left out.
    """
    G = len(genuine)
    w = np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), resamples).astype(float)
    pair = np.where(sides[0] == sides[1], w[:, sides[0]], w[:, sides[0]] * w[:, sides[1]])
    blocks = [slice(start, start + 1024) for start in range(0, len(impostor), 1024)]
    both = w @ genuine, sum(pair[:, block] @ impostor[block].astype(float) for block in blocks)
    kept = np.all([counts.any(axis=1) for counts in both], axis=0)
    return [counts[kept] for counts in both]


def calibrate(embeddings, labels, fmr, queries=None):
    """(calibration, {kind: counts [BINS]}). calibration: the threshold, its rates as fractions, and
    their 95 % intervals by bootstrap over classes, as a dictionary for JSON."""
    genuine, impostor, sides = count_pairs(embeddings, labels, queries)
    counts = {"one class": genuine.sum(axis=0, dtype=float),
              "different classes": impostor.sum(axis=0, dtype=float)}  # fmt: skip
    found = {name: float(value) for name, value in measures(*counts.values(), fmr).items()}
    if found["threshold"] == 1:
        raise UserError(f"--fmr {fmr:g}: more pairs of different classes than that have a cosine "
                        f"above {1 - 2 / BINS:.4f}; this network does not tell them apart")
    at = round((found["threshold"] + 1) * (BINS // 2))
    samples = measures(*resampled(genuine, impostor, sides), fmr, at)
    return {
        "threshold": found.pop("threshold"), "fmr": fmr, **found,
        "intervals": {name: np.percentile(values, (2.5, 97.5)).tolist()
                      for name, values in samples.items()},
        "resamples": RESAMPLES, "resampled_groups_of_classes": len(genuine),
        "resolution": 2 / BINS, "pairs": {name: int(each.sum()) for name, each in counts.items()},
    }, counts  # fmt: skip


def describe_calibration(calibration):
    """Lines for a terminal."""
    on, pairs, intervals = (calibration[name] for name in ("computed_on", "pairs", "intervals"))

    def with_interval(name, scale=100, form=".3g", unit=" %"):
        value, low, high = (f"{scale * number:{form}}"
                            for number in (calibration[name], *intervals[name]))  # fmt: skip
        return f"{value}{unit} ({low} to {high})"

    lines = [f"calibration on {on['split']} of {on['dataset']}: {plural(on['images'], 'image')} of "
             f"{plural(on['classes'], 'class')}, {plural(pairs['one class'], 'pair')} of one class "
             f"and {pairs['different classes']:,} of different classes",
             f"two pictures with a cosine of {calibration['threshold']:.4f} or more count as the "
             f"same: {with_interval('measured_fmr')} of pairs of different classes do, "
             f"{with_interval('fnmr')} of pairs of one class do not",
             f"threshold {with_interval('threshold', 1, '.4f', '')}, equal error rate "
             f"{with_interval('eer')}, area under the curve {with_interval('auc', 1, '.4f', '')}",
             f"in brackets: 95 % intervals, from {calibration['resamples']} resamples of the "
             "classes"]  # fmt: skip
    if on["classes"] < FEW:
        lines.append(f"only {plural(on['classes'], 'class')}: the intervals are too narrow, other "
                     "classes may well lie outside")  # fmt: skip
    return lines
