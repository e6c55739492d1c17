"""Triton kernels between variance and sample: ``lrt_sample``, its backward, and both as passes of LRT layers.

As a pass of ``lrt_linear`` or ``lrt_conv`` the forward kernel also adds the bias and the "layer" and "neuron" forms
scale the variance by alpha; the backward kernel also returns, in the same pass, the sums that make the gradients of
bias and of log_alpha. A program sums up to ``TILES`` tiles and torch adds their sums: no atomics, the same bits
every time.

Tensors are ``[batch, rows, cols]`` for the noise (:class:`View`): sample b's row r draws noise row
``row_offset + b rows_total + r``. Features, which have a bias and an alpha each, are the columns of a linear layer's
output ``[1, M, O]`` and the rows, or channels, of a convolution's ``[N, O, S]``. In the channels_last format rows are
the axis whose elements are neighbours in memory, and a tile is higher than wide.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt_sample import EPSILON, lrt_sample_backward_reference, lrt_sample_reference
from losssurf_fast.ops.noise_triton import EXACT, PLACE_ARGUMENTS, column_blocks, elementwise_tiles, tile_normals

TILES = 16  # that one program takes in turn, at most
PROGRAMS = 4096  # several for every place on a GPU; with fewer tiles each gets a program

_EPSILON = tl.constexpr(EPSILON)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_LOW = tl.constexpr(1.925963033500011e-08)  # log2(e) minus its fp32 rounding

# ---- formats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How the kernels see a tensor. ``format``: "linear" (features are columns), "contiguous" or "channels_last"."""

    batch: int
    rows: int
    cols: int
    format: str
    rows_total: int  # noise rows from one sample of the batch to the next

    @property
    def features(self) -> int:
        return self.cols if self.format == "linear" else self.rows

    def tiles(self, shift: int, itemsize: int) -> dict[str, int]:
        """Block sizes; along the axis whose elements are neighbours in memory a tile has whole cache lines.

        ``QUADS`` is for the 16 bytes that a thread loads of elements of ``itemsize``.
        """
        if self.format == "channels_last":
            blocks = elementwise_tiles(triton.cdiv(self.cols + shift, 4), self.rows, 256)[1]
            return {"BLOCK_M": blocks["BLOCK_N"], "BLOCK_N": 4 * blocks["BLOCK_M"], "QUADS": 1}
        blocks = elementwise_tiles(self.rows, self.cols + shift)[1]
        return blocks | {"QUADS": 2 if itemsize == 2 and blocks["BLOCK_N"] > 4 else 1}

    def grid(self, shift: int, blocks: dict[str, int]) -> tuple[int, int, int]:
        """(blocks of features, groups of tiles for each of them, tiles in a group)."""
        num_m, num_n = triton.cdiv(self.rows, blocks["BLOCK_M"]), triton.cdiv(self.cols + shift, blocks["BLOCK_N"])
        features, others = (num_n, num_m) if self.format == "linear" else (num_m, num_n)
        turns = self.batch * others
        steps = min(TILES, max(1, features * turns // PROGRAMS), turns)
        return features, triton.cdiv(turns, steps), steps


def matrix_view(matrix: torch.Tensor, channels: int = 0, channels_total: int = 0) -> View:
    """View of ``[M, O]``; with ``channels``, its rows are those of ``[M / channels, channels]``."""
    rows, cols = matrix.shape
    if channels == 0:
        return View(1, rows, cols, "linear", rows)
    return View(rows // channels, channels, cols, "contiguous", channels_total)


# ---- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def exact_exp(x):
    """exp in fp32 to a few units in the last place; tl.exp loses |x| / 2 of them by rounding x log2(e)."""
    x = tl.where(x < -200.0, -200.0, tl.where(x > 200.0, 200.0, x))  # infinities too; NaN stays
    n = tl.floor(x * _LOG2_E)
    f = tl.fma(x, _LOG2_E_LOW, tl.fma(x, _LOG2_E, -n))
    return tl.exp2(f) * tl.exp2(n)


@triton.jit
def output_alpha(scale_ptr, feature, mask_feature, ALPHA: tl.constexpr):
    """alpha of the features at offsets ``feature``, which broadcast to the tile; 1 where it is part of the variance."""
    if ALPHA == "layer":
        alpha = exact_exp(tl.load(scale_ptr).to(tl.float32))
    elif ALPHA == "neuron":
        alpha = exact_exp(tl.load(scale_ptr + feature, mask=mask_feature, other=0.0).to(tl.float32))
    else:
        alpha = 1.0
    return alpha


@triton.jit
def widen(x):
    """``x`` in fp32; of bf16, whose cast takes an instruction more for every other element, by its bits."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def sample_variance(var, alpha):
    """alpha var + 1e-16; negative sums of squares count as 0, NaN stays."""
    return tl.maximum(tl.fma(var, alpha, _EPSILON), _EPSILON, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_offsets(block, rows, BLOCK_M: tl.constexpr):
    """Rows of block number ``block`` (int64), and which of them exist."""
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    return offs_m, offs_m < rows


@triton.jit
def column_offsets(block, cols, SHIFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of block number ``block`` (int64), and which of them exist."""
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N) - SHIFT
    return offs_n, (offs_n >= 0) & (offs_n < cols)


@triton.jit
def tile_offsets(b, offs_m, offs_n, rows, cols, FORMAT: tl.constexpr):
    """Where the tile of sample ``b`` (int64) is in memory."""
    if FORMAT == "channels_last":
        offs = b * rows * cols + (offs_m[:, None] + offs_n[None, :] * rows)
    else:
        offs = b * rows * cols + (offs_m[:, None] * cols + offs_n[None, :])
    return offs


@triton.jit
def program_tiles(
    batch, rows, cols, steps, FORMAT: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The tiles of this program: up to ``steps`` in turn along the batch and the axis that has no features.

    Returns the block of features (int64), the group of tiles, the first tile's sample and block along the other axis
    (int64), the number of blocks there, and the number of tiles.
    """
    blocks, others = column_blocks(rows, 0, BLOCK_M), column_blocks(cols, SHIFT, BLOCK_N)
    if FORMAT == "linear":
        blocks, others = others, blocks
    group = tl.program_id(0) // blocks
    turn = group * steps
    count = tl.minimum(steps, others * batch - turn)
    block = (tl.program_id(0) - group * blocks).to(tl.int64)
    b, other = tl.full((), 0, tl.int64), turn.to(tl.int64)
    if FORMAT != "linear":
        b, other = (turn // others).to(tl.int64), (turn % others).to(tl.int64)
    return block, group, b, other, others, count


@triton.jit
def next_tile(b, other, others, FORMAT: tl.constexpr):
    """Sample and block after those of a tile: counted, because a division costs as much as drawing an element."""
    other += 1
    if FORMAT != "linear":  # which is one sample
        b += tl.where(other == others, 1, 0)
        other = tl.where(other == others, 0, other)
    return b, other


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=(*PLACE_ARGUMENTS, "rows_total", "steps"))
def _lrt_sample_kernel(
    mean_ptr,  # [batch, rows, cols], or None for zero
    var_ptr,  # [batch, rows, cols]
    scale_ptr,  # log_alpha [1] or [features], or None
    bias_ptr,  # [features] or None
    seed_ptr,
    y_ptr,  # [batch, rows, cols]; may be mean_ptr
    batch,
    rows,
    cols,
    rows_total,
    row_offset,
    first_quad,
    sample,
    steps,  # tiles in a group
    ALPHA: tl.constexpr,
    FORMAT: tl.constexpr,
    SHIFT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, _, b, other, others, count = program_tiles(batch, rows, cols, steps, FORMAT, SHIFT, BLOCK_M, BLOCK_N)
    if FORMAT == "linear":
        offs_n, mask_n = column_offsets(block, cols, SHIFT, BLOCK_N)
        feature, mask_feature = offs_n[None, :], mask_n[None, :]
    else:
        offs_m, mask_m = row_offsets(block, rows, BLOCK_M)
        feature, mask_feature = offs_m[:, None], mask_m[:, None]
    alpha = output_alpha(scale_ptr, feature, mask_feature, ALPHA)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature, mask=mask_feature, other=0.0).to(tl.float32)
    seed = tl.load(seed_ptr)

    for _ in range(count):
        if FORMAT == "linear":
            block_n = block
            offs_m, mask_m = row_offsets(other, rows, BLOCK_M)
        else:
            block_n = other
            offs_n, mask_n = column_offsets(other, cols, SHIFT, BLOCK_N)
        mask = mask_m[:, None] & mask_n[None, :]
        offs = tile_offsets(b, offs_m, offs_n, rows, cols, FORMAT)
        var = widen(tl.load(var_ptr + offs, mask=mask, other=0.0))
        if mean_ptr is not None:
            mean = widen(tl.load(mean_ptr + offs, mask=mask, other=0.0))
        first_row = row_offset.to(tl.int64) + b * rows_total
        eps = tile_normals(seed, offs_m, block_n * BLOCK_N, first_row, first_quad, sample, BLOCK_N, QUADS)
        y = tl.sqrt(sample_variance(var, alpha))
        if mean_ptr is None:
            y = tl.fma(y, eps, bias)
        elif bias_ptr is None:
            y = tl.fma(y, eps, mean)
        else:
            y = tl.fma(y, eps, mean + bias)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
        b, other = next_tile(b, other, others, FORMAT)


def sample_pass(mean, var, scale, bias, seed, y, view, alpha, row_offset, col_offset, sample) -> torch.Tensor:
    """``mean + bias + sqrt(alpha var + 1e-16) eps`` into ``y``, which may be mean; mean, scale, bias may be None.

    mean, var and y lie in memory as ``view`` says. ``alpha`` is "layer", "neuron" or "none".
    """
    if y.numel() == 0:
        return y
    first_quad, shift = divmod(col_offset, 4)
    blocks = view.tiles(shift, var.itemsize)
    features, groups, steps = view.grid(shift, blocks)
    with device_guard(var):
        _lrt_sample_kernel[(features * groups,)](
            mean, var, scale, bias, seed, y, view.batch, view.rows, view.cols, view.rows_total, row_offset, first_quad,
            sample, steps, ALPHA=alpha, FORMAT=view.format, SHIFT=shift, **blocks, **EXACT,
        )  # fmt: skip
    return y


def output_of(mean, var, dtype) -> torch.Tensor:
    """Where the sample of intermediate ``mean`` and ``var`` goes: over mean if that has ``dtype``."""
    return mean if mean is not None and mean.dtype == dtype else torch.empty_like(var, dtype=dtype)


def lrt_sample_triton(mean, var, seed, row_offset=0, col_offset=0, sample=0, channels=0, channels_total=0):
    if mean.dtype == torch.float64:
        return lrt_sample_reference(mean, var, seed, row_offset, col_offset, sample, channels, channels_total)
    mean, view = mean.contiguous(), matrix_view(mean, channels, channels_total)
    place = (row_offset, col_offset, sample)
    return sample_pass(mean, var.contiguous(), None, None, seed, torch.empty_like(mean), view, "none", *place)


# ---- backward ------------------------------------------------------------------------------------------------------

REGISTERS = 96  # of a thread; left alone, ptxas aims at 72 on sm_100 and spills


@triton.jit(do_not_specialize=(*PLACE_ARGUMENTS, "rows_total", "steps"))
def _lrt_sample_backward_kernel(
    grad_ptr,  # [batch, rows, cols]
    var_ptr,  # [batch, rows, cols]
    scale_ptr,  # log_alpha [1] or [features], or None
    seed_ptr,
    grad_var_ptr,  # [batch, rows, cols], or None
    sum_grad_ptr,  # fp32 [groups, features], or None
    sum_alpha_ptr,  # fp32 [groups, features] of sum grad_var var, or None
    batch,
    rows,
    cols,
    rows_total,
    row_offset,
    first_quad,
    sample,
    steps,  # tiles in a group
    ALPHA: tl.constexpr,
    FORMAT: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest number of grad_var's dtype
    SHIFT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, group, b, other, others, count = program_tiles(batch, rows, cols, steps, FORMAT, SHIFT, BLOCK_M, BLOCK_N)
    if FORMAT == "linear":
        offs_n, mask_n = column_offsets(block, cols, SHIFT, BLOCK_N)
        features, mask_features = offs_n, mask_n
        alpha = output_alpha(scale_ptr, features[None, :], mask_features[None, :], ALPHA)
    else:
        offs_m, mask_m = row_offsets(block, rows, BLOCK_M)
        features, mask_features = offs_m, mask_m
        alpha = output_alpha(scale_ptr, features[:, None], mask_features[:, None], ALPHA)
    seed = tl.load(seed_ptr)
    acc_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_alpha = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for _ in range(count):
        if FORMAT == "linear":
            block_n = block
            offs_m, mask_m = row_offsets(other, rows, BLOCK_M)
        else:
            block_n = other
            offs_n, mask_n = column_offsets(other, cols, SHIFT, BLOCK_N)
        mask = mask_m[:, None] & mask_n[None, :]
        offs = tile_offsets(b, offs_m, offs_n, rows, cols, FORMAT)
        grad = widen(tl.load(grad_ptr + offs, mask=mask, other=0.0))
        if sum_grad_ptr is not None:
            acc_grad += grad
        if grad_var_ptr is not None or sum_alpha_ptr is not None:
            var = widen(tl.load(var_ptr + offs, mask=mask, other=0.0))
            first_row = row_offset.to(tl.int64) + b * rows_total
            eps = tile_normals(seed, offs_m, block_n * BLOCK_N, first_row, first_quad, sample, BLOCK_N, QUADS)
            # d y / d var = eps / (2 sqrt(var + 1e-16))
            grad_var = grad * eps * 0.5 * tl.rsqrt(sample_variance(var, alpha))
            grad_var = tl.clamp(grad_var, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            grad_var = tl.fma(grad, 0.0, grad_var)  # not finite where grad is not
            grad_var = tl.where(var < 0.0, 0.0, grad_var) * alpha
            if grad_var_ptr is not None:
                tl.store(grad_var_ptr + offs, grad_var.to(grad_var_ptr.dtype.element_ty), mask=mask)
            if sum_alpha_ptr is not None:
                acc_alpha = tl.fma(grad_var, var, acc_alpha)
        b, other = next_tile(b, other, others, FORMAT)

    AXIS: tl.constexpr = 0 if FORMAT == "linear" else 1
    width = cols if FORMAT == "linear" else rows
    if sum_grad_ptr is not None:
        tl.store(sum_grad_ptr + group.to(tl.int64) * width + features, tl.sum(acc_grad, axis=AXIS), mask=mask_features)
    if sum_alpha_ptr is not None:
        tl.store(
            sum_alpha_ptr + group.to(tl.int64) * width + features, tl.sum(acc_alpha, axis=AXIS), mask=mask_features
        )


def sample_backward_pass(
    grad, var, scale, seed, view, dtype, limit, alpha, row_offset, col_offset, sample, *,
    needs_var, needs_bias, needs_alpha,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(grad_var in ``dtype``, sum of grad ``[features]``, sum of grad_var var ``[features]``), None where not needed.

    grad and var lie in memory as ``view`` says and must not be empty. ``limit`` saturates grad_var before alpha.
    """
    if not (needs_var or needs_bias or needs_alpha):
        return None, None, None
    first_quad, shift = divmod(col_offset, 4)
    blocks = view.tiles(shift, var.itemsize)
    features, groups, steps = view.grid(shift, blocks)
    grad_var = torch.empty_like(var, dtype=dtype) if needs_var else None
    sums = [
        torch.empty((groups, view.features), dtype=torch.float32, device=var.device) if needed else None
        for needed in (needs_bias, needs_alpha)
    ]
    with device_guard(var):
        _lrt_sample_backward_kernel[(features * groups,)](
            grad, var, scale, seed, grad_var, *sums, view.batch, view.rows, view.cols, view.rows_total, row_offset,
            first_quad, sample, steps, ALPHA=alpha, FORMAT=view.format, LIMIT=limit, SHIFT=shift, maxnreg=REGISTERS,
            **blocks, **EXACT,
        )  # fmt: skip
    return grad_var, *(s if s is None else s.sum(0) for s in sums)


def lrt_sample_backward_triton(grad, var, seed, row_offset=0, col_offset=0, sample=0, channels=0, channels_total=0):
    if var.dtype == torch.float64:
        return lrt_sample_backward_reference(grad, var, seed, row_offset, col_offset, sample, channels, channels_total)
    if var.numel() == 0:
        return torch.empty_like(var)
    limit = torch.finfo(var.dtype).max
    grad_var, _, _ = sample_backward_pass(
        grad.contiguous(), var.contiguous(), None, seed, matrix_view(var, channels, channels_total), var.dtype, limit,
        "none", row_offset, col_offset, sample, needs_var=True, needs_bias=False, needs_alpha=False,
    )  # fmt: skip
    return grad_var


attach("lrt_sample", lrt_sample_triton)
attach("lrt_sample_backward", lrt_sample_backward_triton)
