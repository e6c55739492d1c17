"""VGG-16 for 32 x 32 images, without BatchNorm, as in the experiments of SWA and of mode connectivity."""

import math

import torch
from torch import nn

_STAGES = (2, 2, 3, 3, 3)  # convolutions before each pooling


class VGG16(nn.Module):
    """Simonyan and Zisserman's configuration D (ICLR 2015) with a classifier of three layers and dropout.

    Args:
        channels: of the images.
        num_classes: C.
        width: channels of the first stage; the later ones have 2, 4, 8 and 8 times as many. The published is 64.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        layers = []
        for stage, depth in enumerate(_STAGES):
            for _ in range(depth):
                outputs = width * min(2**stage, 8)
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(channels, channels), nn.ReLU(),
            nn.Dropout(), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, num_classes),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[N, channels, 32, 32]`` -> logits ``[N, num_classes]``."""
        return self.classifier(self.features(x).flatten(1))
