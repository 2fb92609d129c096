"""From batches of pixels to embeddings."""

import torch


def embed(model, batches):
    """embeddings [N, d], L2-normalised, and labels [N], of all batches (pixels, labels, index), in
    their order. Leaves `model` in eval mode."""
    model.eval()
    embeddings, labels = [], []
    with torch.inference_mode():
        for pixels, targets, _ in batches:
            embeddings.append(model.embed(model.prepare(pixels)))
            labels.append(targets)
    return torch.cat(embeddings), torch.cat(labels)
