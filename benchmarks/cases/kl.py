"""KL divergences from the prior, value and gradient, against the formulas that users write."""

import functools
import math

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from benchmarks.cases import GPU_COPY, Case, Setup
from losssurf_fast.ops.kl import K1, K2, K3, kl_ard, kl_log_uniform, kl_normal

# [O, I] of a layer
SHAPES = {"cpu": ((64, 512), (1024, 1024), (4096, 1024)), "cuda": ((1024, 1024), (10_000, 10_000), (4096, 4096))}
# Many small layers, one call.
LAYERS = {"cpu": (40, (64, 64)), "cuda": (200, (192, 192))}


def eager_log_uniform(log_alpha):
    """The three constants as they are published; torch has no Dawson function, so nobody's eager KL is exact."""
    return -(K1 * torch.sigmoid(K2 + K3 * log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha)) - K1).sum()


def torch_log_uniform(log_alpha):
    """The same with the library's own fused pieces."""
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha).sum() + 0.5 * F.softplus(-log_alpha).sum()


def eager_ard(log_alpha):
    return 0.5 * torch.log1p(torch.exp(-log_alpha)).sum()


def torch_ard(log_alpha):
    return 0.5 * F.softplus(-log_alpha).sum()


def eager_normal(weight, log_sigma2):
    return 0.5 * (log_sigma2.exp() + weight.square() - 1 - log_sigma2).sum()


def torch_normal(weight, log_sigma2):
    prior = Normal(0.0, 1.0, validate_args=False)
    return kl_divergence(Normal(weight, torch.exp(0.5 * log_sigma2), validate_args=False), prior).sum()


def eager_additive(log_sigma2, weight):
    """From an additive layer's parameters; the constant keeps the logarithm finite at a weight of 0."""
    return eager_log_uniform(log_sigma2 - torch.log(weight.square() + 1e-8))


def torch_additive(log_sigma2, weight):
    return torch_log_uniform(log_sigma2 - 2 * weight.abs().clamp(min=1e-4).log())


def additive_log_uniform(log_sigma2, weight):
    return kl_log_uniform(log_sigma2, weight=weight)


def _setup(shapes, providers):
    def setup(device: torch.device) -> Setup:
        draw = torch.Generator(device).manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, device=device, generator=draw) - 3) for shape in shapes]
        grads = [torch.empty_like(p) for p in parameters]

        def forward_and_backward():
            for parameter in parameters:
                parameter.detach().sum()
            for grad, parameter in zip(grads, parameters, strict=True):
                grad.copy_(parameter.detach())

        return Setup(inputs=tuple(parameters), providers=providers, floor=forward_and_backward)

    return setup


def _case(op, variant, shape, tensors, eager, library, ours, **extra) -> Case:
    """``tensors`` parameters of one shape: read by the forward and by the backward, gradients written once."""
    return Case(
        op=op,
        variant=variant,
        shape=shape,
        mode="full",
        setup=_setup(tensors * (shape,), {"eager": eager, "compiled": eager, "torch": library, "ours": ours}),
        bytes=12 * tensors * math.prod(shape),
        flops=0,
        **extra,
    )


def _sum_over(function):
    return lambda *tensors: sum(map(function, tensors))


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    on_gpu = device_type == "cuda"
    small, middle, large = ((3, 5),) * 3 if tiny else SHAPES[device_type]
    layers, layer = (3, (3, 2)) if tiny else LAYERS[device_type]
    # Ours writes slopes in the forward and reads them in the backward, instead of the parameters: 16 bytes where 12 are
    # counted. The target is for the bytes that move.
    goal = {"copy_target": GPU_COPY * 12 / 16} if on_gpu else {"targets": {1: 10.0, 2: 10.0}}
    also = goal if on_gpu else {}
    exact, approximate = kl_log_uniform, functools.partial(kl_log_uniform, exact=False)
    published = (eager_log_uniform, torch_log_uniform)
    many = (_sum_over(eager_log_uniform), _sum_over(torch_log_uniform), lambda *tensors: kl_log_uniform(list(tensors)))
    result = [
        _case("kl_log_uniform", "", middle, 1, *published, exact, headline=True, **goal),
        _case("kl_log_uniform", "", small, 1, *published, exact),
        _case("kl_log_uniform", "", large, 1, *published, exact),
        _case("kl_log_uniform", "approx", middle, 1, *published, approximate, headline=not on_gpu, **goal),
        _case("kl_log_uniform", f"{layers} of", layer, layers, *many, compiles=not on_gpu),
        _case("kl_log_uniform", "additive", middle, 2, eager_additive, torch_additive, additive_log_uniform, **also),
        _case("kl_ard", "", middle, 1, eager_ard, torch_ard, kl_ard, **also),
        _case("kl_normal", "", middle, 2, eager_normal, torch_normal, kl_normal, headline=on_gpu, **also),
    ]
    return result
