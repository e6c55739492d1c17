"""GPU kernels of ``curve_linear``: at few rows one Triton kernel that combines the weight in registers.

``fused`` chooses. Few rows: a tile of the weight is summed over the bends in registers (fp32 fma in order, rounded to
x's dtype) and multiplied there, so that the bends are read once; with a t for each row there is an accumulator for
one bend at a time, which is scaled and added. More rows, and backward: ``curve_weights`` and the library's GEMMs, whose
rate nothing of ours beats where the product takes longer than the bends' bytes. fp64 and more than 8 bends take the
reference or those GEMMs too.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.curve_linear import curve_linear_backward_reference, curve_linear_reference
from losssurf_fast.ops.lrt_linear_triton import dot_precision
from losssurf_fast.ops.lrt_strategy import Tile, dual_tile, shared_memory
from losssurf_fast.ops.noise_triton import EXACT

MAX_BENDS = 8
# Rows up to which reading the bends is most of the time. From a roofline model: no GPU has tuned them.
FUSED_MAX_ROWS = 128
FUSED_MAX_ROWS_FP32 = 64  # each dot is three TF32 products

# ---- kernel --------------------------------------------------------------------------------------------------------


@triton.jit
def load_bend(bend_ptr, coefficient, offs, mask_k, EVEN_K: tl.constexpr):
    """A tile of a bend, not read where its coefficient is 0."""
    read = tl.abs(tl.broadcast_to(coefficient, mask_k.shape)) > 0
    if EVEN_K:
        tile = tl.load(bend_ptr + offs, mask=read, other=0.0)
    else:
        tile = tl.load(bend_ptr + offs, mask=mask_k & read, other=0.0)
    return tile


@triton.jit
def load_x(x_ptrs, mask_k, EVEN_K: tl.constexpr):
    return tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=mask_k, other=0.0)


@triton.jit
def add_bend_product(
    acc, x_ptrs, bend_ptr, coefficients_ptr, offs_m, offs_k, offs, M, I,  # noqa: E741
    j: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + c_nj (x_n w_j^T): the share of bend j where each row has coefficients of its own."""
    product = tl.zeros(acc.shape, tl.float32)
    for k in range(0, I, BLOCK_K):
        mask_k = (offs_k < I - k)[None, :]
        x = load_x(x_ptrs, mask_k, EVEN_K)
        bend = load_bend(bend_ptr, tl.full((), 1.0, tl.float32), offs, mask_k, EVEN_K)
        product = tl.dot(x, bend.to(x.dtype).T, product, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        offs += BLOCK_K
    c = tl.load(coefficients_ptr + offs_m * K + j, mask=offs_m < M, other=0.0).to(tl.float32)
    return tl.fma(product, tl.broadcast_to(c[:, None], acc.shape), acc)


@triton.jit
def _curve_linear_kernel(
    x_ptr,  # [M, I]
    bend0_ptr,  # [O, I], as the others; None past K
    bend1_ptr,
    bend2_ptr,
    bend3_ptr,
    bend4_ptr,
    bend5_ptr,
    bend6_ptr,
    bend7_ptr,
    coefficients_ptr,  # [K] or [M, K]
    bias_ptr,  # [BIASES, O] or None
    y_ptr,  # [M, O]
    M,
    O,  # noqa: E741
    I,  # noqa: E741
    K: tl.constexpr,
    BIASES: tl.constexpr,  # 0, 1 or K
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 dots
    EVEN_K: tl.constexpr,  # BLOCK_K divides I
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row blocks of the same columns run side by side, so that the bends are read from memory once.
    num_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tl.program_id(0) % num_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // num_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the ends read row 0: their results are not stored.
    x_ptrs = x_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * I + offs_k[None, :]
    offs = tl.where(offs_n < O, offs_n, 0)[:, None] * I + offs_k[None, :]  # [N, K]
    bends = (bend0_ptr, bend1_ptr, bend2_ptr, bend3_ptr, bend4_ptr, bend5_ptr, bend6_ptr, bend7_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(I > 0)  # ptxas serialises a wgmma whose loop may run zero times (C7515)
    if PER_ROW:
        for j in tl.static_range(K):
            acc = add_bend_product(
                acc, x_ptrs, bends[j], coefficients_ptr, offs_m, offs_k, offs, M, I, j, K, PRECISION, EVEN_K, BLOCK_K
            )
    else:
        coefficients = ()  # outside the loop, whose loads are staged in shared memory
        for j in tl.static_range(K):
            coefficients += (tl.load(coefficients_ptr + j).to(tl.float32),)
        for k in range(0, I, BLOCK_K):
            mask_k = (offs_k < I - k)[None, :]
            x = load_x(x_ptrs, mask_k, EVEN_K)
            weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for j in tl.static_range(K):
                bend = load_bend(bends[j], coefficients[j], offs, mask_k, EVEN_K).to(tl.float32)
                weight = tl.fma(bend, tl.broadcast_to(coefficients[j], bend.shape), weight)
            acc = tl.dot(x, weight.to(x.dtype).T, acc, input_precision=PRECISION)
            x_ptrs += BLOCK_K
            offs += BLOCK_K

    mask_n = offs_n < O
    for j in tl.static_range(BIASES):
        bias = tl.load(bias_ptr + j * O + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if BIASES == 1:
            acc += bias
        elif PER_ROW:
            acc += tl.load(coefficients_ptr + offs_m * K + j, mask=offs_m < M, other=0.0).to(tl.float32)[:, None] * bias
        else:
            acc += tl.load(coefficients_ptr + j).to(tl.float32) * bias
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_m[:, None] * O + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launchers -----------------------------------------------------------------------------------------------------


def fused(rows: int, dtype: torch.dtype, bends: int, capability: tuple[int, int]) -> bool:
    """Whether ``rows`` of x in ``dtype`` are multiplied by the kernel that combines ``bends`` bends in registers."""
    if capability < (8, 0) or dtype == torch.float64 or bends > MAX_BENDS:
        return False
    return rows <= (FUSED_MAX_ROWS_FP32 if dtype == torch.float32 else FUSED_MAX_ROWS)


def curve_tile(rows: int, dtype: torch.dtype, bend_dtype: torch.dtype, bends: int, capability: tuple[int, int]) -> Tile:
    """The tile of the kernel with two accumulators, whose stages hold ``bends`` tiles of the weight instead of two.

    The combined tile goes through shared memory, too, on its way to the dot.
    """
    like, limit = dual_tile(rows, dtype, bend_dtype, capability), shared_memory(capability)
    block_k, column = like.block_k, like.block_m * dtype.itemsize + bends * like.block_n * bend_dtype.itemsize
    combined = like.block_n * dtype.itemsize
    while block_k * (column + combined) > limit:
        block_k //= 2
    num_stages = max(2, min(4, (limit - block_k * combined) // (block_k * column) + 1))  # one fewer buffers than stages
    return Tile(like.block_m, like.block_n, block_k, like.num_warps, num_stages)


def linear_fused(x, bends, coefficients, biases, tile: Tile) -> torch.Tensor:
    """y by the fused kernel; none of M, O, I is 0."""
    (rows, in_features), out_features = x.shape, bends[0].shape[0]
    x, coefficients = x.contiguous(), coefficients.contiguous()
    bends = [bend.contiguous() for bend in bends]
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    programs = triton.cdiv(rows, tile.block_m) * triton.cdiv(out_features, tile.block_n)
    with device_guard(x):
        _curve_linear_kernel[(programs,)](
            x, *bends, *[None] * (MAX_BENDS - len(bends)), coefficients, torch.stack(biases) if biases else None, y,
            rows, out_features, in_features, K=len(bends), BIASES=len(biases), PER_ROW=coefficients.dim() == 2,
            PRECISION=dot_precision(x.dtype), EVEN_K=in_features % tile.block_k == 0, BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages, **EXACT,
        )  # fmt: skip
    return y


def synthesised(x, bends, coefficients) -> torch.Tensor:
    """The weight ``[O, I]`` in x's dtype."""
    return torch.ops.losssurf_fast.curve_weights.default(list(bends), coefficients)[0].to(x.dtype)


def linear_synthesised(x, bends, coefficients, biases) -> torch.Tensor:
    """y by ``curve_weights`` and a library GEMM; a t for each row takes a GEMM for each bend."""
    if coefficients.dim() == 2:
        return curve_linear_reference(x, bends, coefficients, biases)
    weight = synthesised(x, bends, coefficients)
    if len(biases) > 1:
        biases = [synthesised(x, biases, coefficients)]
    return torch.nn.functional.linear(x, weight, biases[0].to(x.dtype) if biases else None)


def curve_linear_triton(x, bends, coefficients, biases):
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    rows, empty = x.shape[0], x.numel() == 0 or bends[0].numel() == 0
    if empty or not fused(rows, x.dtype, len(bends), capability):
        return linear_synthesised(x, bends, coefficients, biases)
    tile = curve_tile(rows, x.dtype, bends[0].dtype, len(bends), capability)
    return linear_fused(x, bends, coefficients, biases, tile)


def curve_linear_backward_gemms(
    grad, x, bends, coefficients, biases, need_x, need_bends, need_coefficients, need_biases
):
    """All gradients from library GEMMs, with ``curve_weights`` and its backward around them where all rows share t."""
    if coefficients.dim() == 2:
        return curve_linear_backward_reference(
            grad, x, bends, coefficients, biases, need_x, need_bends, need_coefficients, need_biases
        )
    backward = torch.ops.losssurf_fast.curve_weights_backward.default
    result = [grad @ synthesised(x, bends, coefficients)] if need_x else []
    outer = grad.t() @ x if any(need_bends) or need_coefficients else None
    through_weights, through_biases = [], []
    if outer is not None:
        outer = outer.to(bends[0].dtype)
        through_weights = backward([outer], list(bends), coefficients, list(need_bends), need_coefficients)
    if biases:
        total = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(biases[0].dtype)
        if len(biases) == 1:
            through_biases = [total] if need_biases[0] else []
        else:
            through_biases = backward([total], list(biases), coefficients, list(need_biases), need_coefficients)
            if need_coefficients:
                through_weights[-1] = through_weights[-1] + through_biases.pop()
    return [*result, *through_weights, *through_biases]


attach("curve_linear", curve_linear_triton)
attach("curve_linear_backward", curve_linear_backward_gemms, language="library GEMMs")
