"""From batches of pixels to embeddings."""

import torch

from utils import UserError


def embed(model, batches):
    """L2-normalised embeddings [N, d] and labels [N] of batches (pixels, labels, ...), in their
    order. Leaves `model` in eval mode."""
    model.eval()
    device = model.mean.device
    embeddings = [torch.empty(0, model.embedding_size, device=device)]
    labels = [torch.empty(0, dtype=torch.long, device=device)]
    with torch.inference_mode():
        for pixels, targets, *_ in batches:
            embeddings.append(model.embed(model.prepare(pixels)))
            labels.append(targets)
    embeddings = torch.cat(embeddings)
    require_finite(embeddings)
    return embeddings, torch.cat(labels)


def require_finite(embeddings):
    if not embeddings.isfinite().all():
        raise UserError("the network's embeddings are not all finite: its weights are of no use")
