"""Loss and other metrics of a model over a loader's samples, in one pass that never waits for the device."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.averaging.batch_norm import update_bn
from losssurf_fast.prediction import evaluation_mode

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def evaluate(
    caller: str,
    model: nn.Module,
    loader: Iterable,
    loss_fn: Metric = F.cross_entropy,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Means over a loader's samples: "loss", "error" for class labels, and each of ``metrics`` under its name.

    ``loss_fn(outputs, targets)`` and the metrics return the mean over a batch as a scalar; batches weigh by their
    number of samples. The model is in evaluation mode meanwhile.

    Raises:
        ValueError: the loader is empty; a loss or metric is no scalar.
    """
    total, samples = None, 0
    with evaluation_mode(caller, model):
        for inputs, targets in loader:
            if device is not None:
                inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            outputs = model(inputs)
            found = {"loss": loss_fn(outputs, targets)}
            if not targets.is_floating_point() and outputs.dim() == targets.dim() + 1:
                found["error"] = (outputs.argmax(1) != targets).double().mean()
            found |= {name: metric(outputs, targets) for name, metric in (metrics or {}).items()}
            for name, value in found.items():
                if not isinstance(value, torch.Tensor) or value.numel() != 1:
                    got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise ValueError(f"{caller}: {name} must be a scalar, the mean over a batch, got {got}")
            batch = torch.stack([v.detach().double().reshape(()) for v in found.values()]) * len(targets)
            total = batch if total is None else total + batch
            samples += len(targets)
    if not samples:
        raise ValueError(f"{caller}: loader must yield at least one batch, got none")
    return dict(zip(found, (total / samples).tolist(), strict=True))


@dataclass(frozen=True)
class Evaluation:
    """What the tools that walk through weight space measure at every point.

    Attributes:
        caller: the public function, for messages.
        loaders: one loader, whose metrics are called "loss", "error" ...; or loaders by name, "train_loss" and so on.
        loss_fn, metrics, device: as in :func:`evaluate`.
        bn_loader: data for the BatchNorm statistics of every point; None keeps the model's.
    """

    caller: str
    loaders: Iterable | Mapping[str, Iterable]
    loss_fn: Metric = F.cross_entropy
    metrics: Mapping[str, Metric] | None = None
    bn_loader: Iterable | None = None
    device: torch.device | str | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics of ``model`` as it is, which only gets other BatchNorm statistics."""
        if self.bn_loader is not None:
            update_bn(self.bn_loader, model, self.device)
        loaders = self.loaders if isinstance(self.loaders, Mapping) else {"": self.loaders}
        result = {}
        for name, loader in loaders.items():
            found = evaluate(self.caller, model, loader, self.loss_fn, self.metrics, self.device)
            result |= {f"{name}_{metric}" if name else metric: value for metric, value in found.items()}
        return result
