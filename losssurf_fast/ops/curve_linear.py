"""A linear layer whose weight lies on a curve, combined inside the product and never written to memory as a whole.

Formulas, with the coefficients c of ``ops/curve.py``::

    one t for all rows      w = sum_j c_j w_j,  b = sum_j c_j b_j           y = x w^T + b
    a t for each row        y_n = sum_j c_nj (x_n w_j^T + b_j)

The second draws one t per sample instead of one per batch: both estimate the expectation of the loss over t, the second
with less variance. A single bias b belongs to no bend and is added as it is.

Gradients, with g that of y and G = g^T x::

    one t       dx = g w                       dw_j = c_j G            dc_j = <G, w_j> + <sum_n g_n, b_j>
    per row     dx_n = sum_j c_nj (g_n w_j)    dw_j = (c_j g)^T x      dc_nj = <x_n, g_n w_j> + <g_n, b_j>

Letters: M rows of x (the product of its leading sizes), I input features, O output features, K bends, j their number.

Numerics: GEMM operands have x's dtype; the sum over j is taken in fp32 (fp64 for fp64) by fma in the order of j as in
``curve_weights`` and then rounded to the operands' dtype; products are accumulated in fp32. Where a kernel multiplies
half-precision operands in fp32, it rounds them not at all. Bends whose coefficient is 0 are not read (one t). Saved for
backward: the inputs, nothing else; backward combines the weight anew.

Floor for few rows: the K O I elements of the bends are read once, where synthesising the weight first writes and reads
O I more. Which of the two runs is chosen by rows, dtype and size: ``csrc/cpu/curve_linear.cpp`` has the rule, and
``curve_linear_triton.py`` that of GPUs. Backward reads the bends a second time, the price of saving no weight: with
many bends, or in half precision, a training step is often faster through ``curve_weights`` and ``F.linear``.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from losssurf_fast._library import (
    composite_needed,
    define,
    in_autocast_dtype,
    register_autograd,
    second_order,
    without_autocast,
)
from losssurf_fast.ops.averaging import as_tensors
from losssurf_fast.ops.curve import CURVE_DTYPES, curve_weights_reference
from losssurf_fast.ops.lrt_sample import check_companion
from losssurf_fast.ops.noise import fma

# ---- definition -----------------------------------------------------------------------------------------------------


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@without_autocast
def curve_linear_reference(x, bends, coefficients, biases) -> torch.Tensor:
    """y ``[M, O]`` for x ``[M, I]``, K bends ``[O, I]``, coefficients ``[K]`` or ``[M, K]`` and no, one or K biases."""
    wide = wide_dtype(x)
    c = coefficients.to(wide)
    if coefficients.dim() == 1:
        y = F.linear(x, combined(x, bends, coefficients)).to(wide)
    else:
        y = None
        for bend, cj in zip(bends, c.unbind(1), strict=True):
            product = F.linear(x, bend.to(x.dtype)).to(wide)
            y = product * cj[:, None] if y is None else fma(product, cj[:, None], y)
    if len(biases) == 1:
        y = y + biases[0].to(wide)
    elif biases:
        y = y + c @ torch.stack([b.to(wide) for b in biases])
    return y.to(x.dtype)


def combined(x, bends, coefficients) -> torch.Tensor:
    """The weight ``[O, I]`` as GEMM operand, for coefficients ``[K]``."""
    wide = wide_dtype(x)
    return curve_weights_reference([bend.to(wide) for bend in bends], coefficients)[0].to(x.dtype)


def curve_linear_backward_reference(
    grad, x, bends, coefficients, biases, need_x, need_bends, need_coefficients, need_biases
) -> list[torch.Tensor]:
    """Gradients to x, to the bends, to the coefficients and to the biases, in this order; those needed alone."""
    wide, per_row = wide_dtype(x), coefficients.dim() == 2
    g, c, result = grad.to(wide), coefficients.to(wide), []
    pulled = []  # g w_j [M, I]
    if per_row and (need_x or need_coefficients):
        pulled = [(grad @ bend.to(x.dtype)).to(wide) for bend in bends]
    if need_x and per_row:
        result.append(sum(p * cj[:, None] for p, cj in zip(pulled, c.unbind(1), strict=True)).to(x.dtype))
    elif need_x:
        result.append(grad @ combined(x, bends, coefficients))
    outer = None  # G [O, I]
    if not per_row and (any(need_bends) or need_coefficients):
        outer = (grad.t() @ x).to(wide)
    for j, bend in enumerate(bends):
        if need_bends[j]:
            dw = (g * c[:, j, None]).to(x.dtype).t() @ x if per_row else outer * c[j]
            result.append(dw.to(bend.dtype))
    totals = g.sum(0)  # [O]
    if need_coefficients:
        if per_row:
            dc = torch.stack([(p * x.to(wide)).sum(1, dtype=torch.float64) for p in pulled], dim=1)
        else:
            dc = torch.stack([(outer * bend.to(wide)).sum(dtype=torch.float64) for bend in bends])
        if len(biases) > 1:
            stacked = torch.stack([b.double() for b in biases], dim=1)  # [O, K]
            dc = dc + (g if per_row else totals).double() @ stacked
        result.append(dc.to(coefficients.dtype))
    for j, bias in enumerate(biases):
        if need_biases[j]:
            db = totals
            if len(biases) > 1:
                db = c[:, j] @ g if per_row else totals * c[j]
            result.append(db.to(bias.dtype))
    return result


# ---- operators ------------------------------------------------------------------------------------------------------


def _curve_linear_fake(x, bends, coefficients, biases):
    return x.new_empty((x.shape[0], bends[0].shape[0]))


def _curve_linear_backward_fake(
    grad, x, bends, coefficients, biases, need_x, need_bends, need_coefficients, need_biases
):
    tensors, needed = [x, *bends, coefficients, *biases], [need_x, *need_bends, need_coefficients, *need_biases]
    return [t.new_empty(t.shape) for t, need in zip(tensors, needed, strict=True) if need]


define(
    "curve_linear(Tensor x, Tensor[] bends, Tensor coefficients, Tensor[] biases) -> Tensor",
    reference=curve_linear_reference,
    fake=_curve_linear_fake,
)
define(
    "curve_linear_backward(Tensor grad, Tensor x, Tensor[] bends, Tensor coefficients, Tensor[] biases, bool need_x, "
    "bool[] need_bends, bool need_coefficients, bool[] need_biases) -> Tensor[]",
    reference=curve_linear_backward_reference,
    fake=_curve_linear_backward_fake,
)


def _flatten(x, bends, coefficients, biases) -> list:
    return [x, *bends, coefficients, *biases]


def _unflatten(flat, count):
    """The inverse of :func:`_flatten` for ``count`` bends."""
    x, *rest = flat
    return x, rest[:count], rest[count], rest[count + 1 :]


def _curve_linear_setup(ctx, inputs, output):
    ctx.save_for_backward(*_flatten(*inputs))
    ctx.count = len(inputs[1])


def _curve_linear_autograd(ctx, grad):
    arguments = _unflatten(ctx.saved_tensors, ctx.count)
    need_x, need_bends, need_coefficients, need_biases = ctx.needs_input_grad
    need_bends, need_biases = [bool(n) for n in need_bends], [bool(n) for n in need_biases]
    op = torch.ops.losssurf_fast.curve_linear_backward.default
    needed = _flatten(bool(need_x), need_bends, bool(need_coefficients), need_biases)
    found = iter(op(grad, *arguments, need_x, need_bends, need_coefficients, need_biases))
    return _unflatten([next(found) if need else None for need in needed], ctx.count)


register_autograd("curve_linear", _curve_linear_autograd, _curve_linear_setup)


def _curve_linear_backward_setup(ctx, inputs, output):
    grad, x, bends, coefficients, biases, *needed = inputs
    ctx.save_for_backward(grad, *_flatten(x, bends, coefficients, biases))
    ctx.count, ctx.needed = len(bends), _flatten(*needed)


def _curve_linear_backward_autograd(ctx, outgoing):
    grad, *inputs = ctx.saved_tensors
    outgoing = iter(outgoing)
    outgoing = [next(outgoing) if need else None for need in ctx.needed]
    formula = lambda *flat: curve_linear_reference(*_unflatten(flat, ctx.count))
    grad_grad, *grads = second_order(formula, inputs, grad, outgoing)
    grad_x, grad_bends, grad_coefficients, grad_biases = _unflatten(grads, ctx.count)
    # What was needed has no gradient; torch takes an empty list of bools for one of tensors.
    needless = None, None, None, None if grad_biases else []
    return grad_grad, grad_x, grad_bends, grad_coefficients, grad_biases, *needless


register_autograd("curve_linear_backward", _curve_linear_backward_autograd, _curve_linear_backward_setup)

# ---- public function ------------------------------------------------------------------------------------------------


def check_curve_linear(caller: str, x, bends, coefficients, biases) -> None:
    """Refuse what the operator cannot take; ``biases`` is a list of none, one or K."""
    for j, bend in enumerate(bends):
        check_companion(caller, f"bends[{j}]", bend, "x", x)
        if bend.dim() != 2:
            raise ValueError(f"{caller}: bends[{j}] must be [out_features, in_features], got {tuple(bend.shape)}")
        if bend.shape != bends[0].shape:
            shapes = f"{tuple(bends[0].shape)} of bends[0], got {tuple(bend.shape)}"
            raise ValueError(f"{caller}: bends[{j}] must have the shape {shapes}")
        if bend.dtype != bends[0].dtype:
            raise TypeError(f"{caller}: bends[{j}] must be {bends[0].dtype} as bends[0], got {bend.dtype}")
    out_features, in_features = bends[0].shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"{caller}: x must be [..., {in_features}] for bends {tuple(bends[0].shape)}, got {tuple(x.shape)}"
        )
    for j, bias in enumerate(biases):
        name = "bias" if len(biases) == 1 else f"bias[{j}]"
        check_companion(caller, name, bias, "x", x)
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"{caller}: {name} must be ({out_features},), got {tuple(bias.shape)}")
    if not isinstance(coefficients, torch.Tensor):
        raise TypeError(f"{caller}: coefficients must be a tensor, got {type(coefficients).__name__}")
    if coefficients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{caller}: coefficients must be float32 or float64, got {coefficients.dtype}")
    if coefficients.device != x.device:
        raise ValueError(f"{caller}: coefficients must be on x's device {x.device}, got {coefficients.device}")
    shared, per_row = (len(bends),), (*x.shape[:-1], len(bends))
    if tuple(coefficients.shape) not in (shared, per_row):
        raise ValueError(
            f"{caller}: coefficients must be {shared} for all rows or {per_row} for each, "
            f"got {tuple(coefficients.shape)}"
        )


def curve_linear(
    x: torch.Tensor,
    bends: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """``F.linear(x, sum_j c_j bends[j], sum_j c_j bias[j])`` without that weight in memory; for small batches.

    Args:
        x: ``[..., I]`` in float64, float32, bfloat16 or float16 (under autocast: cast to its dtype).
        bends: K >= 2 tensors ``[O, I]`` in x's dtype, or float32 beside half-precision x; all in one dtype.
        coefficients: ``[K]`` for all rows, or ``[*x.shape[:-1], K]``, a point of the curve for each row; float32 or
            float64, from :func:`curve_coefficients` or any others. (A vector x has one row and coefficients ``[K]``.)
        bias: None, one tensor ``[O]`` that is added as it is, or K of them ``[O]`` that are combined like the bends; in
            the dtypes that bends may have.

    Returns:
        ``[..., O]`` in x's dtype. Gradients flow to x, to every bend and bias and to the coefficients.

    Raises:
        TypeError, ValueError: a list, dtype, shape or device is not as above.
    """
    name = "curve_linear"
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in CURVE_DTYPES:
        raise TypeError(f"{name}: x must have one of the dtypes {CURVE_DTYPES}, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name}: x must be [..., in_features], got a 0-d tensor")
    bends = as_tensors(name, "bends", bends)
    if len(bends) < 2:
        raise ValueError(f"{name}: bends must be at least 2, the two ends of the curve, got {len(bends)}")
    if bias is None or isinstance(bias, torch.Tensor):
        biases = [] if bias is None else [bias]
    else:
        biases = as_tensors(name, "bias", bias)
        if len(biases) != len(bends):
            raise ValueError(f"{name}: bias must be one tensor or {len(bends)}, one for each bend, got {len(biases)}")
    x = in_autocast_dtype(x)
    check_curve_linear(name, x, bends, coefficients, biases)
    lead, rows = x.shape[:-1], math.prod(x.shape[:-1])
    if x.dim() > 1 and coefficients.dim() == x.dim():
        coefficients = coefficients.reshape(rows, len(bends))
    formula = curve_linear_reference if composite_needed() else torch.ops.losssurf_fast.curve_linear.default
    y = formula(x.reshape(rows, x.shape[-1]), bends, coefficients, biases)
    return y if x.dim() == 2 else y.view(*lead, y.shape[-1])
