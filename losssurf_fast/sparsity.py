"""Sparse variational dropout: weights whose noise drowns them, log_alpha above a threshold, are set to zero.

Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks", ICML 2017: with alpha = sigma^2 /
weight^2, a weight with log_alpha > 3 is noise of more than 4 times its size, and the network does without it. For
"additive" weights log_alpha = log_sigma2 - log(weight^2); a weight of 0 counts as pruned, whatever its log_alpha.

A "variance" layer has no means: alpha is infinite for all its weights and the criterion says nothing about it (what it
knows is in its variances: Neklyudov et al., "Variance networks", ICLR 2019). Such layers stay whole.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from losssurf_fast.arguments import check_number
from losssurf_fast.nn.lrt import LRTLayer, Posterior, lrt_layers
from losssurf_fast.nn.stochastic import stochastic_layers

THRESHOLD = 3.0
NO_NOISE = -1000.0  # log_sigma2 whose exp is 0 also in float64


@dataclass(frozen=True)
class LayerSparsity:
    """How much of one tensor of weights remains.

    Attributes:
        weights, pruned: how many there are, and how many of them are pruned.
        outputs, dead_outputs: its output features or channels, and those without a weight left.
        inputs, dead_inputs: its input features or channels, likewise.
    """

    weights: int
    pruned: int
    outputs: int
    dead_outputs: int
    inputs: int
    dead_inputs: int

    @property
    def fraction(self) -> float:
        """Pruned weights of all; 0 where there are none."""
        return self.pruned / self.weights if self.weights else 0.0

    @property
    def compression(self) -> float:
        """All weights over those kept; infinite where none is."""
        return _ratio(self.weights, self.weights - self.pruned)


@dataclass(frozen=True)
class SparsityReport:
    """What :func:`sparsity_report` found.

    Attributes:
        threshold: that of log_alpha.
        layers: by the weights' names, as in ``named_parameters`` of an unpruned model.
        left: weights that the threshold says nothing about, with the reason.
    """

    threshold: float
    layers: dict[str, LayerSparsity]
    left: dict[str, str]

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers.values())

    @property
    def pruned(self) -> int:
        return sum(layer.pruned for layer in self.layers.values())

    @property
    def fraction(self) -> float:
        """Pruned weights of all in ``layers``."""
        return self.pruned / self.weights if self.weights else 0.0

    @property
    def compression(self) -> float:
        """All weights in ``layers`` over those kept; infinite where none is."""
        return _ratio(self.weights, self.weights - self.pruned)

    def __str__(self) -> str:
        """A table in 72 columns, in percent; longer names lose their beginning."""
        line = "{:<20s}{:>10s}{:>10s}{:>8s}{:>12s}{:>12s}".format
        rows = [line("", "weights", "pruned %", "ratio", "dead out", "dead in")]
        for name, layer in self.layers.items():
            dead = f"{layer.dead_outputs}/{layer.outputs}", f"{layer.dead_inputs}/{layer.inputs}"
            rows.append(line(_short(name), *_columns(layer), *dead))
        rows.append(line("all", *_columns(self), "", "").rstrip())
        rows += [f"{_short(name)}: left, {why}" for name, why in self.left.items()]
        return "\n".join([f"log_alpha > {self.threshold:g} is pruned", *rows])


def sparsity_report(model: nn.Module, threshold: float = THRESHOLD) -> SparsityReport:
    """How many weights of ``model`` the threshold prunes, layer by layer; the model stays as it is.

    Weights that layers share count once, under their first name.

    Raises:
        TypeError, ValueError: as for :func:`pruning_masks`; but a model of "variance" layers alone has a report, which
            lists them as ``left``.
    """
    threshold = _check_threshold("sparsity_report", threshold)
    layers, left, seen = {}, {}, set()
    for name, layer, posterior in _posteriors("sparsity_report", model):
        if posterior.tie in seen:
            continue
        seen.add(posterior.tie)
        if posterior.weight is None:
            left[name] = "a variance layer has no means"
        else:
            layers[name] = _layer_sparsity(layer, _kept("sparsity_report", name, posterior, threshold))
    return SparsityReport(threshold, layers, left)


def pruning_masks(model: nn.Module, threshold: float = THRESHOLD) -> dict[str, torch.Tensor]:
    """By the weights' names, which of them to keep: bool tensors of their shapes, True where log_alpha <= threshold.

    Weights of "variance" layers have no mask (see the module's docstring).

    Raises:
        TypeError: ``model`` is no module, ``threshold`` no number.
        ValueError: a threshold that is not finite, a log_alpha that is NaN, or no layers with noise and means.
    """
    threshold = _check_threshold("pruning_masks", threshold)
    return {name: mask for name, _, _, mask in _masks("pruning_masks", model, threshold)}


@torch.no_grad()
def prune(model: nn.Module, threshold: float = THRESHOLD) -> nn.Module:
    """Set the weights with log_alpha above ``threshold`` to zero, for good and without noise, in place.

    ``weight`` becomes a parametrization (``torch.nn.utils.parametrize``) by a mask, and so does the ``log_sigma2`` of
    "additive" layers: whatever an optimizer does, with weight decay or without, pruned weights are exactly 0 and their
    log_sigma2 is -1000, that is sigma = 0, also in a copy. The noise of the others, which have log_alpha, vanishes with
    the weight. The Parameter objects stay, so an optimizer made before goes on. May be called again: what was pruned
    stays so.

    In the state_dict ``<layer>.weight`` becomes ``<layer>.parametrizations.weight.original`` and ``....weight.0.kept``,
    the mask, and ``log_sigma2`` likewise. To load it, prune the new model first: whatever is in it, all layers with
    means get a mask. :func:`bake_pruning` makes plain parameters of them again, which ``lsf.from_lrt`` needs.

    The KL from the log-uniform or ARD prior leaves pruned weights out where they are "additive", and counts next to
    nothing for others; that from a normal prior holds a constant for each.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: as for :func:`pruning_masks`, or a weight that is computed otherwise; the model is as it
            was.
    """
    threshold = _check_threshold("prune", threshold)
    found = list(_masks("prune", model, threshold))
    for name, layer, posterior, _ in found:
        if parametrize.is_parametrized(layer, posterior.name) and not _is_pruned(layer, posterior.name):
            raise ValueError(f"prune: {name} must be a plain parameter, but it is parametrized")
    bake_pruning(model)
    for _, layer, posterior, kept in found:
        if posterior.parameterization == "additive":
            scale = layer.scale_name_of(posterior.name)
            parametrize.register_parametrization(layer, scale, Kept(kept, NO_NOISE))
        parametrize.register_parametrization(layer, posterior.name, Kept(kept))
    return model


@torch.no_grad()
def bake_pruning(model: nn.Module) -> nn.Module:
    """Make plain parameters of what :func:`prune` parametrized, with zeros in them, in place; nothing holds them there.

    Returns:
        The model, also one that has nothing pruned.

    Raises:
        TypeError: ``model`` is no module.
    """
    for layer in stochastic_layers(model, "bake_pruning"):
        for name in list(getattr(layer, "parametrizations", ())):
            if _is_pruned(layer, name):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return model


class Kept(nn.Module):
    """The parametrization of pruned weights and of their noise: ``pruned`` where ``kept`` is False."""

    def __init__(self, kept: torch.Tensor, pruned: float = 0.0) -> None:
        super().__init__()
        self.pruned = pruned
        self.register_buffer("kept", kept)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.where(self.kept, values, self.pruned)

    def right_inverse(self, values: torch.Tensor) -> torch.Tensor:
        """What ``layer.weight = ...`` stores."""
        return values


def _is_pruned(layer: nn.Module, name: str) -> bool:
    return parametrize.is_parametrized(layer, name) and isinstance(layer.parametrizations[name][0], Kept)


def _posteriors(caller: str, model: nn.Module) -> Iterator[tuple[str, LRTLayer, Posterior]]:
    """The Gaussian weights of ``model`` with their qualified names."""
    for prefix, layer in lrt_layers(model, caller):
        for posterior in layer.posteriors():
            yield f"{prefix}.{posterior.name}" if prefix else posterior.name, layer, posterior


def _masks(caller: str, model: nn.Module, threshold: float) -> list[tuple[str, LRTLayer, Posterior, torch.Tensor]]:
    found = [
        (name, layer, posterior, _kept(caller, name, posterior, threshold))
        for name, layer, posterior in _posteriors(caller, model)
        if posterior.weight is not None
    ]
    if not found:
        raise ValueError(
            f"{caller}: {type(model).__name__} has only 'variance' layers, whose weights have no means: log_alpha is "
            "infinite for all and the threshold would leave nothing"
        )
    return found


@torch.no_grad()
def _kept(caller: str, name: str, posterior: Posterior, threshold: float) -> torch.Tensor:
    """``[O, ...]`` bool: log_alpha <= threshold, for weights other than 0."""
    weight, scale = posterior.weight, posterior.scale
    if posterior.parameterization == "additive":
        log_alpha = scale - 2 * weight.to(scale.dtype).abs().log()
    else:
        log_alpha = posterior.spread(scale) if posterior.parameterization == "neuron" else scale
    if scale.isnan().any() or weight.isnan().any():
        raise ValueError(f"{caller}: {name} must have numbers as weights and log_alpha, got NaN")
    return (weight != 0) & (log_alpha <= threshold)


def _layer_sparsity(layer: LRTLayer, kept: torch.Tensor) -> LayerSparsity:
    """Of a weight [O, I/groups, ...], or [I, O/groups, ...] in transposed convolutions and embeddings."""
    groups = getattr(layer, "groups", 1)
    rows, columns = kept.shape[0], kept.shape[1] * groups
    row = torch.arange(rows, device=kept.device)[:, None]
    group = row // max(rows // groups, 1)
    column = group * kept.shape[1] + torch.arange(kept.shape[1], device=kept.device)
    alive = kept.flatten(2).any(2) if kept.dim() > 2 else kept  # [rows, columns / groups]
    dead = [size - index.expand_as(alive)[alive].unique().numel() for size, index in ((rows, row), (columns, column))]
    features = [(rows, dead[0]), (columns, dead[1])]  # outputs, inputs
    if getattr(layer, "transposed", isinstance(layer, nn.Embedding)):
        features.reverse()
    return LayerSparsity(kept.numel(), int((~kept).sum()), *features[0], *features[1])


def _check_threshold(caller: str, threshold: float) -> float:
    return check_number(caller, "threshold", threshold)


def _ratio(weights: int, kept: int) -> float:
    return weights / kept if kept else math.inf


def _columns(part: LayerSparsity | SparsityReport) -> tuple[str, str, str]:
    return f"{part.weights}", f"{100 * part.fraction:.1f}", f"{part.compression:.4g}"


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"...{name[-17:]}"
