"""KL divergences of Gaussian weight posteriors: one number for a whole model, its gradients in the same pass.

With w ~ N(weight, sigma^2), alpha = sigma^2 / weight^2 and log_alpha = log_sigma2 - log(weight^2), per weight::

    kl_log_uniform   KL(q || 1/|w|) up to a constant chosen so that it goes to 0 as alpha goes to infinity.
                     With mu = 1 / (2 alpha) and Dawson's function D(z) = exp(-z^2) int_0^z exp(t^2) dt:
                         KL = 2 int_0^sqrt(mu) D(z) dz = int_0^1 (1 - exp(-mu (1 - v^2))) / (1 - v^2) dv
                         dKL / dlog_alpha = -sqrt(mu) D(sqrt(mu)) = -mu int_0^1 exp(-mu (1 - v^2)) dv
      exact=False    k1 sigmoid(-k2 - k3 log_alpha) + softplus(-log_alpha) / 2,  k = 0.63576, 1.8732, 1.48695
    kl_ard           softplus(-log_alpha) / 2 = log(1 + 1 / alpha) / 2
    kl_normal        KL(q || N(0, p^2)) = (sigma^2 / p^2 + weight^2 / p^2 - 1 - log_sigma2 + 2 log p) / 2

Sources: Kingma, Salimans and Welling, NIPS 2015 (the log-uniform prior); Molchanov, Ashukha and Vetrov, "Variational
dropout sparsifies deep neural networks", ICML 2017 (the three constants; they are up to 0.0094 off in the value and
0.014 in the slope); Kharitonov, Molchanov and Vetrov, "Variational dropout via empirical Bayes", 2018 (ARD). That the
exact KL has Dawson's function for its derivative: Hron, Matthews and Ghahramani, ICML 2018.

Numerics: per weight and inside chunks of 2048 in fp32 (fp64 for fp64), chunks are added in fp64 in order, so the result
does not depend on threads. The pass leaves one slope per parameter element, in the parameter's dtype; backward
multiplies by the incoming gradient and by how many weights an element of log_alpha covers, rounded once more.

Floors, per weight: 8 bytes in fp32 (read the parameter, write its slope; 16 with ``weight``), the scaling in backward 8
more; 33 multiply-adds, 15 selections and 15 other steps for the exact KL with its slope.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from losssurf_fast._library import composite_backward, composite_needed, define, register_autograd_kernel

KL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
K1, K2, K3 = 0.63576, 1.8732, 1.48695
FAR = -math.log(72)  # log_alpha of mu = 36, past which the asymptotic series is used
FAR_CONSTANT = 0.5 * (math.log(2) + np.euler_gamma)

# ---- one weight: (value, slope to log_alpha) in plain torch ---------------------------------------------------------
# `precision` is 1 / alpha where log_alpha >= FAR, and anything finite elsewhere.


@functools.cache
def _quadrature() -> list[tuple[float, float]]:
    """(1 - v^2, weight) of Gauss and Legendre's rule on [0, 1]; the integrands are even, so 64 nodes are 32."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    return [(1 - v * v, w) for v, w in zip(nodes.tolist(), weights.tolist(), strict=True) if v > 0]


