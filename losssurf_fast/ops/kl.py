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

Letters: P tensors in a list.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from losssurf_fast._library import (
    composite_backward,
    composite_needed,
    define,
    register_autograd,
    saved_memory_is_free,
)

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
    # From the weight itself, so that the value is twice differentiable at 0; the clamp keeps 0 exp(...) from 0 inf.
    least = -1.9 * math.log(torch.finfo(log_sigma2.dtype).max)
    near = torch.where(log_alpha < FAR, 0.0, weight)
    value, slope = term(log_alpha, (near * torch.exp(-0.5 * log_sigma2.clamp(min=least))).square())
    return value.sum(), [slope, torch.where(zero, 0.0, -2 * slope / torch.where(zero, 1.0, weight))]


def _collect(params, weights, counts, want_slopes, parts):
    """Add up the (sum, slopes) of every tensor; slopes as the operators return them."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in params) else torch.float32
    total = params[0].new_zeros((), dtype=wide)
    slopes = []
    for (value, slope), count in zip(parts, counts, strict=True):
        total = total + count * value
        slopes.append(slope)
    if not want_slopes:
        return total, []
    limits = [torch.finfo(t.dtype).max for t in (*params, *weights)]
    flat = [slope[0] for slope in slopes] + [slope[1] for slope in slopes if weights]
    return total, [
        s.clamp(-limit, limit).to(t.dtype).contiguous()
        for s, t, limit in zip(flat, (*params, *weights), limits, strict=True)
    ]


def _prior_reference(term, log_alpha, weight, counts, slopes):
    parts = map(functools.partial(_of_weight, term), log_alpha, weight) if weight else (
        _of_log_alpha(term, t) for t in log_alpha
    )
    return _collect(log_alpha, weight, counts, slopes, parts)


# ---- operators ------------------------------------------------------------------------------------------------------


def kl_log_uniform_reference(log_alpha, weight, counts, exact=True, slopes=False):
    """(KL, slopes): ``log_alpha`` P tensors, ``weight`` none or P (then log_alpha is log_sigma2), ``counts`` P ints.

    ``counts[i]`` is how many weights one element of ``log_alpha[i]`` covers. The slopes, wanted or an empty list, are
    dKL / dlog_alpha of one weight for each element of log_alpha, then dKL / dweight.
    """
    return _prior_reference(_log_uniform if exact else _log_uniform_approximate, log_alpha, weight, counts, slopes)


def kl_ard_reference(log_alpha, weight, counts, slopes=False):
    """(KL, slopes) as kl_log_uniform_reference."""
    return _prior_reference(_ard, log_alpha, weight, counts, slopes)


def kl_normal_reference(log_sigma2, weight, prior_std=1.0, slopes=False):
    """(KL, slopes) of ``log_sigma2``, P tensors, and ``weight``, none (zero means) or P."""

    def part(log_sigma2, weight=None):
        x = _wide(log_sigma2) - 2 * math.log(prior_std)
        ratio = torch.expm1(x)
        if weight is None:
            return 0.5 * (ratio - x).sum(), [0.5 * ratio]
        scaled = _wide(weight) / prior_std
        return 0.5 * (ratio - x + scaled.square()).sum(), [0.5 * ratio, scaled / prior_std]

    parts = map(part, log_sigma2, weight) if weight else map(part, log_sigma2)
    return _collect(log_sigma2, weight, [1] * len(log_sigma2), slopes, parts)


def kl_backward_reference(slopes, grad, counts):
    """``slopes[i] * grad * counts[i]`` in the slopes' dtypes, from a 0-d ``grad``."""
    return [(_wide(s) * (grad * count)).to(s.dtype) for s, count in zip(slopes, counts, strict=True)]


def kl_backward__reference(slopes, grad, counts):
    """kl_backward in place."""
    for slope, result in zip(slopes, kl_backward_reference(slopes, grad, counts), strict=True):
        slope.copy_(result)


def _kl_fake(params, weights, slopes):
    wide = torch.float64 if any(t.dtype == torch.float64 for t in params) else torch.float32
    of = [t.new_empty(t.shape) for t in (*params, *weights)] if slopes else []
    return params[0].new_empty((), dtype=wide), of


