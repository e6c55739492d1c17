"""Triton kernels of the noise family: the contract of ``ops/noise.py`` as device functions, and the fill kernel.

A tile is drawn by quads: one Philox call gives the four normals of columns 4q to 4q + 3, so a tile's first column is
the first of a quad. Where ``col_offset`` starts inside a quad, the launchers shift their tiles left by
``SHIFT = col_offset % 4`` columns and mask them.

Kernels that draw noise are launched with ``**EXACT``: a product is added by an fma only where the source says so.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops import noise

EXACT = {"enable_fp_fusion": False}
# Compiled once, whatever the values: 1 and multiples of 16 would otherwise get variants of their own.
PLACE_ARGUMENTS = ("row_offset", "first_quad", "sample")

_LOG = tl.constexpr(noise.LOG_COEFFICIENTS)
_SIN = tl.constexpr(noise.SIN_COEFFICIENTS)
_COS = tl.constexpr(noise.COS_COEFFICIENTS)
_LOG_TERMS = tl.constexpr(len(noise.LOG_COEFFICIENTS))
_SIN_TERMS = tl.constexpr(len(noise.SIN_COEFFICIENTS))
_COS_TERMS = tl.constexpr(len(noise.COS_COEFFICIENTS))
_MINUS_TWO_LN_TWO_BY_TWO_TO_23 = tl.constexpr(noise.MINUS_TWO_LN_TWO * 2.0**-23)
_TWO_TO_MINUS_100 = tl.constexpr(2.0**-100)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_TWO_TO_MINUS_33 = tl.constexpr(2.0**-33)

# ---- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, TERMS: tl.constexpr):
    result = tl.full(x.shape, COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, TERMS):
        result = tl.fma(result, x, COEFFICIENTS[i])
    return result


@triton.jit
def _minus_two_log(u):
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F400000) & 0xFF800000  # of the mantissa in [3/4, 3/2), where it is in a float: times 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    exponent = exponent.to(tl.int32, bitcast=True).to(tl.float32)
    return tl.fma(exponent, _MINUS_TWO_LN_TWO_BY_TWO_TO_23, _polynomial(f, _LOG, _LOG_TERMS) * f)


@triton.jit
def _sqrt_rn(x):
    """Correctly rounded root of x = 0 and x >= 2^-101.

    These are sqrt.rn's instructions for such x, without the branch to others (SASS of sm_80 to sm_120).
    """
    inverse = tl.rsqrt(tl.maximum(x, _TWO_TO_MINUS_100))  # finite at 0
    root = x * inverse
    return tl.fma(tl.fma(root * -1.0, root, x), inverse * 0.5, root)


@triton.jit
def box_muller(a, b):
    """Words (a, b), uint32 of any shape, to the normals of an even and the following odd column."""
    u = tl.fma(a.to(tl.float32), _TWO_TO_MINUS_32, _TWO_TO_MINUS_33)
    r = _sqrt_rn(_minus_two_log(u))
    # theta = pi/2 (quadrant + x): the top two bits of t are the quadrant, the low 30 bits of b, signed, are x.
    t = b + 0x20000000
    x = (b << 2).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_TO_MINUS_32
    x2 = x * x
    sin, cos = _polynomial(x2, _SIN, _SIN_TERMS) * x, _polynomial(x2, _COS, _COS_TERMS)
    # Two bits of t turn (cos, sin) of x into those of theta: bit 30 by a quarter, bit 31 by a half.
    quarter = (t & 0x40000000) != 0
    turned_r = (r.to(tl.uint32, bitcast=True) ^ (t & 0x80000000)).to(tl.float32, bitcast=True)
    minus_sin = sin * -1.0  # Triton's -0.0 would be 0.0
    return turned_r * tl.where(quarter, minus_sin, cos), turned_r * tl.where(quarter, cos, sin)


@triton.jit
def philox_words(seed, row, quad, sample):
    """Four uint32 blocks of rows ``row`` (int64) and quads ``quad`` (uint32), which broadcast to the block's shape.

    The first two rounds multiply what depends on the row or on the quad alone: before broadcasting.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = quad, row.to(tl.uint32), (row >> 32).to(tl.uint32), sample.to(tl.uint32)
    for _ in tl.static_range(10):
        product0, product1 = w0.to(tl.uint64) * 0xD2511F53, w2.to(tl.uint64) * 0xCD9E8D57
        w0, w1 = (product1 >> 32).to(tl.uint32) ^ w1 ^ key0, product1.to(tl.uint32)
        w2, w3 = (product0 >> 32).to(tl.uint32) ^ w3 ^ key1, product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return w0, w1, w2, w3