def _log_uniform(log_alpha: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mu = 0.5 * precision
    near_value = near_slope = 0
    for c, w in _quadrature():
        decay = torch.expm1(-c * mu)
        near_value = near_value - w / c * decay
        near_slope = near_slope - w * (decay + 1)
    # 2 int D and z D(z) from D(z) ~ sum (2k - 1)!! / (2^(k + 1) z^(2k + 1))
    far_log_alpha = log_alpha.clamp(max=FAR)
    double_alpha = 2 * far_log_alpha.exp()  # 1 / mu
    far_value, far_slope = FAR_CONSTANT - 0.5 * far_log_alpha, -0.5
    term = 0.5
    for k in range(1, 30):
        term = term * (k - 0.5) * double_alpha
        far_value, far_slope = far_value - term / k, far_slope - term
    far = log_alpha < FAR
    return torch.where(far, far_value, near_value), torch.where(far, far_slope, near_slope * mu)


def _ard(log_alpha: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    far = log_alpha < FAR
    softplus = torch.where(far, F.softplus(-log_alpha.clamp(max=FAR), threshold=50), torch.log1p(precision))
    return 0.5 * softplus, -0.5 * torch.sigmoid(-log_alpha)


def _log_uniform_approximate(log_alpha: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, slope = _ard(log_alpha, precision)
    s = torch.sigmoid(-K2 - K3 * log_alpha)
    return value + K1 * s, slope - K1 * K3 * s * torch.sigmoid(K2 + K3 * log_alpha)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _of_log_alpha(term, log_alpha):
    """(sum, [slopes]) of ``term`` over a tensor of log_alpha."""
    log_alpha = _wide(log_alpha)
    value, slope = term(log_alpha, torch.exp(-log_alpha.clamp(min=FAR)))
    return value.sum(), [slope]


def _of_weight(term, log_sigma2, weight):
    """(sum, [slopes to log_sigma2, slopes to weight]); a weight of 0 has log_alpha = inf, KL 0 and slopes 0."""
    log_sigma2, weight = _wide(log_sigma2), _wide(weight)
    zero = weight == 0
    log_alpha = torch.where(zero, math.inf, log_sigma2 - 2 * torch.where(zero, 1.0, weight).abs().log())
    # From the weight itself, so that the value is twice differentiable at 0; the clamp keeps 0 exp(...) from 0 inf, and
    # two factors reach the smallest weights.
    least = -3.9 * math.log(torch.finfo(log_sigma2.dtype).max)
    near = torch.where(log_alpha < FAR, 0.0, weight)
    factor = torch.exp(-0.25 * log_sigma2.clamp(min=least))
    value, slope = term(log_alpha, (near * factor * factor).square())
    return value.sum(), [slope, torch.where(zero, 0.0, -2 * slope / torch.where(zero, 1.0, weight))]


def _result_dtype(params) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in params) else torch.float32


def _collect(params, weights, counts, parts):
    """(sum of counts[i] value_i, slopes to params then weights) of the (value, slopes) of each tensor.

    The slopes are in the dtypes of params and weights, within their finite numbers.
    """
    total, slopes = params[0].new_zeros((), dtype=_result_dtype(params)), []
    for (value, slope), count in zip(parts, counts, strict=True):
        total = total + count * value
        slopes.append(slope)
    rounded = []
    for slope, t in zip(itertools.chain(*zip(*slopes, strict=True)), (*params, *weights), strict=True):
        limit = torch.finfo(t.dtype).max
        rounded.append(slope.clamp(-limit, limit).to(t.dtype).contiguous())
    return total, rounded


def _log_alpha_result(term, log_alpha, weight, counts):
    if weight:
        parts = [_of_weight(term, s, w) for s, w in zip(log_alpha, weight, strict=True)]
    else:
        parts = [_of_log_alpha(term, t) for t in log_alpha]
    return _collect(log_alpha, weight, counts, parts)


# ---- operators ------------------------------------------------------------------------------------------------------
# Each divergence is two operators: `<name>` returns the sum over all weights, `<name>_slopes` returns (sum, slopes).
# Their arguments: `log_alpha`, a list of tensors; `weight`, an empty list, or one tensor for each, in which case
# log_alpha is log_sigma2; `counts`, how many weights an element of each tensor covers; options. The slopes are
# dKL / dlog_alpha of one weight for each element of log_alpha, then those to the weights.


def kl_log_uniform_reference(log_alpha, weight, counts, exact):
    return kl_log_uniform_slopes_reference(log_alpha, weight, counts, exact)[0]


def kl_log_uniform_slopes_reference(log_alpha, weight, counts, exact):
    return _log_alpha_result(_log_uniform if exact else _log_uniform_approximate, log_alpha, weight, counts)


def kl_ard_reference(log_alpha, weight, counts):
    return kl_ard_slopes_reference(log_alpha, weight, counts)[0]


def kl_ard_slopes_reference(log_alpha, weight, counts):
    return _log_alpha_result(_ard, log_alpha, weight, counts)


def kl_normal_reference(log_sigma2, weight, counts, prior_std):
    return kl_normal_slopes_reference(log_sigma2, weight, counts, prior_std)[0]


def kl_normal_slopes_reference(log_sigma2, weight, counts, prior_std):
    def part(log_sigma2, weight=None):
        x = _wide(log_sigma2) - 2 * math.log(prior_std)
        growth = torch.expm1(x)
        if weight is None:
            return 0.5 * (growth - x).sum(), [0.5 * growth]
        scaled = _wide(weight) / prior_std
        return 0.5 * (growth - x + scaled.square()).sum(), [0.5 * growth, scaled / prior_std]

    parts = map(part, log_sigma2, weight) if weight else map(part, log_sigma2)
    return _collect(log_sigma2, weight, counts, parts)


def kl_backward_reference(slopes, grad, counts):
    """``slopes[i] * grad * counts[i]`` in the slopes' dtypes, from a 0-d ``grad``."""
    return [(_wide(s) * (grad * count)).to(s.dtype) for s, count in zip(slopes, counts, strict=True)]


define(
    "kl_backward(Tensor[] slopes, Tensor grad, SymInt[] counts) -> Tensor[]",
    reference=kl_backward_reference,
    fake=lambda slopes, grad, counts: [s.new_empty(s.shape) for s in slopes],
)


def _scale(slopes, grad, counts):
    """kl_backward, also where its kernel cannot be called."""
    if type(grad) is not torch.Tensor:  # a tracer's
        return torch.ops.losssurf_fast.kl_backward.default(slopes, grad, counts)
    if composite_needed() or torch._C._functorch.is_legacy_batchedtensor(grad):  # a batch of gradients
        return kl_backward_reference(slopes, grad, counts)
    return torch.ops.losssurf_fast.kl_backward.default(slopes, grad, counts)


class _Divergence(torch.autograd.Function):
    """Keeps the slopes of the forward pass for backward, which the caller of the operator does not see."""

    @staticmethod
    def forward(ctx, slopes_op, reference, num_params, counts, options, *tensors):
        params, weights = list(tensors[:num_params]), list(tensors[num_params:])
        value, slopes = slopes_op(params, weights, counts, *options)
        ctx.reference, ctx.num_params, ctx.counts, ctx.options = reference, num_params, counts, options
        ctx.save_for_backward(*tensors, *slopes)
        return value

    @staticmethod
    def backward(ctx, grad):
        others = [None] * 5
        needed = ctx.needs_input_grad[5:]
        tensors, slopes = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        if torch.is_grad_enabled():  # double backward
            n = ctx.num_params
            formula = lambda *t: ctx.reference(t[:n], t[n:], ctx.counts, *ctx.options)
            return *others, *composite_backward(formula, tensors, grad, needed)
        counts = [*ctx.counts, *[1] * (len(needed) - ctx.num_params)]
        wanted = [i for i, need in enumerate(needed) if need]
        found = iter(_scale([slopes[i] for i in wanted], grad, [counts[i] for i in wanted]))
        return *others, *(next(found) if need else None for need in needed)


def _define(name: str, arguments: str, reference, slopes_reference) -> None:
    """Define `<name>` and `<name>_slopes`; the first is differentiated by what the second returns."""
    fake_sum = lambda params, *_: params[0].new_empty((), dtype=_result_dtype(params))
    fake_slopes = lambda params, weights: [t.new_empty(t.shape) for t in (*params, *weights)]
    define(f"{name}({arguments}) -> Tensor", reference=reference, fake=fake_sum)
    define(
        f"{name}_slopes({arguments}) -> (Tensor, Tensor[])",
        reference=slopes_reference,
        fake=lambda params, weights, *_: (fake_sum(params), fake_slopes(params, weights)),
    )
    op = getattr(torch.ops.losssurf_fast, name).default
    slopes_op = getattr(torch.ops.losssurf_fast, f"{name}_slopes").default

    def autograd(params, weights, counts, *options):
        if composite_needed():
            return reference(params, weights, counts, *options)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*params, *weights)):
            return _Divergence.apply(slopes_op, reference, len(params), counts, options, *params, *weights)
        with torch._C._AutoDispatchBelowAutograd():
            return op(params, weights, counts, *options)

    register_autograd_kernel(name, autograd)


