"""Turning stochastic layers back into plain ones, in place."""

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from losssurf_fast.conversion.classes import PLAIN, restore_fast_paths
from losssurf_fast.conversion.report import drop_report
from losssurf_fast.nn.lrt import LRTLayer
from losssurf_fast.nn.stochastic import stochastic_layers
from losssurf_fast.weight_sampling import sample_weights

_ATTRIBUTES = (
    "parameterization", "init_log_sigma2", "init_log_alpha", "sampling", "prediction_scheme", "drawn", "variances",
    "variance_dtype",
)  # fmt: skip


@torch.no_grad()
def from_lrt(model: nn.Module, *, seed: int | torch.Tensor | None = None) -> nn.Module:
    """Turn the LRT layers of ``model`` back into the torch layers they replaced, in place, and return the model.

    They keep the mean weights, which are 0 in a "variance" layer, or get one draw of them. The modules, their
    Parameter objects, names, hooks, dtypes, devices and flags stay, ``log_alpha`` and ``log_sigma2`` go, and the fast
    paths that :func:`to_lrt` turned off come back; so the state_dict is that of a plain model. A "variance" layer gets
    a new ``weight``, which layers that shared their noise share.

    Args:
        model: a module with LRT layers, or one such layer.
        seed: an int or 0-d int64 tensor writes one draw into the weights, that of ``lsf.sample_weights(model, seed)``;
            but the padding row of an embedding is its mean, also in layers that share the embedding's weight.

    Raises:
        TypeError: not a module.
        ValueError: the model has no LRT layers, or one that is parametrized or of a class of its own; the model is as
            it was.
        NotImplementedError: a draw of sharded weights.
    """
    layers = [m for m in stochastic_layers(model, "from_lrt") if isinstance(m, LRTLayer)]
    if not layers:
        raise ValueError(f"from_lrt: {type(model).__name__} has no LRT layers")
    for layer in layers:
        if hasattr(layer, "parametrizations"):
            raise ValueError(
                f"from_lrt: {type(layer).__name__} has parametrized weights; call lsf.bake_pruning after lsf.prune, "
                "and remove other parametrizations"
            )
        if type(layer) not in PLAIN:
            raise ValueError(f"from_lrt: {type(layer).__name__} is no layer of lsf.nn, so it has no plain counterpart")
        if seed is not None and hasattr(layer.scale, "device_mesh"):
            raise NotImplementedError("from_lrt: the model is sharded, of which drawing is not written")
    values = _values(model, layers, seed)
    for layer in layers:
        for posterior in layer.posteriors():
            value = values[posterior.tie]
            if isinstance(value, nn.Parameter):
                setattr(layer, posterior.name, value)
            elif value is not None:
                posterior.weight.copy_(value)
    for layer in layers:
        _become_plain(layer)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and type(module.out_proj) is nn.Linear:
            module.out_proj.__class__ = NonDynamicallyQuantizableLinear
    restore_fast_paths(model)
    drop_report(model)
    torch.clear_autocast_cache()
    return model


def _values(model: nn.Module, layers: list[LRTLayer], seed) -> dict[int, torch.Tensor | None]:
    """By ties, what a weight becomes: a new Parameter where there is none, None for the mean it has."""
    drawn = {}
    if seed is not None:
        with sample_weights(model, seed, prior=None):
            drawn = {id(layer): dict(layer.drawn) for layer in layers}
    values: dict[int, torch.Tensor | None] = {}
    for layer in layers:
        for posterior in layer.posteriors():
            value = drawn[id(layer)][posterior.name].clone() if drawn else None
            if posterior.weight is None:
                value = torch.zeros_like(posterior.scale) if value is None else value
                value = nn.Parameter(value.to(layer.like.dtype), requires_grad=posterior.scale.requires_grad)
            values.setdefault(posterior.tie, value)
    for layer in layers:  # of all layers that share a weight, whatever their order
        padding = getattr(layer, "padding_idx", None)
        if drawn and padding is not None:
            (posterior,) = layer.posteriors()
            values[posterior.tie][padding] = 0 if posterior.weight is None else posterior.weight[padding]
    return values


def _become_plain(layer: LRTLayer) -> None:
    for name in layer.gaussian_weights(layer):
        del layer._parameters[layer.scale_name_of(name)]
    if "like" in layer._buffers:
        del layer.like
    plain = PLAIN[type(layer)]
    for name in _ATTRIBUTES:
        vars(layer).pop(name, None)
    layer.__class__ = plain
