"""The VGG-like network with dropout of Zagoruyko (2015), which the paper on variance networks takes for CIFAR."""

from collections import OrderedDict

import torch
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.demo.models import Dropout

# Channels over the width, and the dropout after each convolution but the last of its stage; every stage ends in a pool.
STAGES = (((1, 1), 0.3), ((2, 2), 0.4), ((4, 4, 4), 0.4), ((8, 8, 8), 0.4), ((8, 8, 8), 0.0))


class VGGLike(nn.Module):
    """13 convolutions 3x3 with BatchNorm in five stages, 512, classes; for images of at most 32 x 32.

    Args:
        width: channels of the first stage, 64 in the paper; the other layers grow with it.
    """

    stochastic = ("conv11", "conv12", "conv13", "fc1")

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        number = 0
        for stage, (factors, rate) in enumerate(STAGES, 1):
            for factor in factors:
                number += 1
                layers[f"conv{number}"] = nn.Conv2d(channels, channels := factor * width, 3, padding=1)
                layers[f"bn{number}"] = nn.BatchNorm2d(channels)
                layers[f"relu{number}"] = nn.ReLU()
                if rate:
                    layers[f"dropout{number}"] = Dropout(rate)
            layers.pop(f"dropout{number}", None)
            layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)  # so that a small image's one pixel stays
        self.layers = nn.Sequential(
            OrderedDict(
                **layers,
                flatten=nn.Flatten(),
                dropout_fc1=Dropout(),
                fc1=nn.Linear(channels, channels),
                bn_fc1=nn.BatchNorm1d(channels),
                relu_fc1=nn.ReLU(),
                dropout_fc2=Dropout(),
                fc2=nn.Linear(channels, classes),
            )
        )

    def draw_weights(self, parameterization: str) -> "VGGLike":
        """Let the last three convolutions and the first linear layer draw their weights; the dropout stays."""
        return lsf.to_lrt(self, parameterization, include=[f"layers.{name}" for name in self.stochastic])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
