"""Triton kernels of ``lrt_linear``: library GEMMs around fused passes, and the dual-accumulator kernel.

``ops/lrt_strategy.py`` chooses: two library GEMMs and one fused pass (``lrt_sample_triton.py``), or, at few rows, one
kernel with an accumulator for the mean and one for the variance, which reads the parameters once.

GEMM operands have ``operand_dtype``: x's, but fp32 where x is fp16, whose range the squares leave in both directions.
bf16 would keep the range and lose three bits that fp16 users have; TF32 has fp16's mantissa and fp32's range, so the
dual kernels multiply fp16 inputs in TF32. fp32 inputs are multiplied as PyTorch's precision setting says.
"""

import functools

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt import lrt_linear_reference
from losssurf_fast.ops.lrt_operand import operand_dtype
from losssurf_fast.ops.lrt_operand_triton import OUTPUT_ALPHA, float8_rows, operands, variance_operand
from losssurf_fast.ops.lrt_sample_triton import (
    matrix_view,
    output_alpha,
    output_of,
    sample_pass,
    sample_variance,
)
from losssurf_fast.ops.lrt_strategy import Tile, dual_tile, linear_strategy
from losssurf_fast.ops.noise_triton import EXACT, PLACE_ARGUMENTS, tile_normals

# ---- dual accumulators ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)
def _lrt_linear_kernel(
    x_ptr,  # [M, I]
    weight_ptr,  # [O, I]; None for "variance"
    scale_ptr,  # [1], [O] or [O, I]; None where sigma2_ptr stands for it
    sigma2_ptr,  # [O, I] in the operands' dtype, or None to make it here
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
    SCALE_TILE: tl.constexpr = sigma2_ptr is None and PARAMETERIZATION != "layer" and PARAMETERIZATION != "neuron"
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
            if sigma2_ptr is not None:
                sigma2 = tl.load(sigma2_ptr + parameter_offs)
        else:  # zeros in x, so the variance of what is read past the end does not count
            mask_k = (offs_k < I - k)[None, :]
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + parameter_offs, mask=mask_k, other=0.0)
            if SCALE_TILE:
                scale = tl.load(scale_ptr + parameter_offs, mask=mask_k, other=0.0)
            if sigma2_ptr is not None:
                sigma2 = tl.load(sigma2_ptr + parameter_offs, mask=mask_k, other=0.0)
        if weight_ptr is not None:
            operand = weight.to(OPERAND)
            acc_mean = tl.dot(x.to(OPERAND), operand.T, acc_mean, input_precision=PRECISION)
            weight = weight.to(tl.float32)
        if SCALE_TILE:
            scale = scale.to(tl.float32)
        if sigma2_ptr is None:
            sigma2 = variance_operand(weight, scale, PARAMETERIZATION).to(OPERAND)
        x2 = (x.to(tl.float32) * x.to(tl.float32)).to(OPERAND)
        acc_var = tl.dot(x2, sigma2.T, acc_var, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        parameter_offs += BLOCK_K

    mask_n = (offs_n >= 0) & (offs_n < O)
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * O + offs_n[None, :]
    tl.store(var_ptr + offs, acc_var.to(OPERAND), mask=mask)
    eps = tile_normals(tl.load(seed_ptr), offs_m, start_n, row_offset, first_quad, sample, BLOCK_N)
    alpha = output_alpha(scale_ptr, offs_n[None, :], mask_n[None, :], PARAMETERIZATION)
    y = tl.fma(tl.sqrt(sample_variance(acc_var, alpha)), eps, acc_mean)
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
    x, weight, scale, bias, seed, parameterization, row_offset, col_offset, sample, tile: Tile, sigma2=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, var) by the dual-accumulator kernel; the inputs must be contiguous and none of M, O, I 0.

    ``sigma2``, in the operands' dtype, saves the kernel making it.
    """
    rows, in_features = x.shape
    out_features = (scale if weight is None else weight).shape[0]
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    var = torch.empty_like(y, dtype=operand_dtype(x.dtype))
    read_scale = None if sigma2 is not None and parameterization not in OUTPUT_ALPHA else scale
    first_quad, shift = divmod(col_offset, 4)
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(out_features + shift, tile.block_n)
    with device_guard(x):
        _lrt_linear_kernel[(programs,)](
            x, weight, read_scale, sigma2, bias, seed, y, var, rows, out_features, in_features, row_offset, first_quad,
            sample,
            PARAMETERIZATION=parameterization, PRECISION=dot_precision(x.dtype), SHIFT=shift,
            EVEN_K=in_features % tile.block_k == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
            **EXACT,
        )  # fmt: skip
    return y, var


def float8_product(x, sigma2, row_scale) -> torch.Tensor:
    """x^2 (sigma^2)^T from float8 operands, in x's dtype."""
    squares, scale = float8_rows("lrt_linear", x, None, "layer")
    return torch._scaled_mm(
        squares, sigma2.t(), scale.unsqueeze(1), row_scale.unsqueeze(0), out_dtype=x.dtype, use_fast_accum=False
    )


