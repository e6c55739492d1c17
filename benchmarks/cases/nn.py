"""One training step of a whole layer: forward with noise, KL of its weights, backward to input and parameters."""

import math

import torch
from torch import nn

from benchmarks.cases import Case, Setup
from benchmarks.cases.kl import eager_additive
from benchmarks.cases.lrt import eager_lrt_linear, products
from benchmarks.gemm import fastest_products
from losssurf_fast.nn import LRTLinear

SHAPES = ((32, 10, 500), (64, 512, 784), (128, 1024, 1024))  # (M, N, K): batch, outputs, inputs
TINY = (4, 3, 5)


class EagerLayer(nn.Module):
    """The "additive" layer as users write it, with the published KL."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))
        self.log_sigma2 = nn.Parameter(torch.full((out_features, in_features), -10.0))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return eager_lrt_linear(x, self.weight, self.log_sigma2, self.bias, "additive")

    def kl(self):
        return eager_additive(self.log_sigma2, self.weight)


class Step(nn.Module):
    """The loss of one layer alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).square().mean() + self.layer.kl()


def _setup(shape):
    def setup(device: torch.device) -> Setup:
        m, n, k = shape
        x = torch.randn(m, k, device=device, requires_grad=True)
        eager, ours = Step(EagerLayer(k, n)).to(device), Step(LRTLinear(k, n)).to(device)
        return Setup(
            inputs=(x,),
            providers={"eager": eager, "compiled": eager, "ours": ours},
            floor=fastest_products(products(x, eager.layer.weight, shape, "full", streams=2)),
        )

    return setup


def cases(tiny: bool = False) -> list[Case]:
    return [
        Case(
            op="LRTLinear step",
            variant="additive",
            shape=shape,
            mode="full",
            setup=_setup(shape),
            bytes=4 * (4 * shape[0] * shape[2] + 8 * shape[1] * shape[2]),  # x and parameters both ways, twice
            flops=12 * math.prod(shape),
            headline=shape == SHAPES[1],
        )
        for shape in ((TINY,) if tiny else SHAPES)
    ]
