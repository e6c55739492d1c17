"""Triton kernels between variance and sample: ``lrt_sample``, its backward, and both as passes of ``lrt_linear``.

As a pass of ``lrt_linear`` the forward kernel also adds the bias and the "layer" and "neuron" forms scale the variance
by alpha; the backward kernel also returns, in the same pass, the sums over rows that make the gradients of bias and of
log_alpha. The sums are taken over ``ROWS_PER_SUM`` rows per program and added by torch: no atomics, the same bits
every time.
"""

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops.lrt import EPSILON, lrt_sample_backward_reference, lrt_sample_reference
from losssurf_fast.ops.noise_triton import EXACT, PLACE_ARGUMENTS, column_blocks, elementwise_tiles, tile_normals

ROWS_PER_SUM = 128

_EPSILON = tl.constexpr(EPSILON)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_LOW = tl.constexpr(1.925963033500011e-08)  # log2(e) minus its fp32 rounding

# ---- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def exact_exp(x):
    """exp in fp32 to a few units in the last place; tl.exp loses |x| / 2 of them by rounding x log2(e)."""
    x = tl.where(x < -200.0, -200.0, tl.where(x > 200.0, 200.0, x))  # infinities too; NaN stays
    n = tl.floor(x * _LOG2_E)
    f = tl.fma(x, _LOG2_E_LOW, tl.fma(x, _LOG2_E, -n))
    return tl.exp2(f) * tl.exp2(n)


@triton.jit
def output_alpha(scale_ptr, offs_n, mask_n, ALPHA: tl.constexpr):
    """alpha of the output features, broadcastable to [BLOCK_M, BLOCK_N]; 1 where it is part of the variance."""
    if ALPHA == "layer":
        alpha = exact_exp(tl.load(scale_ptr).to(tl.float32))
    elif ALPHA == "neuron":
        alpha = exact_exp(tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32))[None, :]
    else:
        alpha = 1.0
    return alpha


@triton.jit
def nonnegative(x):
    return tl.where(x < 0.0, 0.0, x)  # unlike tl.maximum keeps NaN


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=PLACE_ARGUMENTS)
def _lrt_sample_kernel(
    mean_ptr,  # [M, O], or None for zero
    var_ptr,  # [M, O]
    scale_ptr,  # log_alpha [1] or [O], or None
    bias_ptr,  # [O] or None
    seed_ptr,
    y_ptr,  # [M, O]
    M,
    O,  # noqa: E741
    row_offset,
    first_quad,
    sample,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_n = column_blocks(O, SHIFT, BLOCK_N)
    start_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N) - SHIFT
    mask_n = (offs_n >= 0) & (offs_n < O)
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * O + offs_n[None, :]

    var = tl.load(var_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    var *= output_alpha(scale_ptr, offs_n, mask_n, ALPHA)
    eps = tile_normals(seed_ptr, offs_m, start_n, row_offset, first_quad, sample, BLOCK_N)
    y = tl.sqrt(nonnegative(var) + _EPSILON) * eps
    if mean_ptr is not None:
        y += tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def sample_pass(mean, var, scale, bias, seed, dtype, alpha, row_offset, col_offset, sample) -> torch.Tensor:
    """``mean + bias + sqrt(alpha var + 1e-16) eps`` ``[M, O]`` in ``dtype``; mean, scale, bias may be None.

    ``alpha`` is "layer", "neuron" or "none".
    """
    y = torch.empty(var.shape, dtype=dtype, device=var.device)
    if y.numel() == 0:
        return y
    rows, cols = var.shape
    first_quad, shift = divmod(col_offset, 4)
    programs, blocks = elementwise_tiles(rows, cols + shift)
    with device_guard(var):
        _lrt_sample_kernel[(programs,)](
            mean, var, scale, bias, seed, y, rows, cols, row_offset, first_quad, sample,
            ALPHA=alpha, SHIFT=shift, **blocks, **EXACT,
        )  # fmt: skip
    return y


def lrt_sample_triton(mean, var, seed, row_offset=0, col_offset=0, sample=0):
    if mean.dtype == torch.float64:
        return lrt_sample_reference(mean, var, seed, row_offset, col_offset, sample)
    place = (row_offset, col_offset, sample)
    return sample_pass(mean.contiguous(), var.contiguous(), None, None, seed, mean.dtype, "none", *place)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=(*PLACE_ARGUMENTS, "steps"))
