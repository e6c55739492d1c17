"""Samples of curve_linear for its test files."""

import torch
from common import F32


def curve_inputs(shape=(17, 33, 63), dtype=F32, bend_dtype=None, bends=3, biases=0, per_row=False, seed=0):
    """(x, bends, coefficients, biases) of M, O, I = ``shape``; x and the bends are slices of wider tensors."""
    rows, out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)
    bend_dtype = bend_dtype or dtype
    x = draw(rows, in_features + 3).to(dtype)[:, 1 : in_features + 1]
    weights = [draw(out_features, in_features + 2).mul(0.3).to(bend_dtype)[:, 2:] for _ in range(bends)]
    wide = torch.promote_types(dtype, F32)
    coefficients = draw(rows, bends).to(wide) if per_row else draw(bends).to(wide)
    return x, weights, coefficients, [draw(out_features).to(bend_dtype) for _ in range(biases)]


def flatten(x, bends, coefficients, biases):
    return [x, *bends, coefficients, *biases]


def unflatten(flat, bends=3):
    x, *rest = flat
    return x, rest[:bends], rest[bends], rest[bends + 1 :]


def each(inputs, function, bends=3):
    """The inputs with ``function`` applied to every tensor."""
    return unflatten([function(t) for t in flatten(*inputs)], bends)


def everything(biases, bends=3, needed=True):
    """The flags of curve_linear_backward that ask for every gradient."""
    return needed, [needed] * bends, needed, [needed] * biases
