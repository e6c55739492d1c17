"""A live model with the averages in its place, for as long as a ``with`` block."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel

from losssurf_fast.averaging import tensors

_NAME = "averaged_weights"


@contextlib.contextmanager
def averaged_weights(model: nn.Module, average) -> Iterator[nn.Module]:
    """Write averages into ``model`` for the block and restore it bit for bit after it, also after an exception.

    The values are copied in place: Parameters, their addresses and their gradients stay, so that sharded
    (``fully_shard``), compiled and captured models go on working; version counters go up. A copy of the model's tensors
    is kept meanwhile, of buffers too where the average has none: what the block changes (:func:`update_bn`, an
    optimizer's step) is undone. Blocks can be nested.

    Args:
        model: the live model, also in DistributedDataParallel or torch.compile.
        average: a :class:`losssurf_fast.AveragedModel`, torch's, or an object whose ``averages()`` returns a dict of
            tensors by the model's names: all of its parameters and either all of its buffers or none. They are cast to
            the model's dtypes.

    Yields:
        ``model``.

    Raises:
        TypeError: ``model`` or ``average`` is none of these.
        ValueError: names, shapes or placements differ. Nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    averages = _averages_of(average)
    parameters, buffers = tensors.named_parameters(model), tensors.named_buffers(model)
    averaged = parameters | buffers if any(name in averages for name in buffers) else parameters
    live = tensors.match(_NAME, averages, averaged)
    new = [tensors.local(t) for t in averages.values()]
    touched = live if averaged is not parameters else [*live, *buffers.values()]
    with torch.no_grad():
        saved = [tensors.local(t).clone() for t in touched]
    try:
        _write(model, live, new)
        yield model
    finally:
        _write(model, touched, saved)


def _averages_of(average) -> dict[str, torch.Tensor]:
    if isinstance(average, TorchAveragedModel):
        return {**tensors.named_parameters(average.module), **tensors.named_buffers(average.module)}
    averages = average.averages() if hasattr(average, "averages") else None
    if not isinstance(averages, Mapping):
        raise TypeError(f"{_NAME}: average must be an average of a model, got {type(average).__name__}")
    return dict(averages)


@torch.no_grad()
def _write(model: nn.Module, live: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy into ``live``, whose sharded parts are gathered anew by the next forward."""
    tensors.named_parameters(model)
    if live:
        torch._foreach_copy_([tensors.local(t) for t in live], values)
        torch.autograd.graph.increment_version([t for t in live if not t.is_inference()])  # which have none
