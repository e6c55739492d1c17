"""A live model with the averages in its place, for as long as a ``with`` block."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel

from losssurf_fast.averaging import tensors
from losssurf_fast.undoing import afterwards

_NAME = "averaged_weights"
_SWITCHES = ("training", "track_running_stats", "prediction_scheme")  # of modules, which update_bn and predict turn


@contextlib.contextmanager
def averaged_weights(model: nn.Module, average) -> Iterator[nn.Module]:
    """Write averages into ``model`` for the block and restore it bit for bit after it, also after an exception.

    The values are copied in place: Parameters, their addresses and their gradients stay, so that sharded
    (``fully_shard``), compiled and captured models go on working; version counters go up. A copy of the model's tensors
    is kept meanwhile, of buffers too where the average has none: what the block changes (:func:`update_bn`, an
    optimizer's step) is undone, also in tensors that ``load_state_dict(assign=True)`` put in place of others. Tensors
    that it removed or gave another shape are left alone. Blocks can be nested.

    Args:
        model: the live model, also in DistributedDataParallel or torch.compile.
        average: a :class:`losssurf_fast.AveragedModel`, torch's, or an object whose ``averages()`` returns a dict of
            tensors by the model's names: all of its parameters and either all of its buffers or none. They are cast to
            the model's dtypes. Before its first update an AveragedModel has the weights of its construction.

    Yields:
        ``model``.

    Raises:
        TypeError: ``model`` or ``average`` is none of these, or kinds of dtypes (floating, complex, integer) differ.
        ValueError: names, shapes or placements differ. Nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    averages = _averages_of(average)
    parameters, buffers = tensors.named_parameters(model), tensors.named_buffers(model)
    wanted = parameters | buffers if any(name in averages for name in buffers) else parameters
    tensors.match(_NAME, averages, wanted)
    with restored(model) as write:
        write({name: tensors.local(t) for name, t in averages.items()})
        yield model


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[dict[str, torch.Tensor]], None]]:
    """Undo at the end of the block, also after an exception, what it does to the model's parameters and buffers.

    Yields:
        A function that copies tensors (a shard's: what lies on this rank) into the model under their names; it leaves
        tensors of other names as they are.
    """
    copies = {id(t): tensors.local(t).detach().clone() for t in _all_names(model).values()}
    saved = {name: copies[id(t)] for name, t in _all_names(model).items()}
    with afterwards(lambda: _write(model, saved)):
        yield functools.partial(_write, model)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[dict[str, torch.Tensor]], None]]:
    """:func:`restored` for a whole walk through weights: modes, which evaluations change, are as before, too."""
    switches = {module: {s: getattr(module, s) for s in _SWITCHES if hasattr(module, s)} for module in model.modules()}

    def switch_back() -> None:
        for module, before in switches.items():
            for name, value in before.items():
                setattr(module, name, value)

    with afterwards(switch_back), restored(model) as write:
        yield write


def _averages_of(average) -> dict[str, torch.Tensor]:
    if isinstance(average, TorchAveragedModel):
        return {**tensors.named_parameters(average.module), **tensors.named_buffers(average.module)}
    averages = average.averages() if hasattr(average, "averages") else None
    if not isinstance(averages, Mapping):
        raise TypeError(f"{_NAME}: average must be an average of a model, got {type(average).__name__}")
    return dict(averages)


def _all_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    tensors.named_parameters(model)  # reshards
    model = tensors.unwrap(model)
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {tensors.plain_name(name): t for name, t in named}


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copy into the model, whose sharded parts are gathered anew by the next forward."""
    pairs = {}
    for name, t in _all_names(model).items():
        if name in values and tensors.local(t).shape == values[name].shape:
            pairs[id(t)] = t, *tensors.without_repeats(tensors.local(t), values[name])
    if pairs:
        live, here, new = zip(*pairs.values(), strict=True)
        torch._foreach_copy_(list(here), list(new))
        torch.autograd.graph.increment_version([t for t in live if not t.is_inference()])  # which have none
        torch.clear_autocast_cache()  # of casts of the old values
