"""A model's trainable parameters as one row, what minima may be given as, and the curve through many weights."""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from losssurf_fast.averaging import tensors
from losssurf_fast.curve import Curve


def weights_of(caller: str, argument: str, source: nn.Module | Mapping, model: nn.Module) -> dict[str, torch.Tensor]:
    """The values that ``source``, a model or its state_dict, has for the parameters of ``model``.

    Raises:
        TypeError, ValueError: it is neither, or is of another architecture.
    """
    wanted = tensors.named_parameters(model)
    if isinstance(source, nn.Module):
        given, extra = tensors.named_parameters(source), ()
    elif isinstance(source, Mapping):
        given = {tensors.plain_name(name): t for name, t in source.items()}
        every = tensors.unwrap(model).named_parameters(remove_duplicate=False)
        extra = {tensors.plain_name(name) for name, _ in every} | set(tensors.named_buffers(model))
    else:
        raise TypeError(f"{caller}: {argument} must be a model or a state_dict, got {type(source).__name__}")
    missing = [name for name in wanted if name not in given]
    besides = [name for name in given if name not in wanted and name not in extra]
    if missing or besides:
        parts = [f"it lacks {tensors.some(missing)}"] if missing else []
        parts += [f"it has {tensors.some(besides)} besides"] if besides else []
        raise ValueError(f"{caller}: {argument} must be of the model's architecture; {' and '.join(parts)}")
    for name, mine in wanted.items():
        other = given[name]
        if not isinstance(other, torch.Tensor):
            raise TypeError(f"{caller}: {argument}[{name!r}] must be a tensor, got {type(other).__name__}")
        if other.shape != mine.shape:
            shapes = f"the model's shape {tuple(mine.shape)}, got {tuple(other.shape)}"
            raise ValueError(f"{caller}: {argument}[{name!r}] must have {shapes}")
        if tensors.is_sharded(mine) or tensors.is_sharded(other):
            raise NotImplementedError(f"{caller}: bands of sharded models are not written; {name} is sharded")
        if mine.is_meta or other.is_meta:
            raise ValueError(f"{caller}: {argument}[{name!r}] and the model's must hold values, one is on meta")
    return {name: given[name].detach() for name in wanted}


class Rows:
    """The trainable parameters of a model, laid out in a row of P floats: float32, or float64 where one is that."""

    def __init__(self, caller: str, model: nn.Module):
        named = {name: p for name, p in tensors.named_parameters(model).items() if p.requires_grad}
        if not named:
            raise ValueError(f"{caller}: model must have a parameter that requires a gradient, got none")
        self.names, self.parameters = list(named), list(named.values())
        self.sizes, self.shapes = [p.numel() for p in self.parameters], [p.shape for p in self.parameters]
        self.device, self.dtype = self.parameters[0].device, torch.float32
        for name, p in named.items():
            if not p.is_floating_point():
                raise NotImplementedError(f"{caller}: bands of {p.dtype} weights are not written; {name} has them")
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    def row(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weights[name].reshape(-1).to(self.device, self.dtype) for name in self.names])

    def views(self, row: torch.Tensor) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(row.split(self.sizes), self.shapes, strict=True)]

    def named_views(self, row: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self.names, self.views(row), strict=True)

    @torch.no_grad()
    def install(self, row: torch.Tensor) -> None:
        """Copy ``row`` into the model's parameters."""
        torch._foreach_copy_(self.parameters, self.views(row))


@torch.no_grad()
def chain(model: nn.Module, bends: Sequence[Mapping[str, torch.Tensor]]) -> Curve:
    """A curve of kind "polychain" through these weights, by the names of all parameters, with the model's buffers."""
    ends = []
    for weights in (bends[0], bends[-1]):
        ends.append(copy.deepcopy(tensors.unwrap(model)))
        for name, p in tensors.named_parameters(ends[-1]).items():
            p.copy_(weights[name])
    curve = Curve(ends, kind="polychain", num_bends=len(bends))
    for bend, weights in zip(curve.bends, bends, strict=True):
        for name, p in bend.named_parameters():
            p.copy_(weights[name])
    return curve
