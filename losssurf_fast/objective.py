"""The evidence lower bound of a stochastic model: the KL divergence of its weights, and the loss to minimise."""

import functools
import math
import numbers

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast.nn.lrt import Posterior, lrt_layers

PRIORS = ("log_uniform", "ard", "normal")


def kl_divergence(
    model: nn.Module, prior: str = "log_uniform", *, exact: bool = True, prior_std: float = 1.0
) -> torch.Tensor:
    """KL divergence of the posterior of ``model``'s stochastic weights from their prior: a differentiable scalar.

    One operator call serves all layers with ``log_alpha`` and one all "additive" ones; layers that share their weights
    count once.

    Args:
        model: a module with ``lsf.nn.LRTLinear`` or other LRT layers, or one such layer.
        prior: "log_uniform" (p(w) ~ 1/|w|; up to the constant that makes it 0 for alpha -> infinity), "ard" (a Gaussian
            whose variance is the best one for each weight) or "normal" (N(0, prior_std^2)). Under the first two a
            "variance" layer contributes exactly 0 (and to the KL from "normal" like any other).
        exact: False takes the three-constant approximation of the log-uniform KL.
        prior_std: standard deviation of the "normal" prior.

    Returns:
        0-d float32 tensor, float64 for float64 parameters.

    Raises:
        TypeError, ValueError: not a module, unknown prior, a prior_std that is no positive number, or a model without
            such layers or with one whose parameters are on the meta device.
    """
    check_prior("kl_divergence", prior, prior_std)
    posteriors = model_posteriors(model, "kl_divergence")
    if prior == "normal":
        return _normal(posteriors, prior_std)
    family = ops.kl_ard if prior == "ard" else functools.partial(ops.kl_log_uniform, exact=exact)
    additive = [p for p in posteriors if p.parameterization == "additive"]
    multiplicative = [p for p in posteriors if p.parameterization in ("layer", "neuron", "weight")]
    terms = []
    if additive:
        terms.append(family([p.scale for p in additive], weight=[p.weight for p in additive]))
    if multiplicative:
        log_alphas, numels = zip(*((p.scale, p.weight.numel()) for p in multiplicative), strict=True)
        terms.append(family(log_alphas, numels))
    return sum(terms) if terms else posteriors[0].scale.new_zeros(())


def check_prior(caller: str, prior: str, prior_std: float) -> None:
    if prior not in PRIORS:
        raise ValueError(f"{caller}: prior must be one of {PRIORS}, got {prior!r}")
    if isinstance(prior_std, bool) or not isinstance(prior_std, int | float):
        raise TypeError(f"{caller}: prior_std must be a number, got {type(prior_std).__name__}")
    if not prior_std > 0:
        raise ValueError(f"{caller}: prior_std must be positive, got {prior_std}")


def model_posteriors(model: nn.Module, caller: str) -> list[Posterior]:
    """The Gaussian weights of ``model``, those that layers share once; ValueError where there are none to read."""
    posteriors = [posterior for _, layer in lrt_layers(model, caller) for posterior in layer.posteriors()]
    if any(t is not None and t.is_meta for p in posteriors for t in (p.scale, p.weight)):
        raise ValueError(
            f"{caller}: {type(model).__name__} must hold values, got tensors on the meta device (a Curve's module has "
            "its weights in `with curve.at(t):`, or from a forward to its backward)"
        )
    return list({p.tie: p for p in posteriors}.values())


def _normal(posteriors: list[Posterior], prior_std: float) -> torch.Tensor:
    variance = [p for p in posteriors if p.weight is None]
    others = [p for p in posteriors if p.weight is not None]
    terms = []
    if variance:
        terms.append(ops.kl_normal(None, [p.scale for p in variance], prior_std))
    if others:
        terms.append(ops.kl_normal([p.weight for p in others], [p.log_sigma2() for p in others], prior_std))
    return sum(terms)


class ELBOLoss(nn.Module):
    """Negative evidence lower bound: ``num_data * mean cross-entropy + kl_weight * KL``.

    The model is no submodule of the loss, so its parameters appear once in an optimizer or a state_dict.

    Args:
        model: the stochastic model whose KL is taken.
        num_data: number of training samples, which the data term is scaled to.
        prior, exact, prior_std: as for :func:`kl_divergence`.
    """

    def __init__(
        self,
        model: nn.Module,
        num_data: int,
        *,
        prior: str = "log_uniform",
        exact: bool = True,
        prior_std: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(num_data, bool) or not isinstance(num_data, numbers.Real):
            raise TypeError(f"ELBOLoss: num_data must be a number, got {type(num_data).__name__}")
        if not 0 < num_data < math.inf:
            raise ValueError(f"ELBOLoss: num_data must be a positive number, got {num_data!r}")
        self.num_data, self.prior, self.exact, self.prior_std = num_data, prior, exact, prior_std
        self._hidden = (model,)  # in a tuple, where nn.Module does not see it
        with torch.no_grad():
            kl_divergence(model, prior, exact=exact, prior_std=prior_std)  # complain now, not at the first step

    def forward(self, logits: torch.Tensor, target: torch.Tensor, kl_weight: float = 1.0) -> torch.Tensor:
        """``logits`` ``[N, classes, ...]`` and ``target`` as for ``F.cross_entropy`` -> scalar, at least float32."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        kl = kl_divergence(self._hidden[0], self.prior, exact=self.exact, prior_std=self.prior_std)
        return self.num_data * F.cross_entropy(wide, target) + kl_weight * kl

    def extra_repr(self) -> str:
        return f"num_data={self.num_data}, prior={self.prior!r}"
