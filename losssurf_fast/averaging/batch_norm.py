"""BatchNorm statistics of a model whose weights were not trained with them: averaged, drawn, or on a path.

Every batch is normalised by its own statistics, as in training, and the layer's inputs are counted: their number,
mean and M2 (sum of squared deviations) merge exactly (Chan et al., "Updating formulae and a pairwise algorithm for
computing sample variances", 1979), in fp64::

    delta = mean_b - mean       mean <- mean + delta n_b / (n + n_b)       M2 <- M2 + M2_b + delta^2 n n_b / (n + n_b)
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from losssurf_fast.averaging.tensors import unwrap
from losssurf_fast.prediction import evaluation_mode, prediction
from losssurf_fast.undoing import afterwards


@torch.no_grad()
def update_bn(
    loader: Iterable,
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    subset: float | int | None = None,
    forward_kwargs: Mapping | None = None,
    process_group=None,
) -> None:
    """Set the running statistics of every BatchNorm layer to those of all the loader's samples.

    Called as ``torch.optim.swa_utils.update_bn(loader, model, device)``; but every sample has the same weight,
    whatever batch it is in, ``running_var`` is the unbiased variance of all samples (torch: the mean of the variances
    within the batches), and no other layer makes noise: Dropout and stochastic layers are deterministic. A layer's
    statistics depend on how the loader cuts the data only by the layers below it, which normalise by batches.

    ``num_batches_tracked`` becomes the number of batches. Modes, momenta and prediction schemes are as before
    afterwards; layers without running statistics, or that no batch reached, are left alone. Without BatchNorm layers
    in the model the loader is not read.

    Where torch.distributed is initialised each rank reads its share of the data and all get the statistics of the
    whole. A rank may have fewer batches than the others, or none, unless the model itself communicates in its forward
    (FSDP2, SyncBatchNorm): then all need as many. The ranks' models must have the same weights; draws by
    :meth:`SWAG.sample` have those only by the same ``seed``.

    Args:
        loader: yields tensors, tuples or lists whose first item is the input, or dicts, called as keyword arguments
            (an input that is a dict, too).
        device: where to move a batch's tensors; None leaves them.
        subset: how much of the loader to read: a fraction in (0, 1] of its batches as a float (rounded up; needs
            ``len(loader)``), or a number of batches as an int. None reads all.
        forward_kwargs: keyword arguments for every call of the model.
        process_group: a torch.distributed group over whose ranks the data are spread; None for all ranks, False for
            this one alone.

    Raises:
        TypeError, ValueError: an argument is not as above, the loader is empty on every rank, or a batch has a single
            value per channel, for which normalisation by the batch is not defined.
        RuntimeError: another rank failed, or ``model`` is an average of a sharded model, which holds none itself.
        Nothing is changed in any of these cases, nor where the loader or the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"update_bn: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = tracking_layers(model)
    if not layers:
        _num_batches(loader, subset, forward_kwargs)
        _refuse_sharded_average(unwrap(model))
        return
    statistics = {layer: _Statistics() for layer in layers.values()}
    batches, error = 0, None
    try:
        limit = _num_batches(loader, subset, forward_kwargs)
        if not isinstance(loader, Iterable):
            raise TypeError(f"update_bn: loader must be an iterable of batches, got {type(loader).__name__}")
        with _batch_statistics(layers, statistics, model):
            for batch in itertools.islice(loader, limit):
                call_on_batch("update_bn", unwrap(model), batch, device, forward_kwargs)
                batches += 1
    except Exception as e:  # raised below, once the other ranks know
        error = e
    if spread_over_ranks(process_group):
        batches = _merge_ranks(statistics, batches, error, process_group)
    if error is not None:
        raise error
    if batches == 0:
        raise ValueError("update_bn: loader must yield at least one batch, got none")
    for layer, found in statistics.items():
        if found.count:
            layer.running_mean.copy_(found.mean)
            layer.running_var.copy_(found.m2 / max(found.count - 1, 1))
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(batches)


