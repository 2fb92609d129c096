"""`evaluate.py --diagnose`: how each head embeds training classes and unseen classes."""

import math
from collections import defaultdict

import numpy as np
import torch
from torch.nn import functional as F

from dataset.images import ImageSet
from loading.loader import batches, test_loader
from losses import l2_normalize, standard_deviation
from retrieval import structure
from retrieval.embed import require_finite
from retrieval.evaluate import retrieve
from retrieval.probes import factors_of, probes
from utils import UserError, progress

SIDES = {"training": "train", "unseen": "test"}  # the split that each side is sampled from
MOST = 6000  # images of a side
RAW = 16  # width and height of the raw images that are probed
MEASURES = {
    "R@1": "% of images whose nearest other image is of their class",
    "MAP@R": "%, of each image among all others (Musgrave et al. 2020)",
    "rho": "KL(uniform || s / sum(s)), s: singular values of X, not centred, not squared",
    "rho@2": "the same without the largest singular value, which is mostly the mean",
    "intra": "mean over classes of the mean cosine distance between images of the class",
    "inter": "mean cosine distance between L2-normalised means of classes",
    "density": "intra / inter",
    "alignment": "mean of |x - x'|^2 over all pairs of one class",
    "uniformity": "log of the mean of exp(-2 |x - x'|^2) over all pairs",
    "effective rank": "exp(entropy of s / sum(s)), s: singular values of X, centred",
    "std": "mean over images and dimensions of softplus(s - 5), s: raw scale of the head",
    "entropy": "in nats, of p(k | x) = softmax(23 cos(x, P)) over the training classes; mean along "
    "the straight line between two images of different classes, normalised at each point",
    "slope": "largest change of the top p(k | x) along such a line of length 1; mean over lines",
}


def equal_sample(sides, most=MOST, seed=0):
    """[indices] of a sample of two sides, from their labels [N]. Both sides get the same number C
    of classes, drawn by seed, and their k-th largest classes are cut to one size. So both have
    equally many images, and queries have equally many matches.

    Classes of one image are left out. To stay below `most` images, classes are first cut to
    most / C images, but not below 20, and then whole classes are left out.
    """
    rng, chosen = np.random.default_rng(seed), []
    for labels in sides:
        order = rng.permutation(len(labels))
        order = order[np.argsort(labels.numpy()[order], kind="stable")]
        classes = np.split(order, labels.bincount().cumsum(0)[:-1].numpy())
        classes = [images for images in classes if len(images) > 1]
        chosen.append([classes[i] for i in rng.permutation(len(classes))])
    C = min(map(len, chosen))
    if C < 2:
        raise UserError("--diagnose: both training and test need two classes of two images or more")
    first, second = (sorted(classes[:C], key=len, reverse=True) for classes in chosen)
    largest = max(most // C, 20)
    sizes = [min(len(a), len(b), largest) for a, b in zip(first, second)]
    order = rng.permutation(C)
    kept = order[np.cumsum(np.array(sizes)[order]) <= most]
    return [np.sort(np.concatenate([side[k][: sizes[k]] for k in kept]))
            for side in (first, second)]  # fmt: skip


@torch.inference_mode()
def embed_heads(model, loader):
    """({head: X [N, d]}, {head: mean std}, raw pixels [N, 768]) of the loader's images. X: the
    head's L2-normalised means; those of the head "retrieval" are the retrieval embeddings."""
    model.eval()
    parts, stds, raw = defaultdict(list), defaultdict(list), []
    for pixels, *_ in progress(batches(loader, model.mean.device), len(loader), "diagnosis"):
        small = F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float(), RAW)
        raw.append(small.flatten(1).cpu())
        heads = model(model.prepare(pixels))
        for name, head in zip(("retrieval", "specific"), heads if model.disent else [heads]):
            parts[name].append(l2_normalize(head[:, : model.embedding_size]))
            if model.disent:
                std, _ = standard_deviation(head[:, model.embedding_size :])
                stds[name].append(std.mean(dim=1))
    embeddings = {name: torch.cat(part) for name, part in parts.items()}
    require_finite(torch.cat(list(embeddings.values())))
    return embeddings, {name: torch.cat(part).mean() for name, part in stds.items()}, torch.cat(raw)


