"""How surfaces, lines and rays are measured: a model visits points of weight space, and comes back as it was."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.batch_norm import is_first_rank, jointly, spread_over_ranks, tracking_layers
from losssurf_fast.averaging.swap import untouched
from losssurf_fast.evaluation import Evaluation, Metric, statistics_loader
from losssurf_fast.loaders import by_name
from losssurf_fast.prediction import seeded
from losssurf_fast.surface.identity import digest, name_of_autocast, name_of_function, name_of_model
from losssurf_fast.surface.measurements import Measurements
from losssurf_fast.surface.weights import model_parameters
from losssurf_fast.weights import Weights, known_names

Place = tuple  # an index of the grid's arrays


class Walk:
    """What is measured at every point, and how the model gets there.

    Args:
        caller: the public function, for messages.
        model: the live model. Within :meth:`run` its parameters and buffers change in place; they are bit-equal
            afterwards, also after an exception, and so are all modules' modes.
        loader and all others: as for :meth:`losssurf_fast.Plane.evaluate`.

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
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        process_group=None,
        path: str | os.PathLike | None = None,
        progress: bool = True,
    ):
        self.caller, self.model, self.path, self.progress = caller, model, path, progress
        self.parameters = model_parameters(caller, model)
        self._others = known_names(model)
        bn_loader = statistics_loader(caller, model, loader, bn_loader, recalibrate)
        self.evaluation = Evaluation(caller, loader, loss_fn, metrics, bn_loader, device, subset, process_group)

    def here(self, weights: Weights) -> Weights:
        """``weights`` on the model's devices, in memory that a walk leaves alone; they must be its parameters."""
        others = [name for name in weights if name in self._others and name not in self.parameters]
        if others:
            raise ValueError(
                f"{self.caller}: the weights must be parameters of the model alone, they hold {tensors.some(others)}; "
                "give model= where they are taken from state_dicts"
            )
        tensors.match(self.caller, weights, self.parameters, "the weights", "model")
        live = {p.untyped_storage().data_ptr() for p in self.parameters.values()}
        moved = {name: t.to(self.parameters[name].device) for name, t in weights.items()}
        return {name: t.clone() if t.untyped_storage().data_ptr() in live else t for name, t in moved.items()}

    def identity(self, weights: Sequence[Weights], grid: Mapping[str, object]) -> dict[str, str]:
        """What makes a run the one that it is, by key; only needed with a path, for which weights are hashed."""
        if self.path is None:
            return {}
        e = self.evaluation
        statistics = tracking_layers(self.model) if e.bn_loader is not None else {}
        recalibrated = tuple(f"{tensors.plain_name(name)}." for name in statistics)
        buffers = tensors.named_buffers(self.model)
        return {
            "weights": digest(*weights),
            "grid": json.dumps(grid),
            "the model": name_of_model(self.model),
            "autocast": name_of_autocast(next(iter(self.parameters.values())).device),
            "loss_fn": name_of_function(e.loss_fn),
            "metrics": json.dumps({name: name_of_function(metric) for name, metric in (e.metrics or {}).items()}),
            "loader": json.dumps({name: _length(loader) for name, loader in by_name(e.loader).items()}),
            "BatchNorm": f"from {e.subset or 'all'} of {_length(e.bn_loader)} batches" if statistics else "the model's",
            "the model's buffers": digest({n: b for n, b in buffers.items() if not n.startswith(recalibrated)}),
        }

    def run(self, result: Measurements, places: Iterable[Place], weights_at: Callable[[Place], Weights]) -> None:
        """Measure those of ``places`` that ``result``, or the file of its run, does not hold yet."""
        if self.path is not None:
            self._on_first_rank(lambda: result.resume(self.caller, self.path))
            result.values, result.done = self._from_first_rank((result.values, result.done))
        places = list(places)
        left = [place for place in places if not result.done[place].all()]
        if not left:
            return
        buffers = {name: b.detach().clone() for name, b in tensors.named_buffers(self.model).items()}
        with untouched(self.model) as write:
            for place in self._bar(left, len(places)):
                write(buffers | weights_at(place))
                with seeded(0, self.model):
                    found = self.evaluation(self.model)
                result.add(self.caller, place, found)
                if self.path is not None:
                    self._on_first_rank(lambda: result.save(self.path))

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """``action``, on one rank; where it fails all raise."""
        first, device = is_first_rank(self.evaluation.process_group), next(iter(self.parameters.values())).device
        jointly(self.caller, lambda: action() if first else None, device, self.evaluation.process_group)

    def _from_first_rank(self, value):
        group = self.evaluation.process_group
        if not spread_over_ranks(group):
            return value
        held = [value]
        dist.broadcast_object_list(held, group=group, group_src=0)
        return held[0]

    def _bar(self, left: list, total: int) -> Iterator:
        shown = self.progress and is_first_rank(self.evaluation.process_group)
        return tqdm(
            left, total=total, initial=total - len(left), desc=self.caller, unit="point", ncols=72, leave=False,
            disable=not shown,
        )  # fmt: skip


def _length(loader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
