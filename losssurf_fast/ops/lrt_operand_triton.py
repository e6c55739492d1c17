"""Triton kernels that make the operands of an LRT layer's GEMMs: one pass over weights and scales, or over x.

float8 operands (``ops/lrt_operand.py``) need the largest element of a row before its first can be written, so a program
has a row of its own and goes over it twice; the second time it comes from the caches.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt_operand import FLOAT8, lrt_variance_operand_reference
from losssurf_fast.ops.lrt_sample_triton import exact_exp

OUTPUT_ALPHA = ("layer", "neuron")  # alpha is applied to var in output space
ELEMENTS = 1024  # of an operand, per program
ROW_ELEMENTS = 1024  # of a row of float8, at a time

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


def operands(weight, scale, parameterization, dtype, both=True) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(weight, sigma^2) in ``dtype`` from one pass over the parameters; of (x, None, "layer") the pair (x, x^2).

    The parameters are dense and lie in memory alike; so do the results. Without ``both``, weight stays as it is.
    """
    sigma2 = torch.empty_like(scale if weight is None else weight, dtype=dtype)
    as_it_is = weight is None or weight.dtype == dtype or not both
    cast = weight if as_it_is else torch.empty_like(sigma2)
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


# ---- float8 --------------------------------------------------------------------------------------------------------


@triton.jit
def _row_tile(weight_ptr, scale_ptr, offs, mask, PARAMETERIZATION: tl.constexpr):
    """sigma^2 of elements ``offs`` of the row, fp32; 0 where masked."""
    weight = 0.0
    scale = 0.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, variance_operand(weight, scale, PARAMETERIZATION), 0.0)


@triton.jit
def _float8_rows_kernel(
    weight_ptr,  # [rows, cols]; None for "variance"
    scale_ptr,  # [rows, cols]; None for "layer" and "neuron"
    out_ptr,  # [rows, cols]
    row_scale_ptr,  # fp32 [rows]
    cols,
    PARAMETERIZATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * cols
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        values = _row_tile(weight_ptr, scale_ptr, row + offs, offs < cols, PARAMETERIZATION)
        largest = tl.where(values > largest, values, largest) + (values - values)  # NaN if not finite
    largest = tl.max(largest, axis=0) + (tl.sum(largest, axis=0) * 0.0)
    # The power of two that brings the largest, mantissa 2^exponent, under 448 = 7/4 2^8.
    bits = largest.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23).to(tl.int32) - 8 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.where(largest > 0.0, tl.where(exponent < 1, 1, exponent), 127)
    scale = (exponent << 23).to(tl.float32, bitcast=True) + (largest - largest)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(row_scale_ptr + tl.program_id(0), scale)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < cols
        values = _row_tile(weight_ptr, scale_ptr, row + offs, mask, PARAMETERIZATION) * inverse
        tl.store(out_ptr + row + offs, (values + (scale - scale)).to(out_ptr.dtype.element_ty), mask=mask)


def float8_rows(weight, scale, parameterization, out_dtype=FLOAT8) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma^2 in float8 and its row scales; of (x, None, "layer") those of x^2. The inputs are contiguous."""
    matrix = scale if weight is None else weight
    out = torch.empty_like(matrix, dtype=out_dtype)
    row_scale = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    if matrix.shape[0] > 0:
        with device_guard(matrix):
            _float8_rows_kernel[(matrix.shape[0],)](
                weight,
                None if parameterization in OUTPUT_ALPHA else scale,
                out,
                row_scale,
                matrix.shape[1],
                PARAMETERIZATION=parameterization,
                BLOCK=ROW_ELEMENTS,
            )
    return out, row_scale


# ---- lrt_variance_operand ------------------------------------------------------------------------------------------


def lrt_variance_operand_triton(weight, scale, parameterization, dtype):
    matrix = scale if weight is None else weight
    if torch.float64 in (matrix.dtype, dtype):
        return lrt_variance_operand_reference(weight, scale, parameterization, dtype)
    weight, scale = weight if weight is None else weight.contiguous(), scale.contiguous()
    if dtype == FLOAT8:
        return float8_rows(weight, scale, parameterization)
    _, sigma2 = operands(weight, scale, parameterization, dtype, both=False)
    return sigma2, matrix.new_empty(0, dtype=torch.float32)


attach("lrt_variance_operand", lrt_variance_operand_triton)
