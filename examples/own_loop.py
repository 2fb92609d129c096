"""DDML in a training loop of your own: a torchvision network, any images and labels."""

import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torchvision.models import resnet18

from losses import DDML, l2_normalize

C, d = 10, 64  # training classes, embedding size
network = resnet18(num_classes=2 * d)  # the retrieval head: columns [:d] are mu, the embedding
specific = torch.nn.Linear(2 * d, 2 * d)  # the class-specific head reads the other's output
criterion = DDML(ProxyAnchorLoss(C, d), al=1.0, be=0.1, gam=1e-5)  # or around another proxy loss
optimizer = torch.optim.AdamW([
    {"params": [*network.parameters(), *specific.parameters()], "lr": 1e-4},
    {"params": criterion.parameters(), "lr": 1e-2},  # proxies move faster
])  # fmt: skip

for _ in range(3):
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(C, (8,))  # yours
    head = network(images)
    # each head is normalised as a whole, [mu | s]: without this, std is free and the method another
    loss, terms = criterion(l2_normalize(head), l2_normalize(specific(head)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss:.3f}", {name: f"{term:.3f}" for name, term in terms.items()})

network.eval()
with torch.inference_mode():
    embedding = l2_normalize(network(images)[:, :d])  # what retrieval compares
