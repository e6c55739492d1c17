"""Triton kernels of the kl family: csrc/kl_math.h on the GPU, step by step, and one pass per tensor over a list.

A program adds up ``ELEMENTS`` weights in fp32 and writes one fp64 partial sum; torch adds these in order: no atomics,
the same bits every time. Slopes are written in the same pass. Launched without fusing products into sums, so that a
slope has the bits of the C++ kernels'.
"""

import math

import torch
import triton
import triton.language as tl

from losssurf_fast._library import attach, device_guard
from losssurf_fast.ops import kl
from losssurf_fast.ops.noise_triton import EXACT

ELEMENTS = 512  # four a thread: fits in 64 registers without spills

# csrc/kl_math.h and csrc/elementary.h say where these come from.
_S = tl.constexpr((
    0.005813366733491421, -0.01503963116556406, 0.02707044780254364, -0.015892308205366135, 0.021547872573137283,
    0.013029651716351509, 0.028208494186401367, 0.040840618312358856, 0.0579250268638134, 0.07859434187412262,
    0.10557018965482712, 0.15233191847801208,
))  # fmt: skip
_V = tl.constexpr((
    1.5017041732789949e-05, 2.229033452749718e-05, -5.22162408742588e-05, -9.002930164569989e-05,
    9.592333663022146e-05, 0.00018148141680285335, -0.0002165944461012259, -0.00016704873996786773,
    0.0007180957472883165, -0.002395004266873002, 0.02426568791270256, -0.022377602756023407,
))  # fmt: skip
_SOFTPLUS = tl.constexpr((
    -6.33598756394349e-06, 2.0520894395303912e-05, -5.273368151392788e-05, 0.00018087736680172384,
    -0.0006428217166103423, 0.002289717085659504, -0.00846096221357584, 0.033152252435684204, -0.14426355063915253,
    0.8109301924705505,
))  # fmt: skip
_LOG = tl.constexpr((
    0.05357204005122185, -0.11968647688627243, 0.14920814335346222, -0.1681283861398697, 0.1998281627893448,
    -0.24995385110378265, 0.3333345055580139,
))  # fmt: skip
_EXP = tl.constexpr((
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
))  # fmt: skip
_FAR = tl.constexpr(-math.log(12))
_LINE = tl.constexpr(kl.FAR_CONSTANT)
_K1, _K2, _K3 = tl.constexpr(kl.K1), tl.constexpr(kl.K2), tl.constexpr(kl.K3)
_K1_K3 = tl.constexpr(kl.K1 * kl.K3)
_LOG2_E = tl.constexpr(1.44269504088896341)
_LN_2 = tl.constexpr(0.693147180559945)
_LN_2_HIGH, _LN_2_LOW = tl.constexpr(0.693145751953125), tl.constexpr(1.42860682030941723e-6)
_SHIFT = tl.constexpr(12582912.0)  # 1.5 2^23: adding it rounds to an integer

# ---- one weight ----------------------------------------------------------------------------------------------------


@triton.jit
def _exp_parts(x):
    """exp(x) = 2^n (1 + r + r^2 p), n in the low bits of ``shifted``."""
    shifted = tl.fma(x, _LOG2_E, _SHIFT)
    n = shifted - _SHIFT
    r = tl.fma(n, -_LN_2_LOW, tl.fma(n, -_LN_2_HIGH, x))
    p = tl.full(x.shape, _EXP[0], tl.float32)
    for i in tl.static_range(1, 6):
        p = tl.fma(p, r, _EXP[i])
    return r, p, shifted.to(tl.uint32, bitcast=True)


@triton.jit
def _power_of_two(shifted, BITS: tl.constexpr):
    return ((shifted << 23) + BITS).to(tl.float32, bitcast=True)


@triton.jit
def _exponential_or_zero(x):
    r, p, shifted = _exp_parts(tl.where(x < -88.0, -88.0, x))
    return (tl.fma(p, r * r, r) + 1.0) * _power_of_two(shifted, 0x3F800000)


@triton.jit
def _logarithm(x):
    subnormal = x < 2.0**-126
    bits = tl.where(subnormal, x * 2.0**24, x).to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F400000).to(tl.int32, bitcast=True) >> 23  # of the mantissa in [3/4, 3/2)
    f = (bits - (exponent << 23).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True) - 1.0
    exponent = tl.where(subnormal, exponent - 24, exponent)
    p = tl.full(x.shape, _LOG[0], tl.float32)
    for i in tl.static_range(1, 7):
        p = tl.fma(p, f, _LOG[i])
    f2 = f * f
    return tl.fma(exponent.to(tl.float32), _LN_2, tl.fma(f2 * f, p, tl.fma(f2, -0.5, f)))


