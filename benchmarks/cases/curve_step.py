"""A step of training a curve between two ResNet-18, forward and backward, against layer by layer.

The floor is the same step of one network alone: what remains to 100 % of it is what the curve adds. Target: 91 %, at
most a tenth more. The optimizer has as many weights in all of them, and is left out.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.cases import Case, Setup
from losssurf_fast.curve import Curve
from losssurf_fast.ops import curve_coefficients


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        convolution = lambda i, kernel, stride: nn.Sequential(
            nn.Conv2d(i, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
        )
        self.first, self.second = convolution(inputs, 3, stride), convolution(outputs, 3, 1)
        self.around = nn.Identity() if inputs == outputs else convolution(inputs, 1, stride)

    def forward(self, x):
        return (self.second(self.first(x).relu()) + self.around(x)).relu()


def resnet18(width: int = 64, classes: int = 10) -> nn.Sequential:
    """For images of 32 x 32 (He et al., CVPR 2016, with CIFAR's first layer); 11.2 million weights."""
    layers, channels = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
    for stage in range(4):
        for block in range(2):
            outputs = width << stage
            layers.append(Block(channels, outputs, stride=2 if stage and not block else 1))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class LayerByLayer(nn.Module):
    """A Bezier curve as one writes it in plain PyTorch, by timgaripov/dnn-mode-connectivity's formula (curves.py)."""

    def __init__(self, start: nn.Module, end: nn.Module):
        super().__init__()
        self.names = [name for name, _ in start.named_parameters()]
        starts, ends = list(start.parameters()), list(end.parameters())
        middles = [torch.lerp(a, b, 0.5) for a, b in zip(starts, ends, strict=True)]
        self.bends = nn.ModuleList(
            nn.ParameterList(nn.Parameter(w.detach(), j == 1) for w in bend)
            for j, bend in enumerate((starts, middles, ends))
        )
        self.called = [start]  # in a list, its parameters are not ours

    def forward(self, x):
        coefficients, weights = curve_coefficients(torch.rand(()), 3), {}
        for name, (a, b, c) in zip(self.names, zip(*self.bends, strict=True), strict=True):
            weight = a * coefficients[0]
            weight += b * coefficients[1]
            weight += c * coefficients[2]
            weights[name] = weight
        return functional_call(self.called[0], weights, (x,))


class Loss(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return F.cross_entropy(self.network(x), y)


def _setup(batch: int, width: int, t_sampling: str):
    def setup(device: torch.device) -> Setup:
        x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
        networks = [resnet18(width).to(device) for _ in range(2)]
        plain, eager = Loss(networks[0]), Loss(LayerByLayer(*networks))
        ours = Loss(Curve(networks, t_sampling=t_sampling))
        weights = list(plain.parameters())

        @torch.enable_grad()
        def one_network():
            torch.autograd.grad(plain(x, y), weights)

        return Setup((x, y), {"eager": eager, "ours": ours}, one_network)

    return setup


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    width, batches = (2, (2,)) if tiny else (64, (128, 512) if device_type == "cuda" else (32, 128))
    size = sum(p.numel() for p in resnet18(width).parameters())
    return [
        Case(
            op="Curve step",
            variant=f"ResNet-18, t by {t_sampling}, batch {batch}",
            shape=(size,),
            mode="full",
            setup=_setup(batch, width, t_sampling),
            bytes=24 * size,  # of the curve's weights alone
            flops=6 * size,
        )
        for batch in batches
        for t_sampling in (("uniform", "arc_length") if batch == batches[0] else ("uniform",))
    ]
