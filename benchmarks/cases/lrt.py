"""The linear layer with local reparameterization against the formula a user writes."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases import Case, Setup, dtype_of
from benchmarks.gemm import fastest_products
from losssurf_fast.ops.lrt import lrt_linear

SHAPES = ((32, 10, 500), (64, 512, 784), (128, 1024, 1024), (512, 4096, 1024))  # (M, N, K): batch, outputs, inputs
TINY = (4, 3, 5)


def eager_lrt_linear(x, weight, scale, bias, parameterization: str) -> torch.Tensor:
    """The published formula with torch's noise; lrt_linear_reference draws its noise from the kernel under test."""
    sigma2 = scale.exp()
    if weight is not None:
        mean = F.linear(x, weight, bias)
        if parameterization != "additive":
            sigma2 = (sigma2.unsqueeze(1) if parameterization == "neuron" else sigma2) * weight.square()
    else:
        mean = bias
    var = F.linear(x.square(), sigma2)
    return mean + torch.sqrt(var + 1e-16) * torch.randn_like(var)


def inputs(shape, dtype: torch.dtype, parameterization: str, device) -> tuple:
    """(x, weight, scale, bias): activations in ``dtype``, parameters in fp32, all differentiated."""
    m, n, k = shape
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(m, k, device=device, generator=draw).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(n, k, device=device, generator=draw) / math.sqrt(k))
    scale_shape = {"layer": (1,), "neuron": (n,)}.get(parameterization, (n, k))
    scale = nn.Parameter(torch.randn(scale_shape, device=device, generator=draw) * 0.1 - 5)
    bias = nn.Parameter(torch.zeros(n, device=device))
    return x, None if parameterization == "variance" else weight, scale, bias


def products(x, matrix, shape, mode: str, streams: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of the GEMMs that each stream (mean and var, or var alone) needs, in x's dtype."""
    x, matrix = x.detach(), matrix.detach().to(x.dtype)
    grad = torch.randn(shape[0], shape[1], device=x.device).to(x.dtype)
    forward, backward = [(x, matrix.t())], [(grad, matrix), (grad.t(), x)]
    return streams * {"forward": forward, "backward": backward, "full": forward + backward}[mode]


def traffic(shape, itemsize: int, parameterization: str, mode: str) -> int:
    """Bytes that must be read and written: backward reads grad, var and the inputs and writes their gradients."""
    m, n, k = shape
    scale = {"layer": 1, "neuron": n}.get(parameterization, n * k)
    parameters = 4 * (scale + n + (0 if parameterization == "variance" else n * k))
    forward = itemsize * (m * k + m * n) + parameters
    backward = itemsize * (2 * m * k + 2 * m * n) + 2 * parameters
    return {"forward": forward, "backward": backward, "full": forward + backward}[mode]


def _setup(shape, dtype: torch.dtype, parameterization: str, mode: str):
    def setup(device: torch.device) -> Setup:
        tensors = inputs(shape, dtype, parameterization, device)
        x, weight, scale, _ = tensors

        def eager(x, weight, scale, bias):
            return eager_lrt_linear(x, weight, scale, bias, parameterization)

        if dtype != torch.float32:
            eager = torch.autocast(device.type, dtype)(eager)

        def ours(x, weight, scale, bias):
            return lrt_linear(x, weight, scale, bias, parameterization=parameterization)

        streams = 1 if weight is None else 2
        gemms = products(x, scale if weight is None else weight, shape, mode, streams)
        return Setup(
            inputs=tensors,
            providers={"eager": eager, "compiled": eager, "ours": ours},
            floor=fastest_products(gemms),
        )

    return setup


def _case(shape, mode="full", parameterization="additive", dtype="fp32", **extra) -> Case:
    gemms = (1 if parameterization == "variance" else 2) * {"forward": 1, "backward": 2, "full": 3}[mode]
    return Case(
        op="lrt_linear",
        shape=shape,
        mode=mode,
        variant=parameterization,
        dtype=dtype,
        setup=_setup(shape, dtype_of(dtype), parameterization, mode),
        bytes=traffic(shape, dtype_of(dtype).itemsize, parameterization, mode),
        flops=2 * gemms * math.prod(shape),
        **extra,
    )


def _both(target: float) -> dict[int, float]:
    return {1: target, 2: target}


def cases(tiny: bool = False) -> list[Case]:
    smallest, small, middle, large = (TINY,) * 4 if tiny else SHAPES
    result = [
        _case(smallest, targets=_both(1.2), headline=True),
        _case(small, targets=_both(2.0), headline=True),
        _case(middle, targets=_both(2.0), headline=True),
        _case(large, targets=_both(2.0), saved_target=0.3, headline=True),
        *(_case(shape, "forward", targets=_both(1.0)) for shape in (smallest, small, middle, large)),
        _case(middle, "backward", targets=_both(1.0)),
        _case(small, dtype="bf16", targets=_both(1.8)),
        _case(middle, dtype="bf16", targets=_both(1.4), headline=True),
        _case(large, dtype="bf16", targets=_both(1.1)),
        _case(middle, parameterization="variance", targets=_both(1.8), headline=True),
        *(_case(middle, parameterization=p, targets=_both(1.0)) for p in ("layer", "neuron", "weight")),
    ]
    return list({case.key: case for case in result}.values())  # tiny shapes coincide
