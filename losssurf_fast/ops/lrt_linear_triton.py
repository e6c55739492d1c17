"""Triton kernels of ``lrt_linear``: GEMM operands and their gradients, and the dual-accumulator kernel.

Forward: ``ops/lrt_strategy.py`` chooses between two library GEMMs and the dual kernel. Backward: one pass over [M, O]
(``lrt_sample_triton.py``) draws the noise again, library GEMMs follow, and one pass per operand turns the gradients to
(a, a^2) or (weight, sigma^2) into those of x or of the parameters.

GEMM operands have ``operand_dtype``: x's, but fp32 where x is fp16, whose range the squares leave in both directions.
bf16 would keep the range and lose three bits that fp16 users have; TF32 has fp16's mantissa and fp32's range, so
the dual kernel multiplies fp16 inputs in TF32, and library GEMMs do where
``torch.backends.cuda.matmul.fp32_precision`` or ``torch.set_float32_matmul_precision`` allows it.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt import lrt_linear_backward_reference, lrt_linear_reference, operand_dtype
from losssurf_fast.ops.lrt_sample_triton import (
    _EPSILON,
    exact_exp,
    nonnegative,
    output_alpha,
    sample_backward_pass,
    sample_pass,
)
from losssurf_fast.ops.lrt_strategy import Tile, dual_tile, linear_strategy
from losssurf_fast.ops.noise_triton import EXACT, PLACE_ARGUMENTS, tile_normals

OUTPUT_ALPHA = ("layer", "neuron")  # alpha is applied to var in output space
ELEMENTS = 1024  # of an operand, per program

# ---- operands ------------------------------------------------------------------------------------------------------


@triton.jit
def variance_operand(weight, scale, PARAMETERIZATION: tl.constexpr):
    """sigma^2 without output alpha, fp32, of fp32 tiles; the square of ``weight`` alone serves x^2 too."""
    if PARAMETERIZATION == "layer" or PARAMETERIZATION == "neuron":
        sigma2 = weight * weight
    elif PARAMETERIZATION == "weight":
        sigma2 = exact_exp(scale) * weight * weight
    else:
        sigma2 = exact_exp(scale)
    return sigma2


@triton.jit
def _operands_kernel(
    weight_ptr,  # [numel]; None for "variance"
    scale_ptr,  # [numel]; None for "layer" and "neuron"
    cast_ptr,  # [numel] or None: weight in the GEMM's dtype
    sigma2_ptr,  # [numel]
    numel,
    PARAMETERIZATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    weight = 0.0
    scale = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs, mask=mask).to(tl.float32)
    if cast_ptr is not None:
        tl.store(cast_ptr + offs, weight.to(cast_ptr.dtype.element_ty), mask=mask)
    sigma2 = variance_operand(weight, scale, PARAMETERIZATION)
    tl.store(sigma2_ptr + offs, sigma2.to(sigma2_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _operands_backward_kernel(
    weight_ptr,  # [numel]; None where neither gradient needs it
    scale_ptr,  # [numel]; None for "layer" and "neuron"
    grad_cast_ptr,  # [numel] gradient to the weight operand; None for zero
    grad_sigma2_ptr,  # [numel]
    grad_weight_ptr,  # [numel] or None
    grad_scale_ptr,  # [numel] or None
    numel,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    grad_sigma2 = tl.load(grad_sigma2_ptr + offs, mask=mask).to(tl.float32)
    if scale_ptr is not None:
        grad_sigma2 *= exact_exp(tl.load(scale_ptr + offs, mask=mask).to(tl.float32))
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)
    if grad_scale_ptr is not None:  # sigma^2 = exp(scale) weight^2 or exp(scale)
        grad_scale = grad_sigma2 * weight * weight
        tl.store(grad_scale_ptr + offs, grad_scale.to(grad_scale_ptr.dtype.element_ty), mask=mask)
    if grad_weight_ptr is not None:
        grad_weight = 2.0 * weight * grad_sigma2
        if grad_cast_ptr is not None:
            grad_weight += tl.load(grad_cast_ptr + offs, mask=mask).to(tl.float32)
        tl.store(grad_weight_ptr + offs, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)


def _operands(weight, scale, parameterization, dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(weight, sigma^2) in ``dtype`` from one pass over the parameters; of (x, None, "layer") the pair (x, x^2)."""
    shape = (scale if weight is None else weight).shape
    sigma2 = torch.empty(shape, dtype=dtype, device=(scale if weight is None else weight).device)
    cast = weight if weight is None or weight.dtype == dtype else torch.empty_like(sigma2)
    if sigma2.numel() > 0:
        with device_guard(sigma2):
            _operands_kernel[(triton.cdiv(sigma2.numel(), ELEMENTS),)](
                weight,
                None if parameterization in OUTPUT_ALPHA else scale,
                None if cast is weight else cast,
                sigma2,
                sigma2.numel(),
                PARAMETERIZATION=parameterization,
                BLOCK=ELEMENTS,
            )
    return cast, sigma2


