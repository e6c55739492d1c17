"""Triton kernels of ``lrt_linear_backward``.

One pass over [M, O] (``lrt_sample_triton.py``) draws the noise again and gives the gradient to var and the sums for
bias and log_alpha. With mean = a w^T and var = a2 s^T, (a, a2) = (x, x^2), (w, s) = (weight, sigma^2), there remain

    grad_a = grad w      grad_a2 = grad_var s      grad_w = grad^T a      grad_s = grad_var^T a2

and one step per operand pair from these to x, weight and scale. ``lrt_strategy.py`` chooses as in the forward pass: the
library's GEMMs and one elementwise pass per pair, or, at few rows, one dual-accumulator kernel per pair, which reads
the parameters and writes their gradients once.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt import lrt_linear_backward_reference
from losssurf_fast.ops.lrt_linear_triton import choose, contiguous, dot_precision
from losssurf_fast.ops.lrt_operand import operand_dtype
from losssurf_fast.ops.lrt_operand_triton import ELEMENTS, OUTPUT_ALPHA, operands, variance_operand
from losssurf_fast.ops.lrt_sample_triton import exact_exp, matrix_view, sample_backward_pass
from losssurf_fast.ops.lrt_strategy import Tile, parameter_tile

# ---- from output to operands ---------------------------------------------------------------------------------------


def parameter_gradients(weight, scale, parameterization, needed):
    """(dtype of weight's gradient, dtype of scale's by way of sigma^2, whether sigma^2's is needed); None for none."""
    weight_dtype = weight.dtype if needed[1] else None
    scale_dtype = scale.dtype if needed[2] and parameterization not in OUTPUT_ALPHA else None
    return weight_dtype, scale_dtype, scale_dtype is not None or (needed[1] and parameterization != "additive")


def output_gradients(grad, var, scale, seed, view, dtype, parameterization, needs_var, needed, has_bias, place):
    """Gradients to (var in ``dtype``, bias, scale of "layer" and "neuron"), None where not needed."""
    alpha = parameterization if parameterization in OUTPUT_ALPHA else "none"
    grad_var, grad_bias, grad_scale = sample_backward_pass(
        grad, var, scale, seed, view, dtype, torch.finfo(torch.float32).max, alpha, *place,
        needs_var=needs_var, needs_bias=needed[3] and has_bias,
        needs_alpha=needed[2] and alpha != "none",
    )  # fmt: skip
    if grad_scale is not None:
        grad_scale = (grad_scale.sum(0, keepdim=True) if alpha == "layer" else grad_scale).to(scale.dtype)
    return grad_var, grad_bias, grad_scale


# ---- from operands to x and parameters -----------------------------------------------------------------------------


@triton.jit
def _store_gradients(grad_cast, grad_sigma2, weight_ptr, scale_ptr, grad_weight_ptr, grad_scale_ptr, offs, mask):
    """Store gradients of (w, sigma^2)(weight, scale), where sigma^2 is weight^2, exp(scale) or their product."""
    if scale_ptr is not None:
        grad_sigma2 *= exact_exp(tl.load(scale_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    grad_weight = grad_cast
    grad_scale = grad_sigma2
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad_weight += 2.0 * weight * grad_sigma2
        grad_scale *= weight * weight
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + offs, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + offs, grad_scale.to(grad_scale_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _operands_backward_kernel(
    weight_ptr,  # [numel], or None where sigma^2 does not depend on it
    scale_ptr,  # [numel], or None
    grad_cast_ptr,  # [numel], or None for zero
    grad_sigma2_ptr,  # [numel]
    grad_weight_ptr,  # [numel] or None
    grad_scale_ptr,  # [numel] or None
    numel,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    grad_sigma2 = tl.load(grad_sigma2_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad_cast = tl.zeros((BLOCK,), tl.float32)
    if grad_cast_ptr is not None:
        grad_cast += tl.load(grad_cast_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    _store_gradients(grad_cast, grad_sigma2, weight_ptr, scale_ptr, grad_weight_ptr, grad_scale_ptr, offs, mask)


def _operands_backward(weight, scale, grad_cast, grad_sigma2, grad_weight_dtype, grad_scale_dtype):
    """Gradients to (weight, scale) from those to their operands; None where the dtype is None.

    All are dense and lie in memory alike.
    """
    grads = [
        None if dtype is None else torch.empty_like(grad_sigma2, dtype=dtype)
        for dtype in (grad_weight_dtype, grad_scale_dtype)
    ]
    with device_guard(grad_sigma2):
        _operands_backward_kernel[(triton.cdiv(grad_sigma2.numel(), ELEMENTS),)](
            weight, scale, grad_cast, grad_sigma2, *grads, grad_sigma2.numel(), BLOCK=ELEMENTS
        )
    return grads


def grad_x_of(x, through_mean, through_var):
    """Gradient to x from those to x and x^2."""
    return _operands_backward(x, None, through_mean, through_var, x.dtype, None)[0]


def grad_parameters_of(weight, scale, grad_weight, grad_sigma2, parameterization, weight_dtype, scale_dtype):
    """(grad_weight, grad_scale) from the gradients to w and sigma^2, in the dtypes given, None for none."""
    if grad_sigma2 is None:
        return grad_weight.to(weight_dtype), None
    if parameterization == "additive":  # sigma^2 does not depend on weight
        _, grad_scale = _operands_backward(None, scale, None, grad_sigma2, None, scale_dtype)
        return None if weight_dtype is None else grad_weight.to(weight_dtype), grad_scale
    if parameterization in OUTPUT_ALPHA:
        scale = None
    return _operands_backward(weight, scale, grad_weight, grad_sigma2, weight_dtype, scale_dtype)


# ---- library GEMMs -------------------------------------------------------------------------------------------------


def grad_input_gemms(grad, grad_var, x, weight, scale, parameterization):
    operand = operand_dtype(x.dtype)
    w, sigma2 = operands(weight, scale, parameterization, operand)
    through_mean = None if w is None else grad.to(operand) @ w
    return grad_x_of(x, through_mean, grad_var @ sigma2)


def grad_parameters_gemms(grad, grad_var, x, weight, scale, parameterization, weight_dtype, scale_dtype):
    """(grad_weight, grad_scale) in the dtypes given, None for none; ``grad_var`` is None where neither needs it."""
    operand = operand_dtype(x.dtype)
    a, a2 = operands(x, None, "layer", operand)
    grad_weight = None if weight_dtype is None else grad.to(operand).t() @ a
    grad_sigma2 = None if grad_var is None else grad_var.t() @ a2
    return grad_parameters_of(weight, scale, grad_weight, grad_sigma2, parameterization, weight_dtype, scale_dtype)


# ---- dual accumulators ---------------------------------------------------------------------------------------------


@triton.jit
def _grad_input_kernel(
    grad_ptr,  # [M, O]
    grad_var_ptr,  # [M, O] in the operands' dtype
    x_ptr,  # [M, I]
    weight_ptr,  # [O, I]; None for "variance"
    scale_ptr,  # [O, I]; None for "layer" and "neuron"
    grad_x_ptr,  # [M, I]
    M,
    O,  # noqa: E741
    I,  # noqa: E741
    PARAMETERIZATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of I
    BLOCK_K: tl.constexpr,  # of O
):
    OPERAND: tl.constexpr = grad_var_ptr.dtype.element_ty
    num_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tl.program_id(0) % num_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // num_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = (offs_n < I)[None, :]
    # Rows past the end read row 0: their results are not stored.
    grad_offs = tl.where(offs_m < M, offs_m, 0)[:, None] * O + offs_k[None, :]
    parameter_offs = offs_k.to(tl.int64)[:, None] * I + offs_n[None, :]  # [K, N]

    acc_mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_var = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(O > 0)
    for k in range(0, O, BLOCK_K):
        mask_k = offs_k < O - k
        weight = 0.0
        scale = 0.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + parameter_offs, mask=mask_k[:, None] & mask_n, other=0.0)
            grad = tl.load(grad_ptr + grad_offs, mask=mask_k[None, :], other=0.0)
            acc_mean = tl.dot(grad.to(OPERAND), weight.to(OPERAND), acc_mean, input_precision=PRECISION)
            weight = weight.to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + parameter_offs, mask=mask_k[:, None] & mask_n, other=0.0).to(tl.float32)
        grad_var = tl.load(grad_var_ptr + grad_offs, mask=mask_k[None, :], other=0.0)
        sigma2 = variance_operand(weight, scale, PARAMETERIZATION).to(OPERAND)
        acc_var = tl.dot(grad_var, sigma2, acc_var, input_precision=PRECISION)
        grad_offs += BLOCK_K
        parameter_offs += tl.full((), BLOCK_K, tl.int64) * I

    offs = offs_m[:, None] * I + offs_n[None, :]
    _store_gradients(acc_mean, acc_var, x_ptr, None, grad_x_ptr, None, offs, (offs_m < M)[:, None] & mask_n)


@triton.jit
def _grad_parameters_kernel(
    grad_ptr,  # [M, O]
    grad_var_ptr,  # [M, O] in the operands' dtype, or None
    x_ptr,  # [M, I]
    weight_ptr,  # [O, I], or None where sigma^2 does not depend on it
    scale_ptr,  # [O, I], or None
    grad_weight_ptr,  # [O, I] or None
    grad_scale_ptr,  # [O, I] or None
    M,
    O,  # noqa: E741
    I,  # noqa: E741
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of O
    BLOCK_N: tl.constexpr,  # of I
    BLOCK_K: tl.constexpr,  # of M
):
    num_n = tl.cdiv(I, BLOCK_N)
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (offs_m < O)[None, :], (offs_n < I)[None, :]

    # Gradients are accumulated transposed, x^T grad: wgmma takes its first operand, here x^2, from registers, and the
    # second only from shared memory, on whose way it would have to finish in every step.
    acc_weight = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_sigma2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tl.assume(M > 0)
    for k in range(0, M, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < M)[:, None]
        rows = offs_k.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * I + offs_n[None, :], mask=mask_k & mask_n, other=0.0)
        if grad_weight_ptr is not None:
            grad = tl.load(grad_ptr + rows * O + offs_m[None, :], mask=mask_k & mask_m, other=0.0)
            acc_weight = tl.dot(x.to(OPERAND).T, grad.to(OPERAND), acc_weight, input_precision=PRECISION)
        if grad_var_ptr is not None:
            grad_var = tl.load(grad_var_ptr + rows * O + offs_m[None, :], mask=mask_k & mask_m, other=0.0)
            x2 = (x.to(tl.float32) * x.to(tl.float32)).to(OPERAND)
            acc_sigma2 = tl.dot(x2.T, grad_var, acc_sigma2, input_precision=PRECISION)

    offs = offs_m[None, :] * I + offs_n[:, None]  # [N, M] like the accumulators
    mask = mask_m & (offs_n < I)[:, None]
    _store_gradients(acc_weight, acc_sigma2, weight_ptr, scale_ptr, grad_weight_ptr, grad_scale_ptr, offs, mask)


def grad_input_dual(grad, grad_var, x, weight, scale, parameterization, tile: Tile):
    grad_x = torch.empty_like(x)
    rows, in_features = x.shape
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(in_features, tile.block_n)
    with device_guard(x):
        _grad_input_kernel[(programs,)](
            grad, grad_var, x, weight, None if parameterization in OUTPUT_ALPHA else scale, grad_x,
            rows, grad.shape[1], in_features, PARAMETERIZATION=parameterization, PRECISION=dot_precision(x.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return grad_x


def grad_parameters_dual(grad, grad_var, x, weight, scale, parameterization, weight_dtype, scale_dtype, tile: Tile):
    """As :func:`grad_parameters_gemms`."""
    shape = (grad.shape[1], x.shape[1])
    grads = [
        None if dtype is None else torch.empty(shape, dtype=dtype, device=x.device)
        for dtype in (weight_dtype, scale_dtype)
    ]
    programs = triton.cdiv(shape[0], tile.block_m) * triton.cdiv(shape[1], tile.block_n)
    operand = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[operand_dtype(x.dtype)]
    with device_guard(x):
        _grad_parameters_kernel[(programs,)](
            grad, grad_var, x, None if parameterization == "additive" else weight,
            None if parameterization in OUTPUT_ALPHA else scale, *grads, x.shape[0], *shape, OPERAND=operand,
            PRECISION=dot_precision(x.dtype), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return grads


# ---- launcher ------------------------------------------------------------------------------------------------------


def lrt_linear_backward_triton(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, row_offset=0, col_offset=0, sample=0
):
    place = (row_offset, col_offset, sample)
    if x.dtype == torch.float64 or 0 in (*x.shape, var.shape[1]):
        return lrt_linear_backward_reference(
            grad, x, weight, scale, has_bias, var, seed, parameterization, needed, *place
        )
    grad, x, weight, scale, var = contiguous(grad, x, weight, scale, var)
    tile = choose(x, weight, scale, parameterization)
    return backward_passes(grad, x, weight, scale, has_bias, var, seed, parameterization, needed, place, tile)


def backward_passes(grad, x, weight, scale, has_bias, var, seed, parameterization, needed, place, tile: Tile | None):
    """Gradients by the dual-accumulator kernels in ``tile``, by library GEMMs without one; inputs contiguous."""
    weight_dtype, scale_dtype, needs_sigma2 = parameter_gradients(weight, scale, parameterization, needed)
    grad_var, grad_bias, grad_scale = output_gradients(
        grad, var, scale, seed, matrix_view(var), operand_dtype(x.dtype), parameterization, needed[0] or needs_sigma2,
        needed, has_bias, place,
    )  # fmt: skip
    grad_x = grad_weight = None
    inputs = (x, weight, scale, parameterization)
    if needed[0]:
        grad_x = (
            grad_input_gemms(grad, grad_var, *inputs)
            if tile is None
            else grad_input_dual(grad, grad_var, *inputs, tile)
        )
    if needed[1] or needs_sigma2:
        inputs = (grad, grad_var if needs_sigma2 else None, *inputs, weight_dtype, scale_dtype)
        if tile is None:
            grad_weight, found = grad_parameters_gemms(*inputs)
        else:
            grad_weight, found = grad_parameters_dual(*inputs, parameter_tile(x.shape[0], x.dtype))
        grad_scale = grad_scale if found is None else found
    return tuple(x.new_empty(0) if g is None else g for g in (grad_x, grad_weight, grad_scale, grad_bias))


attach("lrt_linear_backward", lrt_linear_backward_triton)
