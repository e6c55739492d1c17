"""A model's trainable parameters as one row, and what minima may be given as."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from losssurf_fast import weights
from losssurf_fast.averaging import tensors


def weights_of(caller: str, argument: str, source, model: nn.Module) -> weights.Weights:
    """The values that ``source`` has for the parameters of ``model``; see :func:`losssurf_fast.weights.weights_of`."""
    return weights.weights_of(caller, argument, source, model, weights.parameters_of(caller, model))


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
        torch.clear_autocast_cache()  # of casts of the old values
