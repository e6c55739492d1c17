"""Turning stochastic layers back into plain ones, in place."""

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from losssurf_fast.conversion.classes import PLAIN, restore_fast_paths
from losssurf_fast.conversion.report import drop_report
from losssurf_fast.nn.lrt import LRTLayer
from losssurf_fast.nn.stochastic import stochastic_layers
from losssurf_fast.weight_sampling import sample_weights

_ATTRIBUTES = ("parameterization", "init_log_sigma2", "init_log_alpha", "sampling", "prediction_scheme", "drawn")


@torch.no_grad()
def from_lrt(model: nn.Module, *, seed: int | torch.Tensor | None = None) -> nn.Module:
    """Turn the LRT layers of ``model`` back into the torch layers they replaced, in place, and return the model.

    They keep the mean weights, which are 0 in a "variance" layer, or get one draw of them. The modules, their
    Parameter objects, names, hooks, dtypes, devices and flags stay, ``log_alpha`` and ``log_sigma2`` go, and the fast
    paths that :func:`to_lrt` turned off come back; so the state_dict is that of a plain model. A "variance" layer gets
    a new ``weight``, which layers that shared their noise share.

    Args:
        model: a module with LRT layers, or one such layer.
        seed: an int or 0-d int64 tensor writes one draw into the weights, that of ``lsf.sample_weights(model, seed)``.

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
            value = values[id(posterior.scale)]
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
    """id of a scale -> what the weight becomes: a new Parameter where there is none, None for the mean it has."""
    drawn = {}
    if seed is not None:
        with sample_weights(model, seed, prior=None):
            drawn = {id(layer): dict(layer.drawn) for layer in layers}
    values: dict[int, torch.Tensor | None] = {}
    for layer in layers:
        for posterior in layer.posteriors():
            value = drawn[id(layer)][posterior.name] if drawn else None
            padding = getattr(layer, "padding_idx", None)
            if value is not None and padding is not None:  # that row of an embedding has no noise
                value = value.clone()
                value[padding] = 0 if posterior.weight is None else posterior.weight[padding]
            if posterior.weight is None:
                value = torch.zeros_like(posterior.scale) if value is None else value
                value = nn.Parameter(value.to(_dtype(model, layer)), requires_grad=posterior.scale.requires_grad)
            values.setdefault(id(posterior.scale), value)
    return values


def _dtype(model: nn.Module, layer: LRTLayer) -> torch.dtype:
    """Of the weight that a "variance" layer gave up; its noise is float32 in half-precision models too."""
    if hasattr(layer, "like"):
        return layer.like.dtype
    scales = {id(p.scale) for m in model.modules() if isinstance(m, LRTLayer) for p in m.posteriors()}
    for module in (layer, model):
        for parameter in module.parameters():
            if id(parameter) not in scales and parameter.is_floating_point():
                return parameter.dtype
    return layer.scale.dtype


def _become_plain(layer: LRTLayer) -> None:
    for name in layer.gaussian_weights(layer):
        del layer._parameters[layer.scale_name_of(name)]
    if "like" in layer._buffers:
        del layer.like
    plain = PLAIN[type(layer)]
    for name in _ATTRIBUTES:
        vars(layer).pop(name, None)
    layer.__class__ = plain