@triton.jit
def _quads(seed, row, quad, sample):
    """fp32 normals of columns 4q to 4q + 3 of ``row`` and quads q, which broadcast."""
    w0, w1, w2, w3 = philox_words(seed, row, quad, sample)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def normal_tile(seed, row, quad, sample, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, QUADS: tl.constexpr = 1):
    """fp32 normals [BLOCK_M, BLOCK_N] of rows and quads that broadcast to [BLOCK_M, BLOCK_N / (4 QUADS)].

    A thread draws ``QUADS`` from each quad on. Two have as many elements as the 16 bytes that it loads in half
    precision, one in fp32: the tile then need not go through shared memory to the threads that use it.
    """
    n0, n1, n2, n3 = _quads(seed, row, quad, sample)
    if QUADS == 2:
        m0, m1, m2, m3 = _quads(seed, row, quad + 1, sample)
        n0, n1, n2, n3 = tl.join(n0, m0), tl.join(n1, m1), tl.join(n2, m2), tl.join(n3, m3)
    quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [BLOCK_M, BLOCK_N / (4 QUADS), (QUADS,) pair, parity]
    return tl.reshape(quads, (BLOCK_M, BLOCK_N))


@triton.jit
def tile_normals(seed, offs_m, start_n, row_offset, first_quad, sample, BLOCK_N: tl.constexpr, QUADS: tl.constexpr = 1):
    """Noise of local rows ``offs_m`` (int64) and the BLOCK_N columns from tile column ``start_n``, a multiple of 4."""
    quad = (first_quad.to(tl.int64) + start_n // 4).to(tl.uint32)
    quad += tl.arange(0, BLOCK_N // (4 * QUADS)).to(tl.uint32) * QUADS
    row = row_offset.to(tl.int64) + offs_m
    return normal_tile(seed, row[:, None], quad[None, :], sample, offs_m.shape[0], BLOCK_N, QUADS)


@triton.jit
def column_blocks(cols, SHIFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """ceil((cols + SHIFT) / BLOCK_N), also where the sum would not fit the 32 bits of ``cols``."""
    return ((tl.full((), SHIFT + BLOCK_N - 1, tl.int64) + cols) // BLOCK_N).to(tl.int32)


# ---- philox_normal -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)
def _philox_normal_kernel(
    out_ptr,  # [rows, cols]
    seed_ptr,
    rows,
    cols,
    row_offset,
    first_quad,
    sample,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_n = column_blocks(cols, SHIFT, BLOCK_N)
    start_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N) - SHIFT
    seed = tl.load(seed_ptr)
    normals = tile_normals(seed, offs_m, start_n, row_offset, first_quad, sample, BLOCK_N)
    mask = (offs_m < rows)[:, None] & ((offs_n >= 0) & (offs_n < cols))[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * cols + offs_n[None, :]
    tl.store(out_ptrs, normals.to(out_ptr.dtype.element_ty), mask=mask)


def elementwise_tiles(rows: int, cols: int, elements: int = 1024) -> tuple[int, dict[str, int]]:
    """Number of programs and block sizes for ``[rows, cols]``; a program takes ``elements`` of it."""
    block_n = min(max(4, triton.next_power_of_2(cols)), 128)
    block_m = min(triton.next_power_of_2(rows), elements // block_n)
    block_n = min(max(4, triton.next_power_of_2(cols)), elements // block_m)
    return triton.cdiv(rows, block_m) * triton.cdiv(cols, block_n), {"BLOCK_M": block_m, "BLOCK_N": block_n}


def philox_normal_triton(
    seed: torch.Tensor,
    rows: int,
    cols: int,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    out = seed.new_empty((rows, cols), dtype=dtype)
    if out.numel() == 0:
        return out
    first_quad, shift = divmod(col_offset, 4)
    programs, blocks = elementwise_tiles(rows, cols + shift)
    with device_guard(out):
        _philox_normal_kernel[(programs,)](
            out, seed, rows, cols, row_offset, first_quad, sample, SHIFT=shift, **blocks, **EXACT
        )
    return out


attach("philox_normal", philox_normal_triton)
