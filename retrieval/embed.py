"""From batches of pixels to embeddings."""

import torch
from torch.nn import functional as F

from utils import UserError


def embed(model, batches):
    """L2-normalised embeddings [N, d] and labels [N] of batches (pixels, labels, ...), in their
    order. Leaves `model` in eval mode."""
    model.eval()
    device = model.mean.device
    embeddings = [torch.empty(0, model.embedding_size, device=device)]
    labels = [torch.empty(0, dtype=torch.long, device=device)]
    rows = 0
    with torch.inference_mode():
        for pixels, targets, *_ in batches:
            rows = max(rows, len(pixels))
            if model.compiled:  # a smaller last batch would be compiled anew
                pixels = F.pad(pixels, 6 * (0,) + (0, rows - len(pixels)))
            # CUDA graphs overwrite what they have returned
            embeddings.append(model.embed(model.prepare(pixels))[: len(targets)].clone())
            labels.append(targets)
    embeddings = torch.cat(embeddings)
    require_finite(embeddings)
    return embeddings, torch.cat(labels)


def require_finite(embeddings):
    if not embeddings.isfinite().all():
        raise UserError("the network's embeddings are not all finite: its weights are of no use")
