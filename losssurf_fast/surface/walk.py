"""The one way through weight space: a model visits points, is measured at each, and comes back as it was."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.batch_norm import tracking_layers
from losssurf_fast.averaging.swap import restored
from losssurf_fast.evaluation import Evaluation, Metric
from losssurf_fast.prediction import seeded
from losssurf_fast.surface.measurements import Measurements
from losssurf_fast.surface.weights import Weights, model_parameters, require_names

Place = tuple  # an index of the grid's arrays


class Walk:
    """What is measured at every point, and how the model gets there.

    Args:
        caller: the public function, for messages.
        model: the live model. Within :meth:`run` its parameters and buffers change in place; they are bit-equal
            afterwards, also after an exception, and so are all modules' modes.
        loader: one loader, or loaders by name: then the metrics are called "train_loss", "test_error" ...
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the batch.
        metrics: further ones of the same form, by name.
        bn_loader: training data for the BatchNorm statistics of every point; by default the loader called "train".
        recalibrate: False keeps the model's statistics instead, which belong to other weights.
        device: where batches are moved; None leaves them.
        path: an npz file that is whole after every point; an interrupted run that is called again goes on from it.
        progress: show a bar.

    At every point torch's generators start from the same state, so a loader that shuffles or augments by them yields
    the same batches everywhere, and a run that was interrupted gives the same bits as one that was not.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is not as above, or the model is sharded.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        loader: Iterable | Mapping[str, Iterable],
        *,
        loss_fn: Metric = F.cross_entropy,
        metrics: Mapping[str, Metric] | None = None,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        device: torch.device | str | None = None,
        path: str | os.PathLike | None = None,
        progress: bool = True,
    ):
        self.caller, self.model, self.path, self.progress = caller, model, path, progress
        self.parameters = model_parameters(caller, model)
        bn_loader = _statistics_loader(caller, model, loader, bn_loader, recalibrate)
        loaders = loader if isinstance(loader, Mapping) else {"loader": loader}
        if not loaders:
            raise ValueError(f"{caller}: loader must hold at least one loader, got none")
        for name, each in {**loaders, "bn_loader": bn_loader}.items():
            _check_loader(caller, name, each, optional=each is bn_loader)
        for name, function in {"loss_fn": loss_fn, **(metrics or {})}.items():
            if not callable(function):
                raise TypeError(f"{caller}: {name} must be callable, got {type(function).__name__}")
        if path is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise NotImplementedError(f"{caller}: path= where torch.distributed is initialised is not written")
        self.evaluation = Evaluation(caller, loader, loss_fn, metrics, bn_loader, device)

    def here(self, weights: Weights) -> Weights:
        """``weights`` on the devices of the model, whose parameters they must be."""
        require_names(self.caller, "model", weights, self.parameters, of="the weights")
        return {name: t.to(self.parameters[name].device) for name, t in weights.items()}

    def identity(self, weights: Sequence[Weights], grid: Mapping[str, object]) -> dict[str, str]:
        """What makes a run the one that it is, by key; only needed with a path, for which weights are hashed."""
        if self.path is None:
            return {}
        e = self.evaluation
        loaders = e.loaders if isinstance(e.loaders, Mapping) else {"loader": e.loaders}
        statistics = tracking_layers(self.model) if e.bn_loader is not None else {}
        recalibrated = tuple(f"{tensors.plain_name(name)}." for name in statistics)
        buffers = tensors.named_buffers(self.model)
        return {
            "weights": _digest(*weights),
            "grid": json.dumps(grid),
            "loss_fn and metrics": json.dumps(
                {"loss": _name(e.loss_fn), **{n: _name(m) for n, m in (e.metrics or {}).items()}}
            ),
            "loader": json.dumps({name: _length(loader) for name, loader in loaders.items()}),
            "BatchNorm": f"recalibrated, {_length(e.bn_loader)} batches" if statistics else "as in the model",
            "the model's buffers": _digest({n: b for n, b in buffers.items() if not n.startswith(recalibrated)}),
        }

    def run(self, result: Measurements, places: Iterable[Place], weights_at: Callable[[Place], Weights]) -> None:
        """Measure those of ``places`` that ``result``, or the file of its run, does not hold yet."""
        if self.path is not None:
            result.resume(self.caller, self.path)
        places = list(places)
        left = [place for place in places if not result.done[place].all()]
        if not left:
            return
        buffers = {name: b.detach().clone() for name, b in tensors.named_buffers(self.model).items()}
        with restored(self.model) as write:
            for place in self._bar(left, len(places)):
                write(buffers | weights_at(place))
                with seeded(0, self.model):
                    found = self.evaluation(self.model)
                result.add(self.caller, place, found)
                if self.path is not None:
                    result.save(self.path)

    def _bar(self, left: list, total: int) -> Iterator:
        return tqdm(
            left, total=total, initial=total - len(left), desc=self.caller, unit="point", ncols=72, leave=False,
            disable=not self.progress,
        )  # fmt: skip


def _statistics_loader(caller: str, model: nn.Module, loaders, bn_loader, recalibrate: bool):
    if not recalibrate and bn_loader is not None:
        raise ValueError(f"{caller}: bn_loader and recalibrate=False exclude each other")
    if bn_loader is not None or not recalibrate or not tracking_layers(model):
        return bn_loader
    if isinstance(loaders, Mapping) and "train" in loaders:
        return loaders["train"]
    raise ValueError(
        f"{caller}: the model has BatchNorm layers, whose statistics must be taken anew at every point; give training "
        "data as bn_loader= or as the loader 'train', or keep the model's statistics by recalibrate=False"
    )


def _check_loader(caller: str, name: str, loader, optional: bool) -> None:
    if loader is None and optional:
        return
    if not isinstance(loader, Iterable) or isinstance(loader, torch.Tensor):
        raise TypeError(f"{caller}: {name} must be an iterable of batches, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{caller}: {name} is read at every point, got a {type(loader).__name__}, which ends; use a list"
        )
    if _length(loader) == 0:
        raise ValueError(f"{caller}: {name} must yield at least one batch, got none")


def _length(loader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _name(function) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _digest(*weights: Weights) -> str:
    """SHA-256 of tensors' names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for each in weights:
        for name, t in each.items():
            found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
