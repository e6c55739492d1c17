"""Drawing a layer's weights with the KL from a normal prior, forward and backward, against bayesian-torch's formula.

Theirs is LinearReparameterization's: the parameter is rho with sigma = softplus(rho), where ours is log_sigma2 with
sigma = exp(log_sigma2 / 2). The prior is N(0, 1) in both; they return the mean of the KL over weights, which is a sum
here. The loss touches every drawn weight and the KL.
"""

import math

import torch
from torch import nn

from benchmarks.cases import Case, Setup
from losssurf_fast.ops import gaussian_weights

SHAPES = ((512, 784), (1024, 1024), (4096, 1024))  # [O, I] of a layer
LAYERS, LAYER = 40, (64, 64)  # many small layers, one call


def eager_draw(mean, rho):
    sigma = torch.log1p(torch.exp(rho))
    weight = mean + sigma * torch.randn_like(mean)
    prior_mean, prior_std = torch.zeros_like(mean), torch.ones_like(mean)
    log_ratio = torch.log(prior_std) - torch.log(sigma)
    kl = log_ratio + (sigma**2 + (mean - prior_mean) ** 2) / (2 * prior_std**2) - 0.5
    return weight, kl.sum()


class Eager(nn.Module):
    def forward(self, coefficient, *parameters):
        half = len(parameters) // 2
        drawn, kl = zip(*map(eager_draw, parameters[:half], parameters[half:]), strict=True)
        return sum((weight * coefficient).sum() for weight in drawn) + sum(kl)


class Ours(nn.Module):
    def forward(self, coefficient, *parameters):
        half = len(parameters) // 2
        drawn, kl = gaussian_weights(parameters[:half], parameters[half:], ["additive"] * half, prior="normal")
        return sum((weight * coefficient).sum() for weight in drawn) + kl


def _setup(shape, layers):
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

        providers = {"eager": Eager(), "compiled": Eager(), "ours": Ours()}
        return Setup(inputs=(coefficient, *parameters), providers=providers, floor=read_and_write)

    return setup


def _case(shape, layers=1, variant="", **extra) -> Case:
    return Case(
        op="gaussian_weights",
        variant=variant,
        shape=shape,
        mode="full",
        setup=_setup(shape, layers),
        bytes=32 * layers * math.prod(shape),  # parameters twice, draws, their gradients, the parameters'
        flops=0,
        **extra,
    )


def cases(tiny: bool = False) -> list[Case]:
    shapes = ((3, 5),) if tiny else SHAPES
    layers, layer = (3, (3, 2)) if tiny else (LAYERS, LAYER)
    goal = {1: 4.0}  # with AVX-512; 2.5 with AVX2
    result = [_case(shape, targets=goal, headline=i == len(shapes) // 2) for i, shape in enumerate(shapes)]
    return [*result, _case(layer, layers, f"{layers} of")]
