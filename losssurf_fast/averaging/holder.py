"""The module that holds a model's averages: a copy of the model, or of its tree alone where the model is sharded."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from losssurf_fast.averaging import tensors
from losssurf_fast.ops.averaging import AVERAGING_DTYPES


def require_weights(caller: str, named: dict[str, torch.Tensor]) -> None:
    """Raise where a tensor has no values yet, or values that cannot be averaged."""
    for name, t in named.items():
        if nn.parameter.is_lazy(t):
            raise ValueError(f"{caller}: {name} is lazy; run the model once before it is averaged")
        if t.is_meta:
            raise ValueError(f"{caller}: {name} must hold values, got a tensor on the meta device")
        if t.is_floating_point() and t.dtype not in AVERAGING_DTYPES:
            raise TypeError(f"{caller}: {name} must have a dtype of {AVERAGING_DTYPES}, got {t.dtype}")


def averaged_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What averages of ``dtype`` are held in: at least fp32 unless asked otherwise; integers as they are."""
    if dtype.is_complex:
        return averaged_dtype(dtype.to_real(), wanted).to_complex()
    if not dtype.is_floating_point:
        return dtype
    return wanted or torch.promote_types(dtype, torch.float32)


def holder_of(
    model: nn.Module, dtype_of: dict[str, torch.dtype], device: torch.device | None, pin: bool
) -> tuple[nn.Module, bool]:
    """A module with copies of ``model``'s tensors in these dtypes, and whether they are shards.

    ``model`` is deep-copied around the copies, so that nothing exists twice on its device; a sharded one cannot be
    deep-copied, and a tree of bare modules with its names takes its place.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError("AveragedModel: model must not be scripted or traced; average the module it was made from")
    named = {**tensors.named_parameters(model), **tensors.named_buffers(model)}
    copies = {id(t): _copy(t, dtype_of[name], device, pin) for name, t in named.items()}
    if any(tensors.is_sharded(t) for t in named.values()):
        return _bare(model, lambda t: copies[id(t)], {}), True
    return deepcopy(model, copies), False


def _copy(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device | None, pin: bool) -> torch.Tensor:
    source = tensors.local(tensor).detach()
    copy = torch.empty_like(source, dtype=dtype, device=device, pin_memory=pin).copy_(source)
    copy = tensors.like(tensor, copy)
    if not isinstance(tensor, nn.Parameter):
        return copy
    kind = nn.Parameter if tensors.is_sharded(tensor) else type(tensor)  # a DTensor's type is DTensor
    return kind(copy, tensor.requires_grad)


def _bare(module: nn.Module, copy_of: Callable, made: dict[nn.Module, nn.Module]) -> nn.Module:
    module = tensors.unwrap_layer(module)
    if module in made:
        return made[module]
    bare = made[module] = nn.Module()
    for name, p in module._parameters.items():
        bare.register_parameter(name, None if p is None else copy_of(p))
    for name, b in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        bare.register_buffer(name, None if b is None else copy_of(b), persistent)
    for name, child in module._modules.items():
        bare.add_module(name, None if child is None else _bare(child, copy_of, made))
    return bare