def _lrt_sample_backward_kernel(
    grad_ptr,  # [M, O]
    var_ptr,  # [M, O]
    scale_ptr,  # log_alpha [1] or [O], or None
    seed_ptr,
    grad_var_ptr,  # [M, O], or None
    sum_grad_ptr,  # fp32 [row groups, O], or None
    sum_alpha_ptr,  # fp32 [row groups, O] of sum grad_var var, or None
    M,
    O,  # noqa: E741
    row_offset,
    first_quad,
    sample,
    steps,  # tiles of BLOCK_M rows in a row group
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest number of grad_var's dtype
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_n = column_blocks(O, SHIFT, BLOCK_N)
    start_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N
    group = (tl.program_id(0) // num_n).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N) - SHIFT
    mask_n = (offs_n >= 0) & (offs_n < O)
    alpha = output_alpha(scale_ptr, offs_n, mask_n, ALPHA)
    acc_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_alpha = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for step in range(steps):
        offs_m = (group * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        offs = offs_m[:, None] * O + offs_n[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if sum_grad_ptr is not None:
            acc_grad += grad
        if grad_var_ptr is not None or sum_alpha_ptr is not None:
            var = tl.load(var_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            eps = tile_normals(seed_ptr, offs_m, start_n, row_offset, first_quad, sample, BLOCK_N)
            # d y / d var = eps / (2 sqrt(var + 1e-16))
            grad_var = grad * eps * 0.5 * tl.rsqrt(nonnegative(var * alpha) + _EPSILON)
            grad_var = tl.where(grad_var > LIMIT, LIMIT, tl.where(grad_var < -LIMIT, -LIMIT, grad_var))
            grad_var += grad - grad  # not finite where grad is not
            grad_var = tl.where(var < 0.0, 0.0, grad_var) * alpha
            if grad_var_ptr is not None:
                tl.store(grad_var_ptr + offs, grad_var.to(grad_var_ptr.dtype.element_ty), mask=mask)
            if sum_alpha_ptr is not None:
                acc_alpha += grad_var * var

    if sum_grad_ptr is not None:
        tl.store(sum_grad_ptr + group * O + offs_n, tl.sum(acc_grad, axis=0), mask=mask_n)
    if sum_alpha_ptr is not None:
        tl.store(sum_alpha_ptr + group * O + offs_n, tl.sum(acc_alpha, axis=0), mask=mask_n)


def sample_backward_pass(
    grad, var, scale, seed, dtype, limit, alpha, row_offset, col_offset, sample, *, needs_var, needs_bias, needs_alpha
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(grad_var ``[M, O]`` in ``dtype``, sum of grad ``[O]``, sum of grad_var var ``[O]``), None where not needed.

    M and O must not be 0. ``limit`` saturates grad_var before alpha.
    """
    if not (needs_var or needs_bias or needs_alpha):
        return None, None, None
    rows, cols = var.shape
    first_quad, shift = divmod(col_offset, 4)
    _, blocks = elementwise_tiles(rows, cols + shift)
    steps = 1
    if needs_bias or needs_alpha:
        steps = triton.cdiv(min(rows, ROWS_PER_SUM), blocks["BLOCK_M"])
    groups = triton.cdiv(rows, blocks["BLOCK_M"] * steps)
    programs = groups * triton.cdiv(cols + shift, blocks["BLOCK_N"])
    grad_var = torch.empty(var.shape, dtype=dtype, device=var.device) if needs_var else None
    sums = [
        torch.empty((groups, cols), dtype=torch.float32, device=var.device) if needed else None
        for needed in (needs_bias, needs_alpha)
    ]
    with device_guard(var):
        _lrt_sample_backward_kernel[(programs,)](
            grad, var, scale, seed, grad_var, *sums, rows, cols, row_offset, first_quad, sample, steps,
            ALPHA=alpha, LIMIT=limit, SHIFT=shift, **blocks, **EXACT,
        )  # fmt: skip
    return grad_var, *(s if s is None else s.sum(0) for s in sums)


def lrt_sample_backward_triton(grad, var, seed, row_offset=0, col_offset=0, sample=0):
    if var.dtype == torch.float64:
        return lrt_sample_backward_reference(grad, var, seed, row_offset, col_offset, sample)
    if var.numel() == 0:
        return torch.empty_like(var)
    limit = torch.finfo(var.dtype).max
    grad_var, _, _ = sample_backward_pass(
        grad.contiguous(), var.contiguous(), None, seed, var.dtype, limit, "none", row_offset, col_offset, sample,
        needs_var=True, needs_bias=False, needs_alpha=False,
    )  # fmt: skip
    return grad_var


attach("lrt_sample", lrt_sample_triton)
attach("lrt_sample_backward", lrt_sample_backward_triton)
