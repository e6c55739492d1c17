"""Residual networks with pre-activation: He et al., "Identity mappings in deep residual networks", ECCV 2016."""

import torch
from torch import nn


class PreResNet(nn.Module):
    """Three stages of blocks with ``width``, 2 and 4 times as many channels; each halves the image but the first.

    Args:
        depth: 6n + 2 with blocks of two 3 x 3 convolutions; from 44 on 9n + 2 with bottleneck blocks, whose outputs
            have 4 times as many channels.
        channels: of the images.
        num_classes: C.
        width: the published is 16.
    """

    def __init__(self, depth: int, channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        block, convolutions = (_Bottleneck, 9) if depth >= 44 else (_Basic, 6)
        blocks, rest = divmod(depth - 2, convolutions)
        if rest:
            raise ValueError(f"PreResNet: depth must be {convolutions}n + 2, got {depth}")
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers, inputs = [], width
        for stage in range(3):
            for i in range(blocks):
                layers.append(block(inputs, width * 2**stage, stride=2 if stage and not i else 1))
                inputs = block.expansion * width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[N, channels, H, W]`` -> logits ``[N, num_classes]``."""
        return self.head(self.blocks(self.stem(x)))


class _Residual(nn.Module):
    """x + f(x), with a 1 x 1 convolution on the way around where sizes change."""

    expansion: int

    def __init__(self, inputs: int, outputs: int, stride: int, sizes: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        layers = []
        for before, after, kernel, step in sizes:
            convolution = nn.Conv2d(before, after, kernel, step, padding=kernel // 2, bias=False)
            layers += [nn.BatchNorm2d(before), nn.ReLU(), convolution]
        self.residual = nn.Sequential(*layers)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.residual(x)


class _Basic(_Residual):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride, [(inputs, width, 3, stride), (width, width, 3, 1)])


class _Bottleneck(_Residual):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        super().__init__(inputs, 4 * width, stride, sizes)
