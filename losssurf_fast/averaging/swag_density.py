"""The log-density of SWAG's Gaussian, N(mean, scale (V + D^T D / (r - 1))), V = max(m2 / n, floor) on a diagonal.

With delta = weights - mean, N elements, and M = I + D V^-1 D^T / (r - 1), which is r x r (Woodbury)::

    logdet   = N log scale + sum log V + logdet M
    quadratic = delta V^-1 delta / scale - b^T M^-1 b,       b = D V^-1 delta / sqrt(scale (r - 1))
    log_prob = -(N log 2 pi + logdet + quadratic) / 2

With ``block`` every parameter has a Gaussian of its own. Everything that runs over the weights is a sum, so chunks and
ranks add up; in float64, because the two terms of the quadratic form cancel along the deviations.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from losssurf_fast.averaging.mesh import all_reduce_, is_first_copy
from losssurf_fast.averaging.tensors import local, match, named_parameters

CHUNK = 2**16  # elements of a parameter that are widened at a time


def log_prob(swag, weights, scale: float, cov: bool, block: bool, var_floor: float) -> torch.Tensor:
    if weights is None:
        if not swag._drawn:
            raise RuntimeError("log_prob: nothing has been drawn into module; pass weights")
        weights = swag.module
    if isinstance(weights, nn.Module):
        weights = named_parameters(weights)
    elif isinstance(weights, Mapping):
        weights = {name: w for name, w in weights.items() if name not in swag._collected_buffers}
    else:
        raise TypeError(f"log_prob: weights must be a module or tensors by name, got {type(weights).__name__}")
    values = match("log_prob", swag._mean, weights)
    return density("log_prob", swag, [local(w) for w in values], scale, cov, block, var_floor)


@torch.no_grad()
def density(caller: str, swag, values, scale: float, cov: bool, block: bool, var_floor: float) -> torch.Tensor:
    """``log_prob`` of ``values``, this rank's parts of the weights; ``logdet`` where they are None."""
    swag._refuse_empty(caller)
    for argument, value in (("scale", scale), ("var_floor", var_floor)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{caller}: {argument} must be a number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{caller}: {argument} must be positive and finite, got {value}")
    for argument, value in (("cov", cov), ("block", block)):
        if not isinstance(value, bool):
            raise TypeError(f"{caller}: {argument} must be a bool, got {type(value).__name__}")
    mean, m2, deviations = swag._local_state()
    held = min(swag.n_models, swag.max_num_models) if cov and deviations else 0
    held = held if held > 1 else 0
    if not mean:
        return torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(len(mean), held * held + held + 2, dtype=torch.float64, device=mean[0].device)
    for i, whole in enumerate(swag.averages().values()):
        if is_first_copy(whole, swag._mesh):
            w = mean[i] if values is None else values[i].to(mean[i].device)
            columns = deviations[i][:held] if held else mean[i].new_empty(0, mean[i].numel())
            sums[i] = _sums(mean[i], m2[i], columns, w, swag.n_models, var_floor).to(sums.device)
    if swag._mesh is not None:
        all_reduce_(sums, swag._mesh)
    sizes = torch.tensor([t.numel() for t in swag.averages().values()], dtype=torch.float64, device=sums.device)
    if not block:
        sums, sizes = sums.sum(0, keepdim=True), sizes.sum(0, keepdim=True)
    gram, projected, square, log_var = sums.split([held * held, held, 1, 1], dim=1)
    rank = max(held - 1, 1)
    inner = torch.eye(held, dtype=gram.dtype, device=gram.device) + gram.view(len(gram), held, held) / rank
    root = torch.linalg.cholesky(inner)
    logdet = sizes * math.log(scale) + log_var[:, 0] + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if values is None:
        return logdet.sum()
    b = projected.unsqueeze(-1) / math.sqrt(scale * rank)
    solved = torch.linalg.solve_triangular(root, b, upper=False)
    quadratic = square[:, 0] / scale - solved.square().sum((1, 2))
    return -(sizes * math.log(2 * math.pi) + logdet + quadratic).sum() / 2


def _sums(mean, m2, columns, value, n: int, var_floor: float) -> torch.Tensor:
    """D V^-1 D^T, D V^-1 delta, delta V^-1 delta and sum log V of one parameter's part, as one vector."""
    mean, m2, value = (t.reshape(-1) for t in (mean, m2, value))
    r = len(columns)
    total = torch.zeros(r * r + r + 2, dtype=torch.float64, device=mean.device)
    for start in range(0, mean.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        var = (m2[part].double() / n).clamp_(min=var_floor)
        delta = value[part].double() - mean[part].double()
        d = columns[:, part].double()
        scaled = d / var
        terms = scaled @ d.T, scaled @ delta, (delta.square() / var).sum(), var.log_().sum()
        total += torch.cat([t.reshape(-1) for t in terms])
    return total
