"""A backbone of two small layers, for runs in which the network is not the point.

python -m tests.toy SCRIPT FLAGS is train.py, evaluate.py, search.py or sweep.py with it.
"""

import sys

from torch import nn

from net.backbones import BACKBONES, Backbone, average_and_maximum


class Toy(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.conv, self.bn = nn.Conv2d(3, 16, 5, stride=4), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.dropout(self.bn(self.conv(x)).relu())


def pool(toy, x):
    return average_and_maximum(toy(x))


BACKBONES["toy"] = lambda: Backbone(Toy(), pool)
BACKBONES["toy_with_dropout"] = lambda: Backbone(Toy(0.3), pool)


if __name__ == "__main__":
    import evaluate
    import search
    import sweep
    import train
    from runs import jobs
    from utils import run

    jobs.TRAIN = [sys.executable, "-m", "tests.toy", "train.py"]
    del sys.argv[0]
    run({"train": train, "evaluate": evaluate, "search": search, "sweep": sweep}[
        sys.argv[0].removesuffix(".py")].main)
