"""One training step of a whole layer: forward with noise, KL of its weights, backward to input and parameters.

Steps of whole networks are in networks.py.
"""

import math

import torch
from torch import nn

from benchmarks.cases import Case, Setup, networks
from benchmarks.cases.lrt import products
from benchmarks.eager import EagerLayer
from benchmarks.gemm import fastest_products
from losssurf_fast.nn import LRTLinear

# (M, N, K): batch, outputs, inputs.
SHAPES = {
    "cpu": ((32, 10, 500), (64, 512, 784), (128, 1024, 1024)),
    "cuda": ((64, 4096, 4096), (4096, 4096, 4096)),
}
TINY = (4, 3, 5)


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
        ours = Step(LRTLinear(k, n)).to(device)
        eager = Step(EagerLayer(ours.layer))
        return Setup(
            inputs=(x,),
            providers={"eager": eager, "compiled": eager, "ours": ours},
            floor=fastest_products(products(x, eager.layer.weight, shape, "full", streams=2)),
        )

    return setup


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    shapes = SHAPES[device_type]
    layers = [
        Case(
            op="LRTLinear step",
            variant="additive",
            shape=shape,
            mode="full",
            setup=_setup(shape),
            bytes=4 * (4 * shape[0] * shape[2] + 8 * shape[1] * shape[2]),  # x and parameters both ways, twice
            flops=12 * math.prod(shape),
            peak_target=0.5 if device_type == "cuda" and shape == shapes[1] else None,
            headline=shape == shapes[1],
        )
        for shape in ((TINY,) if tiny else shapes)
    ]
    return layers + networks.cases(tiny, device_type)
