"""Triton kernels that make the operands of an LRT layer's GEMMs: one pass over weights and scales, or over x.

float8 operands (``ops/lrt_operand.py``) need the largest element of a row before its first can be written. A program
has rows of its own and holds them in registers; rows of more than 16384 elements it reads twice, the second time from
the caches. Few rows leave multiprocessors idle (64 rows use 64): splitting them would take a second launch, which costs
more than the half megabyte that 64 rows of 4096 are.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt_operand import FLOAT8, check_float8_device, lrt_variance_operand_reference
from losssurf_fast.ops.lrt_sample_triton import exact_exp

OUTPUT_ALPHA = ("layer", "neuron")  # alpha is applied to var in output space
ELEMENTS = 1024  # of an operand, per program
ROW_ELEMENTS = 16384  # of the longest row of float8 that a program's registers hold

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
    """sigma^2 of elements ``offs``, fp32; 0 where masked."""
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
    rows,
    cols,
    PARAMETERIZATION: tl.constexpr,
    WHOLE: tl.constexpr,  # a tile has whole rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_m = offs_m < rows
    row = offs_m[:, None] * cols
    # Bits of numbers that are not negative have the numbers' order, and above them infinity, then NaN.
    if WHOLE:
        mask = mask_m[:, None] & (offs_n < cols)
        values = _row_tile(weight_ptr, scale_ptr, row + offs_n, mask, PARAMETERIZATION)
        largest = values.to(tl.uint32, bitcast=True)
    else:
        largest = tl.zeros((BLOCK_M, BLOCK_N), tl.uint32)
        for start in range(0, cols, BLOCK_N):
            mask = mask_m[:, None] & (start + offs_n < cols)
            values = _row_tile(weight_ptr, scale_ptr, row + start + offs_n, mask, PARAMETERIZATION)
            bits = values.to(tl.uint32, bitcast=True)
            largest = tl.where(bits > largest, bits, largest)
    largest = tl.max(largest, axis=1)
    # The exponent of ops/lrt_operand.py's float8_rows.
    exponent = ((largest + 0x1FFFFF) >> 23).to(tl.int32) - 8
    exponent = tl.where(exponent < 1, 1, exponent)
    finite = largest < 0x7F800000
    scale = tl.where(finite, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    inverse = tl.where(finite, ((254 - exponent) << 23).to(tl.float32, bitcast=True), float("nan"))[:, None]
    tl.store(row_scale_ptr + offs_m, scale, mask=mask_m)
    if WHOLE:
        tl.store(out_ptr + row + offs_n, (values * inverse).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        for start in range(0, cols, BLOCK_N):
            mask = mask_m[:, None] & (start + offs_n < cols)
            values = _row_tile(weight_ptr, scale_ptr, row + start + offs_n, mask, PARAMETERIZATION)
            tl.store(out_ptr + row + start + offs_n, (values * inverse).to(out_ptr.dtype.element_ty), mask=mask)


def row_tile(cols: int) -> dict[str, int | bool]:
    """Tile of ``_float8_rows_kernel``: 16 elements for a thread, so that it stores 16 bytes at once."""
    whole = cols <= ROW_ELEMENTS
    block_n = max(triton.next_power_of_2(cols), 16) if whole else 4096
    block_m = max(1, 2048 // block_n)
    return {"WHOLE": whole, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": block_m * block_n // 512}


def float8_rows(name, weight, scale, parameterization, out_dtype=FLOAT8) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma^2 in float8 and its row scales, for operator ``name``; of (x, None, "layer") those of x^2.

    The inputs are contiguous.
    """
    matrix = scale if weight is None else weight
    if matrix.is_cuda:
        check_float8_device(name, matrix.device)
    out = torch.empty_like(matrix, dtype=out_dtype)
    row_scale = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    tile = row_tile(matrix.shape[1])
    if matrix.shape[0] > 0:
        with device_guard(matrix):
            _float8_rows_kernel[(triton.cdiv(matrix.shape[0], tile["BLOCK_M"]),)](
                weight,
                None if parameterization in OUTPUT_ALPHA else scale,
                out,
                row_scale,
                *matrix.shape,
                PARAMETERIZATION=parameterization,
                **tile,
            )
    return out, row_scale


# ---- lrt_variance_operand ------------------------------------------------------------------------------------------


def lrt_variance_operand_triton(weight, scale, parameterization, dtype):
    matrix = scale if weight is None else weight
    if torch.float64 in (matrix.dtype, dtype):
        return lrt_variance_operand_reference(weight, scale, parameterization, dtype)
    weight, scale = weight if weight is None else weight.contiguous(), scale.contiguous()
    if dtype == FLOAT8:
        return float8_rows("lrt_variance_operand", weight, scale, parameterization)
    _, sigma2 = operands(weight, scale, parameterization, dtype, both=False)
    return sigma2, matrix.new_empty(0, dtype=torch.float32)


attach("lrt_variance_operand", lrt_variance_operand_triton)
