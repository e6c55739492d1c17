"""Averages of weights inside other libraries' training loops; each module here needs its library."""

from collections.abc import Callable

import torch
from torch import nn

from losssurf_fast.averaging import AveragedModel
from losssurf_fast.averaging.tensors import is_sharded, match, named_buffers, named_parameters, without_repeats


def check_arguments(name: str, make_average: Callable, every: str, start: int) -> None:
    """Refuse what a callback ``name`` cannot make an average by, or update at."""
    if isinstance(make_average, nn.Module) or not callable(make_average):
        raise TypeError(
            f"{name}: make_average must be a function that makes an average of a model, got "
            f"{type(make_average).__name__}"
        )
    if every not in ("step", "epoch"):
        raise ValueError(f"{name}: every must be 'step' or 'epoch', got {every!r}")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"{name}: start must be an int of at least 0, got {start!r}")


def refuse_sharded(model: nn.Module, remedy: str) -> None:
    """Refuse a model whose average would go to checkpoints: one rank's shard would be taken for the whole."""
    if any(is_sharded(p) for p in named_parameters(model).values()):
        raise NotImplementedError(
            f"AveragingCallback: a sharded average is not written to checkpoints yet; use {remedy}"
        )


def make(name: str, make_average: Callable[[nn.Module], AveragedModel], model: nn.Module) -> AveragedModel:
    average = make_average(model)
    if not isinstance(average, AveragedModel):
        raise TypeError(f"{name}: make_average must return an AveragedModel, got {type(average).__name__}")
    return average


def has_average(average: AveragedModel | None) -> bool:
    return average is not None and bool(average.n_averaged > 0)


@torch.no_grad()
def install_average(model: nn.Module, average: AveragedModel) -> None:
    """Leave the average in ``model`` for good."""
    averages = average.averages()
    live = match("AveragingCallback", averages, named_parameters(model) | named_buffers(model))
    for t, value in zip(live, averages.values(), strict=True):
        here, new = without_repeats(t, value)
        here.copy_(new)
    torch.clear_autocast_cache()  # of casts of the old values