def _refuse_sharded_average(model: nn.Module) -> None:
    from losssurf_fast.averaging import SWAG, AveragedModel  # of which SWAG imports this file

    if isinstance(model, SWAG | AveragedModel) and model._sharded:
        raise RuntimeError(
            f"update_bn: a sharded {type(model).__name__} holds no model; put its weights into the live one"
        )


def spread_over_ranks(process_group) -> bool:
    return process_group is not False and dist.is_available() and dist.is_initialized()


def is_first_rank(process_group) -> bool:
    return not spread_over_ranks(process_group) or dist.get_rank(process_group) == 0


def tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers with running statistics, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: m for name, m in layers.items() if m.track_running_stats and m.running_mean is not None}


class _Statistics:
    """Count, mean and M2 of the values of each channel; the count is known on the host, so nothing waits for a GPU."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, None, None

    def add(self, x: torch.Tensor) -> None:
        """Take in an input [N, C, ...]."""
        count = x.numel() // x.shape[1]
        dims = [d for d in range(x.dim()) if d != 1]
        centre = x.to(torch.promote_types(x.dtype, torch.float32)).mean(dims, keepdim=True)
        deviation = x - centre  # of small numbers: sums in fp32 lose nothing, and correct the centre's own rounding
        first = deviation.sum(dims).double()
        second = deviation.square_().sum(dims).double()
        self._merge(count, centre.flatten().double() + first / count, second - first.square() / count)

    def _merge(self, count: int, mean: torch.Tensor, m2: torch.Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.m2 = count, mean, m2
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count = total


@contextlib.contextmanager
def _batch_statistics(layers: dict[str, _BatchNorm], statistics: dict[_BatchNorm, _Statistics], model: nn.Module):
    """Within it BatchNorm layers normalise by batches and fill ``statistics``, and nothing else draws noise."""

    def observer(name):
        def observe(layer, args, kwargs):
            layer.track_running_stats = False  # here, not earlier: a lazy layer makes its buffers in its first call
            x = args[0] if args else kwargs["input"]
            if x.dim() < 2:
                return  # which the layer itself refuses
            if x.numel() < 2 * x.shape[1] and not isinstance(layer, nn.SyncBatchNorm):
                raise ValueError(
                    f"update_bn: every batch must give layer {name!r} at least 2 values per channel, got an "
                    f"input {tuple(x.shape)}; drop the last batch, or make batches larger"
                )
            if x.numel():  # SyncBatchNorm takes empty batches
                statistics[layer].add(x)

        return observe

    hooks = []

    def switch_back() -> None:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.training, layer.track_running_stats = False, True  # evaluation_mode restores the mode

    # Compiled submodules may have been compiled without hooks, so they run eagerly.
    with (
        torch.compiler.set_stance("force_eager"),
        evaluation_mode("update_bn", model),
        prediction(model, "deterministic"),
        afterwards(switch_back),
    ):
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(observer(name), with_kwargs=True))
            layer.training = True
        yield


def _merge_ranks(statistics: dict, batches: int, error: Exception | None, group) -> int:
    """Make ``statistics`` those of all ranks; returns the number of all batches.

    Three sums over the ranks: who failed; counts and count * mean; M2 about the common mean.
    """
    device = next(iter(statistics)).running_mean.device
    if any(is_lazy(layer.running_mean) for layer in statistics):
        error = error or RuntimeError("update_bn: a lazy BatchNorm layer saw no batch on this rank, nor ever before")
    (batches,) = agree("update_bn", error, device, group, batches)
    if batches == 0:
        return 0
    sizes = [layer.running_mean.numel() for layer in statistics]
    zeros = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
    means = [zero if s.count == 0 else s.mean.to(device) for s, zero in zip(statistics.values(), zeros, strict=True)]
    counts = torch.tensor([s.count for s in statistics.values()], dtype=torch.float64, device=device)
    sums = torch.cat([counts, *(m * s.count for m, s in zip(means, statistics.values(), strict=True))])
    dist.all_reduce(sums, group=group)
    totals = [int(n) for n in sums[: len(sizes)].tolist()]
    common = [x / max(n, 1) for x, n in zip(sums[len(sizes) :].split(sizes), totals, strict=True)]
    m2 = torch.cat(
        [
            zero if s.count == 0 else s.m2.to(device) + (m - c).square() * s.count
            for s, zero, m, c in zip(statistics.values(), zeros, means, common, strict=True)
        ]
    )
    dist.all_reduce(m2, group=group)
    for s, n, c, q in zip(statistics.values(), totals, common, m2.split(sizes), strict=True):
        s.count, s.mean, s.m2 = n, c, q
    return batches


def agree(caller: str, error: Exception | None, device: torch.device, group, *counts: int) -> list[int]:
    """Sums of counts over the ranks; where one of them failed all raise, so that none waits for it."""
    progress = torch.tensor([error is not None, *counts], dtype=torch.int64, device=device)
    dist.all_reduce(progress, group=group)
    failed, *sums = progress.tolist()
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"{caller}: {failed} other ranks failed")
    return sums


def jointly(caller: str, compute: Callable[[], Any], device: torch.device, group) -> Any:
    """What ``compute`` returns on this rank; where it fails on one of the ranks, all raise."""
    result, error = None, None
    try:
        result = compute()
    except Exception as e:  # raised below, once the other ranks know
        error = e
    if spread_over_ranks(group):
        agree(caller, error, device, group)
    elif error is not None:
        raise error
    return result


def call_on_batch(caller: str, model: nn.Module, batch, device, forward_kwargs: Mapping | None):
    """The output of ``model`` for what a loader yields: a tensor, (input, ...) or a dict of keyword arguments."""
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError(f"{caller}: loader must yield tuples with the input first, got an empty {type(batch)}")
        batch = batch[0]
    batch, kwargs = to_device(batch, device), forward_kwargs or {}
    return model(**batch, **kwargs) if isinstance(batch, Mapping) else model(batch, **kwargs)


def to_device(value, device):
    """``value`` with its tensors, also those inside it, on ``device``; containers keep their types."""
    if device is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(type(value), "to"):  # a PackedSequence, a tokenizer's batch
        return value.to(device)
    if isinstance(value, dict):
        moved = copy.copy(value)
        for key, v in value.items():
            moved[key] = to_device(v, device)
        return moved
    if isinstance(value, Mapping):
        return {key: to_device(v, device) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple
        return type(value)(*(to_device(v, device) for v in value))
    if isinstance(value, tuple | list):
        return type(value)([to_device(v, device) for v in value])
    return value


def _num_batches(loader: Iterable, subset: float | int | None, forward_kwargs: Mapping | None) -> int | None:
    """How many batches to read, None for all; refuses what is no such argument of :func:`update_bn`."""
    if forward_kwargs is not None and not isinstance(forward_kwargs, Mapping):
        raise TypeError(f"update_bn: forward_kwargs must be a mapping, got {type(forward_kwargs).__name__}")
    if subset is None:
        return None
    if isinstance(subset, bool) or not isinstance(subset, int | float):
        raise TypeError(f"update_bn: subset must be a fraction or a number of batches, got {type(subset).__name__}")
    if isinstance(subset, int):
        if subset < 1:
            raise ValueError(f"update_bn: subset must be at least one batch, got {subset}")
        return subset
    if not 0 < subset <= 1:
        raise ValueError(f"update_bn: subset must be a fraction in (0, 1] or an int, got {subset}")
    try:
        length = len(loader)
    except TypeError:
        raise TypeError(
            f"update_bn: subset={subset} needs a loader with a length, got {type(loader).__name__}; give the number "
            "of batches as an int"
        ) from None
    return math.ceil(subset * length * (1 - 1e-12))  # 0.07 * 100 is a little more than 7
