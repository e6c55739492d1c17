"""The evidence lower bound of a stochastic model: the KL divergence of its weights, and the loss to minimise."""

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast.nn.lrt import LRTLinear
from losssurf_fast.nn.stochastic import stochastic_layers

PRIORS = ("log_uniform", "ard", "normal")


def kl_divergence(
    model: nn.Module, prior: str = "log_uniform", *, exact: bool = True, prior_std: float = 1.0
) -> torch.Tensor:
    """KL divergence of the posterior of ``model``'s stochastic weights from their prior: a differentiable scalar.

    One operator call serves the whole model; layers that share their weights count once.

    Args:
        model: a module with ``LRTLinear`` layers, or one such layer.
        prior: "log_uniform" (p(w) ~ 1/|w|; up to the constant that makes it 0 for alpha -> infinity), "ard" (a Gaussian
            whose variance is the best one for each weight) or "normal" (N(0, prior_std^2)). Under the first two a
            "variance" layer contributes exactly 0.
        exact: False takes the three-constant approximation of the log-uniform KL.
        prior_std: standard deviation of the "normal" prior.

    Returns:
        0-d float32 tensor, float64 for float64 parameters.

    Raises:
        TypeError, ValueError: not a module, unknown prior, or a model without such layers.
    """
    if prior not in PRIORS:
        raise ValueError(f"kl_divergence: prior must be one of {PRIORS}, got {prior!r}")
    if not prior_std > 0:
        raise ValueError(f"kl_divergence: prior_std must be positive, got {prior_std}")
    layers = [m for m in stochastic_layers(model, "kl_divergence") if isinstance(m, LRTLinear)]
    if not layers:
        raise ValueError(
            f"kl_divergence: {type(model).__name__} has no stochastic layers; convert it with lsf.to_lrt first"
        )
    layers = list({id(layer.scale): layer for layer in layers}.values())  # tied ones share their scale
    if prior == "normal":
        weights = [layer.weight if layer.weight is not None else torch.zeros_like(layer.scale) for layer in layers]
        return ops.kl_normal(weights, [_log_sigma2(layer) for layer in layers], prior_std)
    uncertain = [layer for layer in layers if layer.weight is not None]
    if not uncertain:
        return layers[0].scale.new_zeros(())
    log_alphas = [_log_alpha(layer) for layer in uncertain]
    numels = [layer.weight.numel() for layer in uncertain]
    if prior == "ard":
        return ops.kl_ard(log_alphas, numels)
    return ops.kl_log_uniform(log_alphas, numels, exact=exact)


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
        if isinstance(num_data, bool) or not num_data > 0:
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


def _log_alpha(layer: LRTLinear) -> torch.Tensor:
    if layer.parameterization == "additive":
        return layer.scale - _log_square(layer)
    return layer.scale


def _log_sigma2(layer: LRTLinear) -> torch.Tensor:
    if layer.parameterization in ("additive", "variance"):
        return layer.scale
    alpha = layer.scale.unsqueeze(-1) if layer.parameterization == "neuron" else layer.scale
    return alpha + _log_square(layer)


def _log_square(layer: LRTLinear) -> torch.Tensor:
    weight = layer.weight.to(layer.scale.dtype)
    return weight.square().clamp(min=torch.finfo(weight.dtype).tiny).log()
