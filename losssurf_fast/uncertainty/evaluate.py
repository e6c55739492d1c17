"""A model's accuracy and uncertainty over a loader, each batch's ensemble made on the way."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from losssurf_fast.arguments import check_group
from losssurf_fast.averaging.batch_norm import call_on_batch, is_first_rank, jointly, spread_over_ranks, to_device
from losssurf_fast.ensembling import OnlineEnsemble
from losssurf_fast.loaders import split_batch
from losssurf_fast.outputs import class_logits
from losssurf_fast.prediction import check_draws, drawing
from losssurf_fast.uncertainty.metrics import UncertaintyMetrics
from losssurf_fast.uncertainty.report import UncertaintyReport

_NAME = "evaluate_uncertainty"


@torch.no_grad()
def evaluate_uncertainty(
    model: nn.Module,
    loader: Iterable,
    *,
    scheme: str = "ensemble",
    num_samples: int = 100,
    num_bins: int = 15,
    ignore_index: int = -100,
    class_dim: int = -1,
    seed: int | None = None,
    device: torch.device | str | int | None = None,
    process_group=None,
    progress: bool = True,
) -> UncertaintyReport:
    """Accuracy, NLL, Brier score, ECE, predictive entropy and mutual information in one pass over a loader.

    Each batch is predicted as :func:`losssurf_fast.predict` does and forgotten; nothing is read from the device before
    the end. During the call the whole model is in ``eval()``.

    Args:
        model: returns logits, or what has them as attribute or key "logits".
        loader: yields ``(inputs, targets)``, or dicts with the targets under "labels", "targets", "target" or "label"
            and the model's keyword arguments besides. Targets are class indices of the logits' shape without classes.
        scheme: "ensemble", "stochastic" or "deterministic"; only the latter is for models without stochastic layers.
        num_samples: draws of the ensemble; the other schemes ignore it.
        num_bins, ignore_index: as for :class:`losssurf_fast.UncertaintyMetrics`.
        class_dim: the logits' dimension of classes; 1 for those in the order of ``F.cross_entropy``.
        seed: fixes the noise (rank r takes seed + r), with it what else draws from torch's generators, such as a
            loader that shuffles, and leaves these as they were. None draws from the default generator.
        device: where to move a batch's tensors; None leaves them.
        process_group: where torch.distributed is initialised each rank reads its share of the data, which may be
            empty, and all get the results over the ranks of this group: None for all ranks, False for this one alone.
        progress: show a bar, on the first rank.

    Raises:
        TypeError, ValueError: an argument or batch is not as above, there are no stochastic layers to draw from, or no
            samples on any rank.
        RuntimeError: another rank failed. What the loader or the model raises passes through.
    """
    check_group(_NAME, process_group)
    here = _device_of(model) if device is None else torch.device(device)
    rank = dist.get_rank(process_group) if spread_over_ranks(process_group) else 0
    shown = progress and is_first_rank(process_group)
    metrics = UncertaintyMetrics(num_bins, ignore_index=ignore_index, device=here)

    def one_pass() -> None:
        draws = check_draws(_NAME, scheme, num_samples, seed)
        if isinstance(class_dim, bool) or not isinstance(class_dim, int):
            raise TypeError(f"{_NAME}: class_dim must be an int, got {type(class_dim).__name__}")
        if not isinstance(loader, Iterable):
            raise TypeError(f"{_NAME}: loader must be a loader of batches, got {type(loader).__name__}")
        bar = tqdm(loader, desc=_NAME, unit="batch", ncols=60, leave=False, disable=not shown)
        with drawing(_NAME, model, scheme, None if seed is None else seed + rank), bar:
            for batch in bar:
                inputs, targets = split_batch(_NAME, batch)
                ensemble = OnlineEnsemble()
                for _ in range(draws):
                    logits = class_logits(_NAME, call_on_batch(_NAME, model, (inputs,), device, None))
                    ensemble.update(_classes_last(logits, class_dim))
                metrics.update(ensemble, to_device(targets, device))

    jointly(_NAME, one_pass, here, process_group)
    return metrics.compute(process_group)


def _classes_last(logits: torch.Tensor, class_dim: int) -> torch.Tensor:
    if not -logits.dim() <= class_dim < logits.dim():
        dims = logits.dim()
        raise ValueError(f"{_NAME}: class_dim must lie in [{-dims}, {dims}), got {class_dim}")
    return logits.movedim(class_dim, -1)


def _device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