def linear_two_gemms(
    x, weight, scale, bias, seed, parameterization, row_offset, col_offset, sample, sigma2=None, row_scale=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, var) by two library GEMMs and one fused pass; the inputs must be contiguous.

    ``sigma2`` and ``row_scale`` are those of ``ops/lrt_operand.py``; without them sigma^2 is made here.
    """
    operand = operand_dtype(x.dtype)
    if row_scale is not None:
        # The cast is a pass of its own: in one with sigma^2's, fp32 weights and scales would move 11 bytes each and not
        # 15, a few per cent of the GEMMs that float8 is for, and sigma^2 could not be made ahead of time.
        a, w = x, None if weight is None else weight.to(operand)
        var = float8_product(x, sigma2, row_scale)
    else:
        a, a2 = operands(x, None, "layer", operand)
        if sigma2 is None:
            w, sigma2 = operands(weight, scale, parameterization, operand)
        else:
            w = None if weight is None else weight.to(operand)
        var = a2 @ sigma2.t()
    mean = None if w is None else a @ w.t()
    alpha = parameterization if parameterization in OUTPUT_ALPHA else "none"
    y, view = output_of(mean, var, x.dtype), matrix_view(var)
    y = sample_pass(mean, var, scale, bias, seed, y, view, alpha, row_offset, col_offset, sample)
    return y, var


def contiguous(*tensors):
    return (t if t is None else t.contiguous() for t in tensors)


def choose(x, weight, scale, parameterization, sigma2=None) -> Tile | None:
    """Tile of the dual-accumulator kernels, or None for library GEMMs; ``sigma2`` is what they load of it, if any."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    out_features = (scale if weight is None else weight).shape[0]
    if linear_strategy(x.shape[0], out_features, x.shape[1], x.dtype, parameterization, capability) == "two_gemms":
        return None
    made_of = None if parameterization in OUTPUT_ALPHA else scale
    loaded = (t.dtype for t in (weight, made_of if sigma2 is None else sigma2) if t is not None)
    return dual_tile(x.shape[0], x.dtype, functools.reduce(torch.promote_types, loaded), capability)


def lrt_linear_triton(
    x, weight, scale, bias, seed, parameterization, row_offset=0, col_offset=0, sample=0, sigma2=None, row_scale=None
):
    place = (row_offset, col_offset, sample)
    nothing = x.numel() == 0 if row_scale is not None else x.shape[0] == 0  # torch._scaled_mm takes no empty sums
    if x.dtype == torch.float64 or nothing or (scale if weight is None else weight).shape[0] == 0:
        return lrt_linear_reference(x, weight, scale, bias, seed, parameterization, *place, sigma2, row_scale)
    x, weight, scale, bias, sigma2, row_scale = contiguous(x, weight, scale, bias, sigma2, row_scale)
    tile = choose(x, weight, scale, parameterization, sigma2) if row_scale is None else None
    if tile is None:
        return linear_two_gemms(x, weight, scale, bias, seed, parameterization, *place, sigma2, row_scale)
    return linear_dual(x, weight, scale, bias, seed, parameterization, *place, tile, sigma2)


attach("lrt_linear", lrt_linear_triton)