def _operands_backward(weight, scale, grad_cast, grad_sigma2, grad_weight_dtype, grad_scale_dtype):
    """Gradients to (weight, scale) from those to their operands; None where the dtype is None."""
    grads = [
        None if dtype is None else torch.empty(grad_sigma2.shape, dtype=dtype, device=grad_sigma2.device)
        for dtype in (grad_weight_dtype, grad_scale_dtype)
    ]
    with device_guard(grad_sigma2):
        _operands_backward_kernel[(triton.cdiv(grad_sigma2.numel(), ELEMENTS),)](
            weight, scale, grad_cast, grad_sigma2, *grads, grad_sigma2.numel(), BLOCK=ELEMENTS
        )
    return grads


# ---- dual accumulators ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)
def _lrt_linear_kernel(
    x_ptr,  # [M, I]
    weight_ptr,  # [O, I]; None for "variance"
    scale_ptr,  # [1], [O] or [O, I]
    bias_ptr,  # [O] or None
    seed_ptr,
    y_ptr,  # [M, O]
    var_ptr,  # [M, O] in the operands' dtype
    M,
    O,  # noqa: E741
    I,  # noqa: E741
    row_offset,
    first_quad,
    sample,
    PARAMETERIZATION: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 dots
    SHIFT: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides I
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    OPERAND: tl.constexpr = var_ptr.dtype.element_ty
    SCALE_TILE: tl.constexpr = PARAMETERIZATION != "layer" and PARAMETERIZATION != "neuron"
    # Row blocks of the same columns run side by side, so that the parameters are read from memory once.
    num_m = tl.cdiv(M, BLOCK_M)
    start_n = (tl.program_id(0) // num_m).to(tl.int64) * BLOCK_N
    offs_m = (tl.program_id(0) % num_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N) - SHIFT
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the ends read row 0: their results are not stored.
    x_ptrs = x_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * I + offs_k[None, :]
    parameter_offs = tl.where((offs_n >= 0) & (offs_n < O), offs_n, 0)[:, None] * I + offs_k[None, :]  # [N, K]

    acc_mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_var = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # ptxas makes each wgmma wait for the one before where a loop may run zero times, or where the dot whose operands
    # are all in shared memory comes second (C7515, C7514).
    tl.assume(I > 0)
    for k in range(0, I, BLOCK_K):
        weight = 0.0
        scale = 0.0
        if EVEN_K:
            x = tl.load(x_ptrs)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + parameter_offs)
            if SCALE_TILE:
                scale = tl.load(scale_ptr + parameter_offs)
        else:  # zeros in x, so the variance of what is read past the end does not count
            mask_k = (offs_k < I - k)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + parameter_offs, mask=mask_k, other=0.0)
            if SCALE_TILE:
                scale = tl.load(scale_ptr + parameter_offs, mask=mask_k, other=0.0)
        if weight_ptr is not None:
            operand = weight.to(OPERAND)
            acc_mean = tl.dot(x.to(OPERAND), operand.T, acc_mean, input_precision=PRECISION)
            weight = weight.to(tl.float32)
        if SCALE_TILE:
            scale = scale.to(tl.float32)
        sigma2 = variance_operand(weight, scale, PARAMETERIZATION).to(OPERAND)
        x2 = (x.to(tl.float32) * x.to(tl.float32)).to(OPERAND)
        acc_var = tl.dot(x2, sigma2.T, acc_var, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        parameter_offs += BLOCK_K

    mask_n = (offs_n >= 0) & (offs_n < O)
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * O + offs_n[None, :]
    tl.store(var_ptr + offs, acc_var.to(OPERAND), mask=mask)
    eps = tile_normals(seed_ptr, offs_m, start_n, row_offset, first_quad, sample, BLOCK_N)
    alpha = output_alpha(scale_ptr, offs_n, mask_n, PARAMETERIZATION)
    y = acc_mean + tl.sqrt(nonnegative(acc_var * alpha) + _EPSILON) * eps
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launchers -----------------------------------------------------------------------------------------------------


def dot_precision(dtype: torch.dtype) -> str:
    """Tensor-core precision of fp32 operands that stand for inputs of ``dtype``."""
    if dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"  # fp32 accuracy from three products


def linear_dual(
    x, weight, scale, bias, seed, parameterization, row_offset, col_offset, sample, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, var) by the dual-accumulator kernel; the inputs must be contiguous and none of M, O, I 0."""
    rows, in_features = x.shape
    out_features = (scale if weight is None else weight).shape[0]
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    var = torch.empty_like(y, dtype=operand_dtype(x.dtype))
    first_quad, shift = divmod(col_offset, 4)
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(out_features + shift, tile.block_n)
    with device_guard(x):
        _lrt_linear_kernel[(programs,)](
            x, weight, scale, bias, seed, y, var, rows, out_features, in_features, row_offset, first_quad, sample,
            PARAMETERIZATION=parameterization, PRECISION=dot_precision(x.dtype), SHIFT=shift,
            EVEN_K=in_features % tile.block_k == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
            **EXACT,
        )  # fmt: skip
    return y, var


def linear_two_gemms(
    x, weight, scale, bias, seed, parameterization, row_offset, col_offset, sample
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, var) by two library GEMMs and one fused pass; the inputs must be contiguous."""
    operand = operand_dtype(x.dtype)
    a, a2 = _operands(x, None, "layer", operand)
    w, sigma2 = _operands(weight, scale, parameterization, operand)
    mean = None if w is None else a @ w.t()
    var = a2 @ sigma2.t()
    alpha = parameterization if parameterization in OUTPUT_ALPHA else "none"
    y = sample_pass(mean, var, scale, bias, seed, x.dtype, alpha, row_offset, col_offset, sample)
    return y, var


def _contiguous(*tensors):
    return (t if t is None else t.contiguous() for t in tensors)


def lrt_linear_triton(x, weight, scale, bias, seed, parameterization, row_offset=0, col_offset=0, sample=0):
    place = (row_offset, col_offset, sample)
    out_features = (scale if weight is None else weight).shape[0]
    if x.dtype == torch.float64 or x.shape[0] == 0 or out_features == 0:
        return lrt_linear_reference(x, weight, scale, bias, seed, parameterization, *place)
    x, weight, scale, bias = _contiguous(x, weight, scale, bias)
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    strategy = linear_strategy(*x.shape, out_features, x.dtype, parameterization, capability)
    if strategy == "two_gemms":
        return linear_two_gemms(x, weight, scale, bias, seed, parameterization, *place)
    parameter_dtype = (scale if weight is None else weight).dtype
    if parameterization not in OUTPUT_ALPHA:
        parameter_dtype = torch.promote_types(parameter_dtype, scale.dtype)
    tile = dual_tile(x.shape[0], x.dtype, parameter_dtype, capability)
    return linear_dual(x, weight, scale, bias, seed, parameterization, *place, tile)


def lrt_linear_backward_triton(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, row_offset=0, col_offset=0, sample=0
):
    place = (row_offset, col_offset, sample)
    if x.dtype == torch.float64 or 0 in (*x.shape, var.shape[1]):
        return lrt_linear_backward_reference(
            grad, x, weight, scale, has_bias, var, seed, parameterization, needed, *place
        )
    grad, x, weight, scale, var = _contiguous(grad, x, weight, scale, var)
    needs_x, needs_weight, needs_scale, needs_bias = needed
    output_alpha_form = parameterization in OUTPUT_ALPHA
    needs_sigma2 = (needs_weight and parameterization != "additive") or (needs_scale and not output_alpha_form)
    operand = operand_dtype(x.dtype)
    grad_var, grad_bias, grad_alpha = sample_backward_pass(
        grad, var, scale, seed, operand, torch.finfo(torch.float32).max,
        parameterization if output_alpha_form else "none", *place,
        needs_var=needs_x or needs_sigma2, needs_bias=needs_bias and has_bias,
        needs_alpha=needs_scale and output_alpha_form,
    )  # fmt: skip

    grad_mean = grad.to(operand)
    grad_x = grad_weight = grad_scale = None
    if needs_x:
        w, sigma2 = _operands(weight, scale, parameterization, operand)
        through_mean = None if w is None else grad_mean @ w
        grad_x, _ = _operands_backward(x, None, through_mean, grad_var @ sigma2, x.dtype, None)
        del w, sigma2, through_mean
    if needs_weight or needs_sigma2:
        a, a2 = _operands(x, None, "layer", operand)
    if needs_weight:
        grad_weight = grad_mean.t() @ a
    if needs_sigma2:
        sigma2_has_weight = weight is not None and parameterization != "additive"
        combined, grad_scale = _operands_backward(
            weight if sigma2_has_weight else None,
            None if output_alpha_form else scale,
            grad_weight,
            grad_var.t() @ a2,
            weight.dtype if needs_weight and sigma2_has_weight else None,
            scale.dtype if needs_scale and not output_alpha_form else None,
        )
        grad_weight = grad_weight if combined is None else combined
    if grad_alpha is not None:
        grad_scale = grad_alpha.sum(0, keepdim=True) if parameterization == "layer" else grad_alpha
        grad_scale = grad_scale.to(scale.dtype)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    none = x.new_empty(0)
    return tuple(none if g is None else g for g in (grad_x, grad_weight, grad_scale, grad_bias))


attach("lrt_linear", lrt_linear_triton)
attach("lrt_linear_backward", lrt_linear_backward_triton)