def measure(X, labels):
    """{measure: number} of one head on one side, and its spectra."""
    p, centred = structure.spectrum(X), structure.spectrum(X, centred=True)
    scores = retrieve(X, labels, (1,), at_r=True).scores
    numbers = {
        "R@1": scores["R@1"], "MAP@R": scores["MAP@R"],
        "rho": structure.rho(p), "rho@2": structure.rho(p[1:]),
        **dict(zip(("intra", "inter", "density"), structure.density(X, labels))),
        "alignment": structure.alignment(X, labels), "uniformity": structure.uniformity(X),
        "effective rank": structure.effective_rank(centred),
    }  # fmt: skip
    spectra = {"spectrum": p.tolist(), "centred spectrum": centred.tolist()}
    return {name: float(number) for name, number in numbers.items()} | spectra


def diagnose(model, images, loading, batch_size, proxies=None, factors=None):
    """All measures of a network, as a dictionary for JSON: {measure: number} of each head on each
    side, and a list of probes. Sides are sampled by equal_sample.

    images: {"train", "test": ImageSet}; proxies [C, d] of the training classes, None: without
    entropy and slope; factors: from probes.read_factors.
    """
    heads, found, samples, tables = defaultdict(dict), [], {}, {}
    rows = equal_sample([images[split].labels for split in SIDES.values()])
    for (side, split), chosen in zip(SIDES.items(), rows):
        whole = images[split]
        names = [whole.classes[label] for label in whole.labels[chosen]]
        items = [(whole.paths[i], name) for i, name in zip(chosen, names)]
        samples[side] = ImageSet(items, background=whole.background)
        tables[side] = factors_of(factors or {}, samples[side].paths, side)
    for side, sample in samples.items():
        loader = test_loader(sample, batch_size, loading)
        embeddings, stds, raw = embed_heads(model, loader)
        labels = sample.labels.to(loading.device)
        for name, X in embeddings.items():
            heads[name][side] = measure(X, labels)
            if name in stds:
                heads[name][side]["std"] = stds[name].item()
            if proxies is not None:
                heads[name][side] |= structure.entropy_and_slope(X, labels, proxies)
        features = {"pixels": raw} | embeddings
        features = {name: x.cpu().numpy() for name, x in features.items()}
        class_names = {"class": np.array(sample.classes)[sample.labels]} if side == "unseen" else {}
        found += probes(features, class_names | tables[side], side)
    gap = {name: {score: both["training"][score] - both["unseen"][score]
                  for score in ("R@1", "MAP@R")} for name, both in heads.items()}  # fmt: skip
    return {
        "images": len(sample), "classes": len(sample.classes),
        "training classes": len(images["train"].classes), "dimensions": model.embedding_size,
        "definitions": MEASURES, "heads": dict(heads), "gap": gap,
        "probes": found,
    }  # fmt: skip


def describe_diagnosis(diagnosis):
    """Lines for a terminal: the measures, their definitions, the probes."""
    heads, N, d = diagnosis["heads"], diagnosis["images"], diagnosis["dimensions"]
    lines = [f"diagnosis of training and of unseen classes, each with N = {N:,} images of "
             f"{diagnosis['classes']:,} classes; X [N, d]: L2-normalised means of a head, d = {d}"]
    if N < 5 * d:
        lines.append("N is not well above d: with more images, rho and effective rank would differ")
    lines += ["", " " * 14 + "".join(f"{head:>11}{'':22}" for head in heads).rstrip(),
              " " * 14 + "".join(f"{name:>11}" for _ in heads for name in (*SIDES, "gap"))]
    shown = [name for name in MEASURES if name in heads["retrieval"]["unseen"]]
    for name in shown:
        values = []
        for head in heads.values():
            training, unseen = (head[side][name] for side in SIDES)
            values += [training, unseen, training - unseen]
        lines.append(f"{name:14}" + "".join(f"{value:11.4f}" for value in values))
    lines += ["", *(f"{name}: {MEASURES[name]}" for name in shown)]
    if "entropy" in shown:
        classes = diagnosis["training classes"]
        lines.append(f"entropy of {classes:,} equally likely classes: {math.log(classes):.4f}")
    names = ["chance", "pixels", *heads]
    lines += ["", "linear probes, % on held-out images; class: accuracy, number: R^2",
              f"{'':36}" + "".join(f"{name:>11}" for name in names)]  # fmt: skip
    for row in diagnosis["probes"]:
        what = f"{row['of'][:18]:18} {row['kind']:7}{row['side']:10}"
        lines.append(what + "".join(f"{row[name]:11.1f}" for name in names))
    return lines
