"""A linear layer on a curve at few rows, against synthesising its weight first."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases import Case, Setup, dtype_of
from losssurf_fast.ops import curve_coefficients, curve_linear, curve_weights

T = 0.3
LARGE, MIDDLE, SMALL = (4096, 4096), (1024, 4096), (512, 512)  # (O, I)
TINY = (3, 5)


def inputs(shape, dtype: torch.dtype, num_bends: int, device) -> tuple:
    """(x, bends, coefficients), everything in ``dtype``; the inner bends and x are differentiated."""
    rows, out_features, in_features = shape
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, in_features, device=device, generator=draw).to(dtype).requires_grad_()
    bends = []
    for j in range(num_bends):
        value = torch.randn(out_features, in_features, device=device, generator=draw) / math.sqrt(in_features)
        bends.append(nn.Parameter(value.to(dtype), requires_grad=0 < j < num_bends - 1))
    return x, bends, curve_coefficients(torch.tensor(T, device=device), num_bends)


def _setup(shape, dtype: torch.dtype, num_bends: int):
    def setup(device: torch.device) -> Setup:
        x, bends, coefficients = inputs(shape, dtype, num_bends, device)
        numbers = coefficients.tolist()

        def eager(x, *bends):
            return F.linear(x, sum(c * bend for c, bend in zip(numbers, bends, strict=True)))

        def synthesised(x, *bends):
            """The strongest way without our operator: our other one, which makes the weight in one pass."""
            return F.linear(x, curve_weights([[bend] for bend in bends], coefficients)[0])

        def ours(x, *bends):
            return curve_linear(x, bends, coefficients)

        def read():
            for bend in bends:
                bend.detach().sum()

        providers = {"eager": eager, "compiled": eager, "torch": synthesised, "ours": ours}
        return Setup((x, *bends), providers, read)

    return setup


def traffic(shape, itemsize: int, num_bends: int, mode: str) -> int:
    """Bytes that must be read and written: backward reads the bends anew and writes the gradients of the inner ones."""
    rows, out_features, in_features = shape
    weight, activations = out_features * in_features, rows * (in_features + out_features)
    forward = num_bends * weight + activations
    full = forward + (num_bends + num_bends - 2) * weight + 2 * activations
    return itemsize * (forward if mode == "forward" else full)


def _case(rows, weight, mode="forward", num_bends=3, dtype="fp32", **extra) -> Case:
    shape = (rows, *weight)
    return Case(
        op="curve_linear",
        variant=f"{num_bends} bends",
        shape=shape,
        mode=mode,
        dtype=dtype,
        setup=_setup(shape, dtype_of(dtype), num_bends),
        bytes=traffic(shape, dtype_of(dtype).itemsize, num_bends, mode),
        flops=2 * math.prod(shape) * (1 if mode == "forward" else 3),
        **extra,
    )


def gpu_cases(tiny: bool = False) -> list[Case]:
    weight = TINY if tiny else LARGE
    return [
        *(_case(rows, weight, dtype="bf16", headline=rows in (16, 64)) for rows in (16, 64, 256, 2048)),
        *(_case(rows, weight, "full", dtype="bf16", headline=rows == 64) for rows in (64, 2048)),
        _case(64, weight),
        _case(64, weight, num_bends=5, dtype="bf16"),
    ]


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    if device_type == "cuda":
        return gpu_cases(tiny)
    large, middle, small = (TINY,) * 3 if tiny else (LARGE, MIDDLE, SMALL)
    goal = {"targets": {1: 1.3}}
    result = [
        *(_case(rows, large, headline=rows in (1, 64), **goal) for rows in (1, 16, 32, 64)),
        *(_case(rows, middle, headline=rows == 16, **goal) for rows in (1, 16, 64)),
        *(_case(rows, small, headline=rows == 16, **goal) for rows in (1, 16, 64)),
        *(_case(rows, large, "full") for rows in (1, 16, 64)),
        *(_case(rows, middle, "full") for rows in (16, 64)),
        *(_case(16, shape, mode, num_bends=5) for shape in (middle, small) for mode in ("forward", "full")),
        *(_case(rows, middle, mode, dtype="bf16") for rows in (1, 16, 64) for mode in ("forward", "full")),
        _case(256, middle),
    ]
    return result