@triton.jit
def _log_uniform_exact(log_alpha):
    far = log_alpha < _FAR
    t = _exponential_or_zero(tl.where(far, log_alpha, -log_alpha))
    w = t * tl.where(far, -24.0, -1.0 / 12.0)
    x = w + 1.0
    p = tl.where(far, _V[0], _S[0])
    derivative = p
    for i in tl.static_range(1, 12):
        if i > 1:
            derivative = tl.fma(derivative, x, p)
        p = tl.fma(p, x, tl.where(far, _V[i], _S[i]))
    line = tl.fma(log_alpha, -0.5, _LINE)
    slope = tl.fma(w, derivative, tl.where(far, -0.5, p))
    value = tl.fma(p, tl.where(far, 1.0, t), tl.where(far, line, 0.0))
    return value, slope * tl.where(far, 1.0, -t)


@triton.jit
def _half_softplus(log_alpha, t):
    """softplus(-log_alpha) / 2 from t = exp(-|log_alpha|)."""
    x = tl.fma(t, 2.0, -1.0)
    p = tl.full(x.shape, _SOFTPLUS[0], tl.float32)
    for i in tl.static_range(1, 10):
        p = tl.fma(p, x, _SOFTPLUS[i])
    return 0.5 * tl.fma(t, p, tl.where(log_alpha > 0.0, 0.0, -log_alpha))


@triton.jit
def _ard(log_alpha):
    t = _exponential_or_zero(-tl.abs(log_alpha))
    half_sigmoid = tl.div_rn(tl.where(log_alpha < 0.0, 1.0, t) * 0.5, t + 1.0)
    return _half_softplus(log_alpha, t), -half_sigmoid


@triton.jit
def _log_uniform_approximate(log_alpha):
    u = tl.fma(log_alpha, _K3, _K2)
    t = _exponential_or_zero(-tl.abs(log_alpha))
    s = _exponential_or_zero(-tl.abs(u))
    t1, s1 = t + 1.0, s + 1.0
    inverse = tl.div_rn(tl.full(t1.shape, 1.0, tl.float32), t1 * s1)
    inverse_s1 = inverse * t1
    half_sigmoid = tl.where(log_alpha < 0.0, 1.0, t) * 0.5 * (inverse * s1)
    sigmoid_u = tl.where(u < 0.0, 1.0, s) * inverse_s1
    value = tl.fma(sigmoid_u, _K1, _half_softplus(log_alpha, t))
    return value, tl.fma(s * (inverse_s1 * inverse_s1), -_K1_K3, -half_sigmoid)


@triton.jit
def _normal(weight, log_sigma2, inverse_std, log_variance):
    x = log_sigma2 - log_variance
    r, p, shifted = _exp_parts(tl.where(x < -87.0, -87.0, tl.where(x > 89.0, 89.0, x)))
    h = _power_of_two(shifted, 0x3F000000)
    tail, line = h * (r * r) * p, tl.where(x > 89.0, float("inf"), tl.fma(h, r, h - 0.5))
    spread = tl.fma(-x, 0.5, line) + tail
    scaled = weight * inverse_std
    return tl.fma(0.5 * scaled, scaled, spread), line + tail


# ---- sums and slopes -----------------------------------------------------------------------------------------------


