"""A backbone of two small layers, for runs in which the network is not the point.

python -m tests.toy FLAGS is train.py with it.
"""

import sys

from torch import nn

from net.backbones import BACKBONES, Backbone, average_and_maximum


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 5, stride=4), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


BACKBONES["toy"] = lambda: Backbone(Toy(), lambda net, x: average_and_maximum(net(x)))


if __name__ == "__main__":
    import train
    from utils import run

    sys.argv[0] = "train.py"
    run(train.main)