_LISTS = "Tensor[] log_alpha, Tensor[] weight, SymInt[] counts"
_define("kl_log_uniform", f"{_LISTS}, bool exact", kl_log_uniform_reference, kl_log_uniform_slopes_reference)
_define("kl_ard", _LISTS, kl_ard_reference, kl_ard_slopes_reference)
_define(
    "kl_normal",
    f"{_LISTS.replace('alpha', 'sigma2')}, float prior_std",
    kl_normal_reference,
    kl_normal_slopes_reference,
)

# ---- public functions -----------------------------------------------------------------------------------------------

Tensors = torch.Tensor | Sequence[torch.Tensor]


def _as_list(name: str, argument: str, tensors: Tensors) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    if not isinstance(tensors, Sequence) or not all(isinstance(t, torch.Tensor) for t in tensors):
        got = type(tensors).__name__
        if isinstance(tensors, Sequence) and not isinstance(tensors, str):
            got += f" of {', '.join(sorted({type(t).__name__ for t in tensors}))}"
        raise TypeError(f"{name}: {argument} must be a tensor or a sequence of tensors, got {got}")
    if not tensors:
        raise ValueError(f"{name}: {argument} must hold at least one tensor, got an empty {type(tensors).__name__}")
    return list(tensors)


def _check_tensors(name: str, argument: str, params: Tensors, weight: Tensors | None):
    """(params, weights) as lists; ``weights`` is empty without ``weight``."""
    params = _as_list(name, argument, params)
    weights = [] if weight is None else _as_list(name, "weight", weight)
    if weight is not None and len(weights) != len(params):
        raise ValueError(f"{name}: weight must hold {len(params)} tensors like {argument}, got {len(weights)}")
    for label, tensors in ((argument, params), ("weight", weights)):
        for t in tensors:
            if t.dtype not in KL_DTYPES:
                raise TypeError(f"{name}: {label} must have one of the dtypes {KL_DTYPES}, got {t.dtype}")
            if t.device != params[0].device:
                raise ValueError(f"{name}: {label} must be on one device, {params[0].device}, got {t.device}")
            if t.layout != torch.strided:
                raise ValueError(f"{name}: {label} must be strided, got {t.layout}")
    for p, w in zip(params, weights, strict=False):
        if p.shape != w.shape:
            raise ValueError(f"{name}: weight must have {argument}'s shape {tuple(p.shape)}, got {tuple(w.shape)}")
        if (p.dtype == torch.float64) != (w.dtype == torch.float64):
            raise TypeError(f"{name}: weight and {argument} must both be float64 or neither, got {w.dtype}, {p.dtype}")
    return params, weights


