"""LeNet-5 as in the experiments on variance networks (Neklyudov et al., ICLR 2019): with BatchNorm and dropout."""

import torch
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.demo.models import Dropout


class LeNet5(nn.Module):
    """conv 20 5x5, pool, conv 50 5x5, pool, 500, classes, with dropout between the convolutions and the rest.

    Args:
        size: side of the square images, at least 4. Those of less than 28 pixels are padded, so that something is left
            of them: MNIST's 28 give the 800 features of the paper, the 8 of scikit-learn's digits give 200.
        width: channels of the first convolution, 20 in the paper; the other layers grow with it.
    """

    stochastic = ("fc1",)  # as in the paper; the convolutions and the last layer keep plain weights

    def __init__(self, size: int, channels: int, classes: int, width: int) -> None:
        super().__init__()
        padding = 0 if size >= 28 else 2
        side = ((size - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2
        maps, hidden = 5 * width // 2, 25 * width
        self.conv1 = nn.Conv2d(channels, width, 5, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, maps, 5, padding=padding, bias=False)
        self.bn2 = nn.BatchNorm2d(maps)
        self.dropout = Dropout()
        self.fc1 = nn.Linear(maps * side**2, hidden, bias=False)
        self.bn3 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.pool = nn.MaxPool2d(2)

    def draw_weights(self, parameterization: str) -> "LeNet5":
        """Let ``fc1`` draw its weights, in place of the dropout before it."""
        self.dropout = nn.Identity()
        return lsf.to_lrt(self, parameterization, include=self.stochastic)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.pool(self.bn2(self.conv2(x)).relu())
        x = self.bn3(self.fc1(self.dropout(x.flatten(1)))).relu()
        return self.fc2(x)