@triton.jit
def _saturate(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit(do_not_specialize=("first",))
def _kl_kernel(
    param_ptr,  # [numel] log_alpha; log_sigma2 for "normal" and where weight_ptr is given
    weight_ptr,  # [numel] or None
    slope_ptr,  # [numel] or None
    slope_weight_ptr,  # [numel] or None
    partial_ptr,  # fp64, this tensor's from `first`
    first,
    numel,
    count,  # weights per element
    inverse_std,  # of the prior of "normal"
    log_variance,
    DIVERGENCE: tl.constexpr,
    LIMIT: tl.constexpr,  # largest numbers of the slopes' dtypes
    WEIGHT_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    param = tl.load(param_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.zeros(param.shape, tl.float32)
    log_alpha = param
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs, mask=mask, other=1.0).to(tl.float32)
        if DIVERGENCE != "normal":
            log_alpha = tl.fma(_logarithm(tl.abs(weight)), -2.0, param) + (weight - weight)
            log_alpha = tl.where(weight == 0.0, float("inf"), log_alpha)
    if DIVERGENCE == "normal":
        value, slope = _normal(weight, param, inverse_std, log_variance)
        slope = _saturate(slope, LIMIT)
    elif DIVERGENCE == "exact":
        value, slope = _log_uniform_exact(log_alpha)
    elif DIVERGENCE == "approximate":
        value, slope = _log_uniform_approximate(log_alpha)
    else:
        value, slope = _ard(log_alpha)
    if slope_ptr is not None:
        tl.store(slope_ptr + offs, slope.to(slope_ptr.dtype.element_ty), mask=mask)
    if slope_weight_ptr is not None:
        if DIVERGENCE == "normal":
            slope_weight = _saturate(weight * inverse_std * inverse_std, WEIGHT_LIMIT)
        else:
            slope_weight = tl.where(weight == 0.0, 0.0, _saturate(tl.div_rn(-2.0 * slope, weight), WEIGHT_LIMIT))
        tl.store(slope_weight_ptr + offs, slope_weight.to(slope_weight_ptr.dtype.element_ty), mask=mask)
    total = tl.sum(tl.where(mask, value, 0.0)).to(tl.float64) * count
    tl.store(partial_ptr + first + tl.program_id(0), total)


def kl_pass(divergence, params, weights, counts, want_slopes, prior_std=1.0):
    """(sum, slopes) of a list of contiguous fp32, bf16 and fp16 tensors; ``divergence`` names the formula."""
    slopes = [torch.empty_like(t) for t in (*params, *weights)] if want_slopes else []
    programs = [triton.cdiv(t.numel(), ELEMENTS) for t in params]
    partials = torch.empty(sum(programs), dtype=torch.float64, device=params[0].device)
    prior = (1 / prior_std, 2 * math.log(prior_std))
    first = 0
    with device_guard(partials):
        for i, param in enumerate(params):
            if programs[i] == 0:
                continue
            weight = weights[i] if weights else None
            slope = slopes[i] if slopes else None
            slope_weight = slopes[len(params) + i] if slopes and weights else None
            limits = [3.4028234663852886e38 if t is None else torch.finfo(t.dtype).max for t in (param, weight)]
            _kl_kernel[(programs[i],)](
                param, weight, slope, slope_weight, partials, first, param.numel(), float(counts[i]), *prior,
                DIVERGENCE=divergence, LIMIT=limits[0], WEIGHT_LIMIT=limits[1], BLOCK=ELEMENTS, **EXACT,
            )  # fmt: skip
            first += programs[i]
    return partials.sum().to(torch.float32), slopes


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def _kl_scale_kernel(
    slope_ptr,  # [numel]
    grad_ptr,  # 0-d
    out_ptr,  # [numel]
    numel,
    count,
    BLOCK: tl.constexpr,
):
    factor = tl.load(grad_ptr).to(tl.float32) * count
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    slope = tl.load(slope_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (slope * factor).to(out_ptr.dtype.element_ty), mask=mask)


def kl_backward_triton(slopes, grad, counts):
    if len(counts) != len(slopes) or grad.numel() != 1:
        got = f"{len(counts)}, {len(slopes)} and {tuple(grad.shape)}"
        raise ValueError(f"kl_backward: counts must be as many as slopes and grad 0-d, got {got}")
    if any(s.dtype == torch.float64 for s in slopes):
        return kl.kl_backward_reference(slopes, grad, counts)
    slopes = [s.contiguous() for s in slopes]
    out = [torch.empty_like(s) for s in slopes]
    with device_guard(grad):
        for slope, count, result in zip(slopes, counts, out, strict=True):
            if slope.numel() > 0:
                _kl_scale_kernel[(triton.cdiv(slope.numel(), ELEMENTS),)](
                    slope, grad, result, slope.numel(), float(count), BLOCK=ELEMENTS
                )
    return out


# ---- operators -----------------------------------------------------------------------------------------------------


def check_lists(name: str, params, weights, counts) -> None:
    """What the kernels' pointers rely on; ops/kl.py has the checks that explain."""
    shapes, found = [tuple(t.shape) for t in params], [tuple(t.shape) for t in weights]
    if not params or len(counts) != len(params) or found not in ([], shapes):
        raise ValueError(
            f"{name}: weight must have its parameters' shapes {shapes} or be empty, got {found}; counts must be as "
            f"many, got {len(counts)}"
        )
    if any((p.dtype == torch.float64) != (w.dtype == torch.float64) for p, w in zip(params, weights, strict=False)):
        raise TypeError(f"{name}: weight and its parameter must both be float64 or neither")


def _attach(name, divergence, reference, slopes_reference):
    """``divergence(*options)`` gives the kernel's name for the formula and the prior's standard deviation."""

    def run(want_slopes, params, weights, counts, options):
        contiguous = [[t.contiguous() for t in tensors] for tensors in (params, weights)]
        kind, prior_std = divergence(*options)
        return kl_pass(kind, *contiguous, counts, want_slopes, prior_std)

    def value(params, weights, counts, *options):
        check_lists(name, params, weights, counts)
        if any(t.dtype == torch.float64 for t in params):
            return reference(params, weights, counts, *options)
        return run(False, params, weights, counts, options)[0]

    def value_and_slopes(params, weights, counts, *options):
        check_lists(name, params, weights, counts)
        if any(t.dtype == torch.float64 for t in params):
            return slopes_reference(params, weights, counts, *options)
        return run(True, params, weights, counts, options)

    attach(name, value)
    attach(f"{name}_slopes", value_and_slopes)


_attach(
    "kl_log_uniform",
    lambda exact: ("exact" if exact else "approximate", 1.0),
    kl.kl_log_uniform_reference,
    kl.kl_log_uniform_slopes_reference,
)
_attach("kl_ard", lambda: ("ard", 1.0), kl.kl_ard_reference, kl.kl_ard_slopes_reference)
_attach("kl_normal", lambda prior_std: ("normal", prior_std), kl.kl_normal_reference, kl.kl_normal_slopes_reference)
attach("kl_backward", kl_backward_triton)