def _as_counts(name: str, params: list[torch.Tensor], has_weight: bool, numel: int | Sequence[int] | None) -> list[int]:
    """How many weights one element of each parameter covers."""
    if numel is None:
        return [1] * len(params)
    if has_weight:
        raise ValueError(f"{name}: numel must be None where weight is given, got {numel}")
    numels = [numel] if isinstance(numel, int | torch.SymInt) else numel
    is_int = lambda n: isinstance(n, int | torch.SymInt) and not isinstance(n, bool)
    if not isinstance(numels, Sequence) or not all(is_int(n) for n in numels):
        raise TypeError(f"{name}: numel must be an int or a sequence of ints, got {numel!r}")
    if len(numels) != len(params):
        raise ValueError(f"{name}: numel must hold {len(params)} ints like log_alpha, got {len(numels)}")
    for t, n in zip(params, numels, strict=True):
        if n < 0 or n % max(t.numel(), 1) != 0 or (t.numel() == 0 and n != 0):
            raise ValueError(
                f"{name}: numel must be a multiple of log_alpha's number of elements, {t.numel()} "
                f"of shape {tuple(t.shape)}, got {n}"
            )
    return [n // max(t.numel(), 1) for t, n in zip(params, numels, strict=True)]


def _call(name: str, reference, *arguments) -> torch.Tensor:
    function = reference if composite_needed() else getattr(torch.ops.losssurf_fast, name).default
    return function(*arguments)


def kl_log_uniform(
    log_alpha: Tensors,
    numel: int | Sequence[int] | None = None,
    exact: bool = True,
    *,
    weight: Tensors | None = None,
) -> torch.Tensor:
    """KL divergence to the log-uniform prior, summed over all weights: the variational dropout of a whole model.

    It goes to 0 as alpha goes to infinity and is finite, with a finite gradient, for every finite log_alpha.

    Args:
        log_alpha: a tensor of any shape or a list of them (float64, float32, bfloat16, float16; lists may mix). With
            ``weight``, these are ``log_sigma2``: the "additive" parameterization.
        numel: how many weights each tensor of log_alpha covers, an int or a list of ints: ``weight.numel()`` for the
            ``log_alpha`` [1] of "layer" and [O] of "neuron". Its own number of elements by default.
        exact: False for the three-constant approximation of Molchanov et al.
        weight: the means, shaped as ``log_alpha``: then log_alpha = log_sigma2 - log(weight^2), and one pass gives the
            gradients to both. A weight of 0 has KL 0 and gradients 0.

    Returns:
        A 0-d tensor, float32, or float64 where a parameter is. Gradients have the parameters' dtypes.

    Raises:
        TypeError, ValueError: a dtype, device, shape, length or number is not as above.
    """
    name = "kl_log_uniform"
    params, weights = _check_tensors(name, "log_alpha", log_alpha, weight)
    counts = _as_counts(name, params, weight is not None, numel)
    if not isinstance(exact, bool):
        raise TypeError(f"{name}: exact must be a bool, got {type(exact).__name__}")
    return _call(name, kl_log_uniform_reference, params, weights, counts, exact)


def kl_ard(
    log_alpha: Tensors, numel: int | Sequence[int] | None = None, *, weight: Tensors | None = None
) -> torch.Tensor:
    """KL divergence to a Gaussian prior of the best variance for each weight (ARD): ``sum log(1 + 1 / alpha) / 2``.

    Arguments, result and errors as in :func:`kl_log_uniform`.
    """
    params, weights = _check_tensors("kl_ard", "log_alpha", log_alpha, weight)
    counts = _as_counts("kl_ard", params, weight is not None, numel)
    return _call("kl_ard", kl_ard_reference, params, weights, counts)


def kl_normal(weight: Tensors | None, log_sigma2: Tensors, prior_std: float = 1.0) -> torch.Tensor:
    """``KL(N(weight, exp(log_sigma2)) || N(0, prior_std^2))``, summed over all weights.

    Args:
        weight: means, shaped as ``log_sigma2``; None for means of 0 (the "variance" parameterization).
        log_sigma2: a tensor or a list of tensors (float64, float32, bfloat16, float16).
        prior_std: the prior's standard deviation, a normal number of float32.

    Returns:
        A 0-d tensor, float32, or float64 where a parameter is. Gradients have the parameters' dtypes.

    Raises:
        TypeError, ValueError: a dtype, device, shape, length or number is not as above.
    """
    params, weights = _check_tensors("kl_normal", "log_sigma2", log_sigma2, weight)
    if not isinstance(prior_std, int | float) or isinstance(prior_std, bool):
        raise TypeError(f"kl_normal: prior_std must be a number, got {type(prior_std).__name__}")
    finite = torch.finfo(torch.float32)
    if not finite.tiny <= prior_std <= finite.max:
        raise ValueError(f"kl_normal: prior_std must lie in [{finite.tiny:.2g}, {finite.max:.2g}], got {prior_std}")
    return _call("kl_normal", kl_normal_reference, params, weights, [1] * len(params), float(prior_std))
