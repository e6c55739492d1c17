"""A model's tensors as averages see them: by name, without wrappers, and on a shard only what lies there."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from losssurf_fast.ops.swag import Place

_CHECKPOINTED = "_checkpoint_wrapped_module"  # the child in activation checkpointing's wrapper
_WRAPPERS = ("_orig_mod.", f"{_CHECKPOINTED}.")  # _orig_mod is torch.compile's


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def unwrap_layer(layer: nn.Module) -> nn.Module:
    """The layer inside these wrappers and that of activation checkpointing, in which a model may be sharded."""
    while (inner := unwrap(layer)._modules.get(_CHECKPOINTED)) is not None:
        layer = inner
    return unwrap(layer)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers inside the model put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by plain name, tied ones once; under FSDP2 the sharded ones, also after an evaluation's forward."""
    model = unwrap(model)
    reshard(fsdp_modules(model))
    return {plain_name(name): p for name, p in model.named_parameters()}


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """Put the shards, which a forward may have left gathered, back in their place as parameters."""
    for module in modules:
        module.reshard()


def named_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {plain_name(name): b for name, b in unwrap(model).named_buffers()}


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of the model's state_dict, by plain name."""
    model = unwrap(model)
    transient = {f"{p}.{b}" if p else b for p, m in model.named_modules() for b in m._non_persistent_buffers_set}
    return {plain_name(name): b for name, b in model.named_buffers() if name not in transient}


def match(
    caller: str,
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    of: str = "the average",
    argument: str | None = None,
) -> list[torch.Tensor]:
    """``theirs`` in the order of ``ours``.

    Args:
        of, argument: what messages shall call those whose tensors ``ours`` and ``theirs`` are; None is "the model".

    Raises:
        ValueError: the names, or the shapes or placements under a name, differ, or one of ``theirs`` has no values.
        TypeError: one is floating, complex, integer or bool, and the other is not.
    """
    missing, unexpected = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    if missing or unexpected:
        parts = [f"lacks {some(missing)}"] if missing else []
        parts += [f"has {some(unexpected)} besides"] if unexpected else []
        raise ValueError(f"{caller}: {argument or 'the model'} must have the tensors of {of}; it {' and '.join(parts)}")
    caller = f"{caller}: {argument}" if argument else caller
    for name, mine in ours.items():
        other = theirs[name]
        if kind := without_values(other):
            raise ValueError(f"{caller}: {name} must hold values, got {kind}")
        if mine.shape != other.shape:
            raise ValueError(f"{caller}: {name} must have shape {tuple(mine.shape)}, got {tuple(other.shape)}")
        if kind_of(mine.dtype) != kind_of(other.dtype):
            raise TypeError(f"{caller}: {name} must be like {mine.dtype}, got {other.dtype}")
        if isinstance(mine, DTensor) != isinstance(other, DTensor):
            kind = lambda t: "a DTensor" if isinstance(t, DTensor) else "a plain tensor"
            raise ValueError(f"{caller}: {name} must be {kind(mine)} like {of}'s, got {kind(other)}")
        if isinstance(mine, DTensor) and mine.placements != other.placements:
            raise ValueError(f"{caller}: {name} must be placed as {mine.placements}, got {other.placements}")
    return [theirs[name] for name in ours]


def without_values(tensor: torch.Tensor) -> str:
    """What a tensor is that holds none, for a message; "" for one that does."""
    return "a lazy tensor" if is_lazy(tensor) else "one on the meta device" if tensor.is_meta else ""


def kind_of(dtype: torch.dtype) -> tuple[bool, ...]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def some(names: list[str]) -> str:
    """The first three of ``names``, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this rank, the same memory; read anew each time, FSDP2 may replace it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of reals, the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def without_repeats(target: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without what an expanded ``target`` only repeats, as torch refuses to write one memory several times."""
    if target.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
            if size > 1 and stride == 0:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    return target, source


def like(tensor: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """``here`` as this rank's part of a tensor that is placed as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return here
    # from_local would move an offloaded part to the mesh's device
    meta = TensorMeta(tensor.shape, tensor.stride(), here.dtype)
    return DTensor(here, replace(tensor._spec, tensor_meta=meta), requires_grad=False)


def part_of(tensor: torch.Tensor, here: torch.Tensor, leading: tuple[int, ...]) -> torch.Tensor:
    """``here`` as this rank's part of a contiguous tensor [*leading, *shape] that is cut where ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return here
    shape = torch.Size((*leading, *tensor.shape))
    placements = tuple(Shard(p.dim + len(leading)) if p.is_shard() else p for p in tensor.placements)
    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), here.dtype)
    return DTensor(here, DTensorSpec(tensor.device_mesh, placements, meta), requires_grad=False)


def place_of(caller: str, tensor: torch.Tensor, row: int) -> Place:
    """Where this rank's part of parameter number ``row`` lies in the noise of the whole (ops/swag.py).

    Raises:
        NotImplementedError: the parameter is cut in more than its first and one other dimension, or interleaved.
    """
    if not isinstance(tensor, DTensor):
        return Place(row)
    shape = tensor.shape
    if not all(p.is_replicate() or type(p) is Shard for p in tensor.placements):
        raise NotImplementedError(f"{caller}: noise for the placement {tensor.placements} is not written")
    here, start = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    cut = [d for d in range(len(shape)) if here[d] != shape[d]]
    if len([d for d in cut if d > 0]) > 1:
        raise NotImplementedError(f"{caller}: noise for the placement {tensor.placements} is not written")
    if math.prod(here) == 0:
        return Place(row)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    offset = sum(s * step for s, step in zip(start, strides, strict=True))
    last = max(cut, default=0)
    if last == 0:
        return Place(row, offset)
    return Place(row, offset, here[last] * strides[last], shape[last] * strides[last])
