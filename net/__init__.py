"""The embedding network: a backbone, its pooling and the one or two linear heads."""

import torch
from torch import nn

from net.bn_inception import BNInception
from net.weights import load_weights
from utils import memory_format

MODELS = {"bn_inception": BNInception}


def l2_normalize(x):
    """Rows of unit length, x / sqrt(sum x^2 + 1e-12); a zero row stays zero."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # 1e-12 is 0 in half
    return (wide / (wide.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()).to(x.dtype)


class EmbeddingNet(nn.Module):
    """Images [B, 3, H, W] -> what the loss reads; `embed` gives what retrieval reads.

    With `disent` a head's columns are [mu | s]: the mean, and the raw scale of the
    distribution that DDML samples from (AAAI 2025). The heads are stored as
    `model.embedding*`, beside the backbone's layers, as in the published checkpoints.
    """

    def __init__(self, backbone, embedding_size, disent, l2_norm):
        super().__init__()
        self.embedding_size, self.disent, self.l2_norm = embedding_size, disent, l2_norm
        self.model = backbone
        width = 2 * embedding_size if disent else embedding_size
        self.model.embedding = nn.Linear(backbone.num_features, width)
        if disent:
            self.model.embedding_specific = nn.Linear(width, width)
        for head in self.heads():
            nn.init.kaiming_normal_(head.weight, mode="fan_out")
            nn.init.zeros_(head.bias)

    def heads(self):
        """The layers that train from the first epoch on, while the backbone waits (--warm)."""
        names = ("embedding", "embedding_specific") if self.disent else ("embedding",)
        return [getattr(self.model, name) for name in names]

    def pool(self, images):
        """Global average plus global maximum of the last feature map: [B, F]."""
        features = self.model.features(images)
        return features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))

    def forward(self, images):
        """(head [B, 2d], head_specific [B, 2d]) with disent, head [B, d] without."""
        head = self.model.embedding(self.pool(images))
        if not self.disent:
            return l2_normalize(head) if self.l2_norm else head
        specific = self.model.embedding_specific(head)  # reads the un-normalised head
        return (l2_normalize(head), l2_normalize(specific)) if self.l2_norm else (head, specific)

    def embed(self, images):
        """The retrieval embedding: mu [B, d], L2-normalised."""
        mu = self.model.embedding(self.pool(images))[:, : self.embedding_size]
        return l2_normalize(mu)


def place(model, device):
    """Move a network to where it runs."""
    return model.to(device, memory_format=memory_format(device))


def create_model(name, embedding_size, disent=False, l2_norm=True, weights=None):
    """Build a network; `weights` is None or "none" (random), "imagenet", or a checkpoint's path."""
    model = EmbeddingNet(MODELS[name](), embedding_size, disent, l2_norm)
    if weights not in (None, "none"):
        load_weights(model, weights)
    return model
