"""Drawing a layer's weights with the KL from a normal prior, forward and backward, against bayesian-torch's formula.

Theirs is LinearReparameterization's: the parameter is rho with sigma = softplus(rho), where ours is log_sigma2 with
sigma = exp(log_sigma2 / 2). The prior is N(0, 1) in both; they return the mean of the KL over weights, which is a sum
here. On a CPU the loss touches every drawn weight and the KL; on a GPU, where that would be a third of the traffic, the
gradients of both are given.
"""

import math

import torch
from torch import nn

from benchmarks.cases import GPU_COPY, Case, Setup
from losssurf_fast.ops import gaussian_weights

# [O, I] of a layer
SHAPES = {"cpu": ((512, 784), (1024, 1024), (4096, 1024)), "cuda": ((1024, 1024), (10_000, 10_000), (4096, 4096))}
# Many small layers, one call.
LAYERS = {"cpu": (40, (64, 64)), "cuda": (200, (192, 192))}


def eager_draw(mean, rho):
    sigma = torch.log1p(torch.exp(rho))
    weight = mean + sigma * torch.randn_like(mean)
    prior_mean, prior_std = torch.zeros_like(mean), torch.ones_like(mean)
    log_ratio = torch.log(prior_std) - torch.log(sigma)
    kl = log_ratio + (sigma**2 + (mean - prior_mean) ** 2) / (2 * prior_std**2) - 0.5
    return weight, kl.sum()


def eager(*parameters):
    """Weights and KL of the means and rhos of all layers."""
    half = len(parameters) // 2
    drawn, kl = zip(*map(eager_draw, parameters[:half], parameters[half:]), strict=True)
    return *drawn, sum(kl)


def ours(*parameters):
    half = len(parameters) // 2
    drawn, kl = gaussian_weights(parameters[:half], parameters[half:], ["additive"] * half, prior="normal")
    return *drawn, kl


class Loss(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, coefficient, *parameters):
        *drawn, kl = self.draw(*parameters)
        return sum((weight * coefficient).sum() for weight in drawn) + kl


def _setup(shape, layers, given: bool):
    """``given``: the gradients of weights and KL are given, no loss is computed."""

    def setup(device: torch.device) -> Setup:
        draw = torch.Generator(device).manual_seed(0)
        make = lambda centre: nn.Parameter(0.1 * torch.randn(shape, device=device, generator=draw) + centre)
        parameters = [*(make(0.0) for _ in range(layers)), *(make(-4.0) for _ in range(layers))]
        grads = [torch.empty_like(p) for p in parameters]
        coefficient = torch.randn(shape, device=device, generator=draw)
        drawn = torch.empty(shape, device=device)

        def read_and_write():
            for grad, parameter in zip(grads, parameters, strict=True):
                grad.copy_(parameter.detach())
                drawn.copy_(grad)

        draws = {"eager": eager, "compiled": eager, "ours": ours}
        if given:
            return Setup(inputs=tuple(parameters), providers=draws, floor=read_and_write)
        losses = {name: Loss(draw) for name, draw in draws.items()}
        return Setup(inputs=(coefficient, *parameters), providers=losses, floor=read_and_write)

    return setup


def _case(shape, layers=1, variant="", given=False, **extra) -> Case:
    return Case(
        op="gaussian_weights",
        variant=variant,
        shape=shape,
        mode="full",
        setup=_setup(shape, layers, given),
        bytes=32 * layers * math.prod(shape),  # parameters twice, draws, their gradients, the parameters'
        flops=0,
        **extra,
    )


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    on_gpu = device_type == "cuda"
    shapes = ((3, 5),) if tiny else SHAPES[device_type]
    layers, layer = (3, (3, 2)) if tiny else LAYERS[device_type]
    goal = {"targets": {1: 4.0}}  # with AVX-512; 2.5 with AVX2
    result = []
    for i, shape in enumerate(shapes):
        headline = i == len(shapes) // 2
        extra = {"given": True, "copy_target": GPU_COPY if headline else None} if on_gpu else goal
        result.append(_case(shape, headline=headline, **extra))
    return [*result, _case(layer, layers, f"{layers} of", given=on_gpu, compiles=not on_gpu)]