define(
    "kl_log_uniform(Tensor[] log_alpha, Tensor[] weight, SymInt[] counts, bool exact=True, bool slopes=False) "
    "-> (Tensor, Tensor[])",
    reference=kl_log_uniform_reference,
    fake=lambda log_alpha, weight, counts, exact=True, slopes=False: _kl_fake(log_alpha, weight, slopes),
)
define(
    "kl_ard(Tensor[] log_alpha, Tensor[] weight, SymInt[] counts, bool slopes=False) -> (Tensor, Tensor[])",
    reference=kl_ard_reference,
    fake=lambda log_alpha, weight, counts, slopes=False: _kl_fake(log_alpha, weight, slopes),
)
define(
    "kl_normal(Tensor[] log_sigma2, Tensor[] weight, float prior_std=1.0, bool slopes=False) -> (Tensor, Tensor[])",
    reference=kl_normal_reference,
    fake=lambda log_sigma2, weight, prior_std=1.0, slopes=False: _kl_fake(log_sigma2, weight, slopes),
)
define(
    "kl_backward(Tensor[] slopes, Tensor grad, SymInt[] counts) -> Tensor[]",
    reference=kl_backward_reference,
    fake=lambda slopes, grad, counts: [s.new_empty(s.shape) for s in slopes],
)
define(
    "kl_backward_(Tensor(a!)[] slopes, Tensor grad, SymInt[] counts) -> ()",
    reference=kl_backward__reference,
    fake=lambda slopes, grad, counts: None,
)


def _scale(slopes, grad, counts):
    """Gradients from slopes, which nothing reads afterwards unless the graph is kept."""
    if composite_needed():  # a batch of gradients
        return kl_backward_reference(slopes, grad, counts)
    if saved_memory_is_free(grad):
        torch.ops.losssurf_fast.kl_backward_.default(slopes, grad, counts)
        return slopes
    return torch.ops.losssurf_fast.kl_backward.default(slopes, grad, counts)


def _register(name: str, reference) -> None:
    """Autograd of one of the divergences, whose arguments are (params, weights, *options, slopes)."""
    op = getattr(torch.ops.losssurf_fast, name).default

    def setup(ctx, inputs, output):
        params, weights, *ctx.options, _ = inputs
        ctx.num_params = len(params)
        ctx.num_inputs = len(params) + len(weights)
        ctx.save_for_backward(*params, *weights, *output[1])
        ctx.mark_non_differentiable(*output[1])
        ctx.set_materialize_grads(False)  # the slopes' would be zeros, one per parameter

    def backward(ctx, grad, _):
        inputs, slopes = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        params, weights = list(inputs[: ctx.num_params]), list(inputs[ctx.num_params :])
        needed = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
        if torch.is_grad_enabled():  # double backward
            formula = lambda *t: reference(t[: len(params)], t[len(params) :], *ctx.options)[0]
            grads = composite_backward(formula, inputs, grad, needed)
        else:
            if not slopes:
                slopes = op(params, weights, *ctx.options, True)[1]
            counts = ctx.options[0] if name != "kl_normal" else [1] * len(params)
            wanted = [(s, c) for s, c, n in zip(slopes, [*counts, *[1] * len(weights)], needed, strict=True) if n]
            found = iter(_scale([s for s, _ in wanted], grad, [c for _, c in wanted]))
            grads = [next(found) if n else None for n in needed]
        return list(grads[: len(params)]), list(grads[len(params) :]), *[None] * len(ctx.options), None

    register_autograd(name, backward, setup)


_register("kl_log_uniform", kl_log_uniform_reference)
_register("kl_ard", kl_ard_reference)
_register("kl_normal", kl_normal_reference)

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


def _call(name: str, reference, params, weights, *options) -> torch.Tensor:
    if composite_needed():
        return reference(params, weights, *options)[0]
    slopes = torch.is_grad_enabled() and any(t.requires_grad for t in (*params, *weights))
    return getattr(torch.ops.losssurf_fast, name).default(params, weights, *options, slopes)[0]


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
        prior_std: the prior's standard deviation.

    Returns:
        A 0-d tensor, float32, or float64 where a parameter is. Gradients have the parameters' dtypes.

    Raises:
        TypeError, ValueError: a dtype, device, shape or length is not as above, or prior_std is not a positive number.
    """
    params, weights = _check_tensors("kl_normal", "log_sigma2", log_sigma2, weight)
    if not isinstance(prior_std, int | float) or isinstance(prior_std, bool):
        raise TypeError(f"kl_normal: prior_std must be a number, got {type(prior_std).__name__}")
    if not 0 < prior_std < math.inf:
        raise ValueError(f"kl_normal: prior_std must be positive and finite, got {prior_std}")
    return _call("kl_normal", kl_normal_reference, params, weights, float(prior_std))
