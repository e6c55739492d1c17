"""The demo's networks: a perceptron, one with a noisy layer, what they and curves are compared to, and tensors."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.conversion import to_lrt
from losssurf_fast.nn import StochasticLayer

NETWORKS = ("dropout", "layer", "neuron", "weight", "additive", "variance")


class Dropout(StochasticLayer):
    """Binary dropout that follows ``lsf.prediction``."""

    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.probability, training=self.draws_noise)


class EagerLRT(nn.Module):
    """A linear layer with the local reparameterization trick as one writes it in plain PyTorch."""

    def __init__(self, linear: nn.Linear, log_sigma2: torch.Tensor, zero_mean: bool) -> None:
        super().__init__()
        self.weight = None if zero_mean else nn.Parameter(linear.weight.detach().clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.log_sigma2 = nn.Parameter(log_sigma2.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.bias if self.weight is None else F.linear(x, self.weight, self.bias)
        std = torch.sqrt(F.linear(x * x, self.log_sigma2.exp()) + 1e-16)
        return mean + std * torch.randn_like(std)

    def kl(self) -> torch.Tensor | float:
        """The usual approximation of the log-uniform KL (Molchanov et al., ICML 2017)."""
        if self.weight is None:
            return 0.0
        log_alpha = self.log_sigma2 - torch.log(self.weight.square() + 1e-8)
        return (0.63576 * torch.sigmoid(-1.8732 - 1.48695 * log_alpha) + 0.5 * F.softplus(-log_alpha)).sum()


def perceptron(inputs: int, hidden: int, classes: int, seed: int, dropout: bool = False) -> nn.Sequential:
    """inputs - hidden - hidden - classes with ReLU; the same seed gives the same weights, with dropout or without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [
            ("first", nn.Linear(inputs, hidden)),
            ("relu1", nn.ReLU()),
            ("hidden", nn.Linear(hidden, hidden)),
            ("relu2", nn.ReLU()),
            ("last", nn.Linear(hidden, classes)),
        ]
    if dropout:
        parts.insert(2, ("dropout", Dropout()))
    return nn.Sequential(OrderedDict(parts))


def network(kind: str, inputs: int, hidden: int, classes: int, seed: int) -> nn.Sequential:
    """The network with binary dropout, or the one whose ``hidden`` layer has the parameterization ``kind``."""
    if kind == "dropout":
        return perceptron(inputs, hidden, classes, seed, dropout=True)
    return to_lrt(perceptron(inputs, hidden, classes, seed), kind, include="hidden")


def bezier_coefficients(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a curve's start, bend and end."""
    return (1 - t) ** 2, 2 * t * (1 - t), t**2


class EagerBezier(nn.Module):
    """A Bezier curve between two perceptrons as one writes it in plain PyTorch: each layer combines its weights."""

    def __init__(self, start: nn.Sequential, end: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for a, b in zip(start, end, strict=True):
            if isinstance(a, nn.Linear):
                self.layers.append(_EagerBezierLinear(a, b))

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        coefficients = bezier_coefficients(torch.rand(()) if t is None else t)
        for layer in self.layers[:-1]:
            x = layer(x, coefficients).relu()
        return self.layers[-1](x, coefficients)


class _EagerBezierLinear(nn.Module):
    def __init__(self, start: nn.Linear, end: nn.Linear) -> None:
        super().__init__()
        pairs = (start.weight, end.weight), (start.bias, end.bias)
        self.weights, self.biases = (
            nn.ParameterList(nn.Parameter(torch.lerp(a, b, at).detach(), at == 0.5) for at in (0.0, 0.5, 1.0))
            for a, b in pairs
        )

    def forward(self, x: torch.Tensor, coefficients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        combine = lambda bends: sum(c * bend for c, bend in zip(coefficients, bends, strict=True))
        return F.linear(x, combine(self.weights), combine(self.biases))


def resnet50_tensors() -> nn.Sequential:
    """The layers of ResNet-50 (He et al., CVPR 2016) in a row: its 161 parameters and its buffers, not its function."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, bias=False), nn.BatchNorm2d(outputs)]

    layers, channels = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += convolution(channels, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                layers += convolution(channels, 4 * width, 1)
            channels = 4 * width
    return nn.Sequential(*layers, nn.Linear(channels, 1000))
