"""Predictions by an ensemble of a model's weights, each with BatchNorm statistics of its own."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from losssurf_fast.averaging.batch_norm import call_on_batch, jointly, tracking_layers, update_bn
from losssurf_fast.ensembling import OnlineEnsemble
from losssurf_fast.loaders import refuse_single_pass
from losssurf_fast.outputs import class_logits
from losssurf_fast.prediction import evaluation_mode


@dataclass(frozen=True)
class Ensemble:
    """What a prediction by several sets of weights reads, and how.

    Attributes:
        model: whose weights change.
        each: what has these weights, for messages: "draw", "point".
        data: an input of the model, or a loader, read once for each set and so always in the same order, whose batches
            are as in :func:`losssurf_fast.update_bn`.
        bn_loader: where the model has BatchNorm layers, the data by which their statistics are set anew for each.
        recalibrate: False keeps the statistics that the model has.
        subset, process_group: for update_bn; where it reduces over ranks, the failure of one is raised on all.
        device, forward_kwargs: as in update_bn, for both loaders.
        here: where the weights are, for messages between ranks.
    """

    model: nn.Module
    each: str
    data: Any
    bn_loader: Iterable | None
    recalibrate: bool
    subset: float | int | None
    device: torch.device | str | int | None
    forward_kwargs: Mapping | None
    process_group: Any
    here: torch.device

    @property
    def recalibrated(self) -> bool:
        return self.recalibrate and bool(tracking_layers(self.model))

    @property
    def group(self):
        """The group whose ranks all take part: update_bn's, which needs them."""
        return self.process_group if self.recalibrated else False

    @property
    def batches(self) -> Iterable:
        return [self.data] if isinstance(self.data, torch.Tensor | Mapping) else self.data

    def check(self) -> None:
        """Refuse data that cannot be read once for each.

        Raises:
            TypeError, ValueError: they are missing, no loader, for a single pass or shuffled.
        """
        if self.recalibrated and self.bn_loader is None:
            raise ValueError(
                f"predict: bn_loader must yield the training data, as the BatchNorm statistics of every {self.each} "
                "are its own; recalibrate=False keeps those of module"
            )
        if not isinstance(self.batches, Iterable):
            raise TypeError(f"predict: data must be an input or a loader, got {type(self.data).__name__}")
        refuse_single_pass("predict", "data", self.batches, self.each)
        if isinstance(self.data, DataLoader) and isinstance(self.data.sampler, RandomSampler):
            raise ValueError(
                "predict: data must come in the same order in every pass, got a DataLoader with shuffle=True"
            )
        if self.recalibrated:
            refuse_single_pass("predict", "bn_loader", self.bn_loader, self.each)

    def jointly(self, compute: Callable[[], Any]) -> Any:
        return jointly("predict", compute, self.here, self.group)

    @torch.no_grad()
    def mean_of_softmax(self, members: Iterable[AbstractContextManager]) -> torch.Tensor:
        """Class probabilities ``[..., classes]``, by an :class:`losssurf_fast.OnlineEnsemble`.

        Args:
            members: each has its weights in ``model`` for a ``with`` block.

        Raises:
            TypeError, ValueError: the outputs are no logits, or there are no data or members.
        """
        ensemble = OnlineEnsemble(entropies=False)
        with evaluation_mode("predict", self.model):
            for member in members:
                with member:
                    if self.recalibrated:
                        options = {"forward_kwargs": self.forward_kwargs, "process_group": self.process_group}
                        update_bn(self.bn_loader, self.model, self.device, subset=self.subset, **options)
                    self.jointly(lambda: ensemble.update(self._logits()))
        return ensemble.probs

    def _logits(self) -> torch.Tensor:
        batches = (call_on_batch("predict", self.model, b, self.device, self.forward_kwargs) for b in self.batches)
        outputs = [class_logits("predict", logits) for logits in batches]
        if not outputs:
            raise ValueError("predict: data must yield at least one batch, got none")
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
