"""Loss and other metrics of a model over a loader's samples, in one pass that never waits for the device."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from losssurf_fast.arguments import check_group
from losssurf_fast.averaging.batch_norm import call_on_batch, spread_over_ranks, to_device, tracking_layers, update_bn
from losssurf_fast.loaders import Inputs, by_name, num_samples, refuse_single_pass, split_batch
from losssurf_fast.outputs import call_metric, is_cross_entropy, logits_of
from losssurf_fast.prediction import evaluation_mode

Metric = Callable[[Any, Any], torch.Tensor]

_UPDATE_BN = "update_bn: "  # how its own messages begin


@torch.no_grad()
def evaluate(
    caller: str,
    model: nn.Module,
    loader: Iterable,
    loss_fn: Metric = F.cross_entropy,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str | int | None = None,
    process_group=None,
) -> dict[str, float]:
    """Means over a loader's samples: "loss", "error" for class labels, and each of ``metrics`` under its name.

    Sums are made in float64 on the device and read once, at the end. The model is in evaluation mode meanwhile.

    Args:
        loader: yields ``(inputs, targets)``, or dicts whose targets have one of the keys "labels", "targets", "target",
            "label" and whose other items are the model's keyword arguments, as are those of inputs that are a dict.
        loss_fn: ``loss_fn(outputs, targets)`` gives the mean over a batch as a tensor of one element. Batches weigh by
            their number of samples, the first size of the targets; empty ones count nothing. A NaN is a result, such as
            cross_entropy's where it ignores a batch's every target. (By samples also where some targets are ignored or
            a sample has many: the mean over all targets is that over batches only if each has equally many.)
            Cross entropy of torch (also with options, by ``functools.partial`` or ``nn.CrossEntropyLoss``) gets the
            ``logits``, an attribute or key, of outputs that are no tensor; any other function the outputs themselves.
        metrics: more functions like ``loss_fn``, by name. One named "error" replaces the following.
        device: where to move a batch's tensors; None leaves them.
        process_group: where torch.distributed is initialised each rank reads its share of the data, which may be
            empty, and all get the means over the ranks of this group: None for all ranks, False for this one alone.

    The error is the fraction of wrong classes where targets are integers [N, ...] and outputs logits [N, C, ...], C at
    least 2, as ``torch.nn.functional.cross_entropy`` takes them; targets below 0, which it ignores, do not count, nor
    does a batch weigh by them. Where the classes might as well be last ([N, C, C] for targets [N, C]) there is an error
    only if ``loss_fn`` is cross entropy.

    Raises:
        TypeError, ValueError: an argument or batch is not as above, or the loader is empty (on every rank).
        RuntimeError: another rank failed. What the loader, the model or a function raises passes through.
    """
    sums, error = _Sums(caller), None
    try:
        _check(caller, loss_fn, metrics)
        if not isinstance(loader, Iterable):
            raise TypeError(f"{caller}: loader must be a loader of batches, got {type(loader).__name__}")
        with evaluation_mode(caller, model):
            for batch in loader:
                inputs, targets = split_batch(caller, batch)
                samples, targets = num_samples(caller, targets), to_device(targets, device)
                outputs = call_on_batch(caller, model, (inputs,), device, None)
                if samples:
                    functions = {"loss": loss_fn, **(metrics or {})}
                    found = {name: call_metric(function, outputs, targets) for name, function in functions.items()}
                    counted = {} if "error" in found else _wrong(logits_of(outputs), targets, is_cross_entropy(loss_fn))
                    sums.add(found, samples, counted)
    except Exception as e:  # raised below, once the other ranks know
        error = e
    if spread_over_ranks(process_group):
        sums.add_ranks(error, process_group)
    if error is not None:
        raise error
    return sums.means()


def _check(caller: str, loss_fn: Metric, metrics: Mapping[str, Metric] | None) -> None:
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"{caller}: metrics must be a mapping from names to functions, got {type(metrics).__name__}")
    for name, function in {"loss_fn": loss_fn, **(metrics or {})}.items():
        if not callable(function):
            raise TypeError(
                f"{caller}: {name} must be a function of outputs and targets, got {type(function).__name__}"
            )
    if metrics is not None and "loss" in metrics:
        raise ValueError(f"{caller}: a metric must not be named 'loss', which is loss_fn's")


def _wrong(outputs, targets, classes_second: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The numbers of wrong classes and of those that count, where outputs and targets are logits and labels.

    ``classes_second`` says so of outputs whose shape does not.
    """
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        return {}
    integers = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    logits = outputs.dim() > 1 and outputs.shape[1] > 1 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    ambiguous = outputs.dim() > 2 and outputs.shape[:-1] == targets.shape
    if not integers or not logits or (ambiguous and not classes_second):
        return {}
    counted = targets >= 0
    wrong = (outputs.argmax(1) != targets) & counted
    return {"error": (wrong.sum(), counted.sum())}


class _Sums:
    """Sums over samples of what has means over batches, and the numbers of samples that they are over: ``[2, M]``."""

    def __init__(self, caller: str):
        self._caller, self._names, self._total = caller, [], None

    def add(
        self, found: dict[str, torch.Tensor], samples: int, counted: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Take in the means over a batch of so many samples, and sums with numbers of their own."""
        for name, value in found.items():
            if not isinstance(value, torch.Tensor):
                wanted = "a tensor of one element (not its item(), which would wait for the device)"
                raise TypeError(f"{self._caller}: {name} must be {wanted}, got {value!r}")
            if value.is_complex():
                raise TypeError(f"{self._caller}: {name} must be real, got {value.dtype}")
            if value.numel() != 1:
                shape = tuple(value.shape)
                raise ValueError(f"{self._caller}: {name} must be a scalar, the mean over a batch, got {shape}")
        here = lambda v: v.detach().to(found["loss"].device, torch.float64).reshape(())
        means = torch.stack([here(v) for v in found.values()])
        batch = torch.stack([means * samples, torch.full_like(means, samples)])
        if counted:
            own = torch.stack([torch.stack([here(v) for v in pair]) for pair in counted.values()], 1)
            batch = torch.cat([batch[:, :1], own, batch[:, 1:]], 1)
        names = ["loss", *counted, *(name for name in found if name != "loss")]
        if self._total is None:
            self._names, self._total = names, batch
        elif names != self._names:
            raise ValueError(f"{self._caller}: every batch must have the metrics {self._names}, one has {names}")
        else:
            self._total += batch

    def add_ranks(self, error: Exception | None, group) -> None:
        """Take in what the other ranks have, in one exchange; raise where one of them failed."""
        total = None if self._total is None else self._total.tolist()
        everyone: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (error is not None, self._names, total), group=group)
        failed = sum(rank[0] for rank in everyone)
        if failed and error is None:
            raise RuntimeError(f"{self._caller}: {failed} other ranks failed")
        parts = [rank[1:] for rank in everyone if rank[2] is not None]
        if any(names != parts[0][0] for names, _ in parts):
            raise ValueError(f"{self._caller}: every rank must have the same metrics, got {[n for n, _ in parts]}")
        if parts:
            self._names = parts[0][0]
            self._total = torch.tensor([total for _, total in parts], dtype=torch.float64).sum(0)

    def means(self) -> dict[str, float]:
        if self._total is None:
            raise ValueError(f"{self._caller}: loader must yield at least one sample, got none")
        return dict(zip(self._names, (self._total[0] / self._total[1]).tolist(), strict=True))


@dataclass(frozen=True)
class Evaluation:
    """What the tools that walk through weight space measure at every point.

    Attributes:
        caller: the public function, for messages.
        loader: one, whose metrics are called "loss", "error" ...; or loaders by name, "train_loss" and so on.
        loss_fn, metrics, device, process_group: as in :func:`evaluate`.
        bn_loader: data for the BatchNorm statistics of every point; None keeps the model's. Dicts are passed to the
            model without targets, as in :func:`evaluate`.
        subset: how much of ``bn_loader`` to read, as in :func:`losssurf_fast.update_bn`.

    Raises:
        TypeError, ValueError: an argument is not as above, a loader can be read only once, or two results would have
            one name.
    """

    caller: str
    loader: Iterable | Mapping[str, Iterable]
    loss_fn: Metric = F.cross_entropy
    metrics: Mapping[str, Metric] | None = None
    bn_loader: Iterable | None = None
    device: torch.device | str | int | None = None
    subset: float | int | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        _check(self.caller, self.loss_fn, self.metrics)
        check_group(self.caller, self.process_group)
        if isinstance(self.loader, Mapping):
            if not self.loader:
                raise ValueError(f"{self.caller}: loader must hold at least one loader, got none")
            for name, loader in self.loader.items():
                refuse_single_pass(self.caller, f"loader[{name!r}]", loader, "point")
        else:
            refuse_single_pass(self.caller, "loader", self.loader, "point")
        seen = set()
        for loader in by_name(self.loader):
            for metric in dict.fromkeys(("loss", "error", *(self.metrics or ()))):
                if not isinstance(loader, str) or not isinstance(metric, str):
                    named = f"{loader!r}, {metric!r}"
                    raise TypeError(f"{self.caller}: loaders and metrics must have strings as names, got {named}")
                name = self._name(loader, metric)
                if name in seen:
                    raise ValueError(f"{self.caller}: two results would be called {name!r}; rename {metric!r}")
                seen.add(name)
        if self.bn_loader is not None:
            refuse_single_pass(self.caller, "bn_loader", self.bn_loader, "point")

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics of ``model`` as it is, which only gets other BatchNorm statistics.

        The random generators are as before afterwards, so that loaders that shuffle by torch's give every point the
        same batches.
        """
        return {
            self._name(loader, metric): value
            for loader, found in self.by_loader(model).items()
            for metric, value in found.items()
        }

    def by_loader(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """The same by the loaders' names; a loader that was given none is called "data"."""
        with torch.random.fork_rng(_gpus(model)):
            if self.bn_loader is not None:
                self._recalibrate(model)
            return {
                name: evaluate(self.caller, model, loader, self.loss_fn, self.metrics, self.device, self.process_group)
                for name, loader in by_name(self.loader).items()
            }

    def _name(self, loader: str, metric: str) -> str:
        return f"{loader}_{metric}" if isinstance(self.loader, Mapping) else metric

    def _recalibrate(self, model: nn.Module) -> None:
        bn_loader = Inputs(self.bn_loader)
        try:
            update_bn(bn_loader, model, self.device, subset=self.subset, process_group=self.process_group)
        except (TypeError, ValueError) as error:
            if not str(error).startswith(_UPDATE_BN):
                raise  # a loader's or the model's own
            raise type(error)(f"{self.caller}: BatchNorm statistics: {str(error).removeprefix(_UPDATE_BN)}") from error


def _gpus(model: nn.Module) -> list[int]:
    """Those in use: the current one and those of the model's tensors."""
    if not torch.cuda.is_initialized():
        return []
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({torch.cuda.current_device(), *(t.device.index for t in tensors if t.is_cuda)})


def statistics_loader(caller: str, model: nn.Module, loaders, bn_loader, recalibrate: bool):
    """The data for the BatchNorm statistics of every point: ``bn_loader``, or the loader "train"; None for none.

    Raises:
        TypeError: ``recalibrate`` is no bool.
        ValueError: the model has BatchNorm layers and there is no such loader, or both arguments are given.
    """
    if not isinstance(recalibrate, bool):
        raise TypeError(f"{caller}: recalibrate must be a bool, got {type(recalibrate).__name__}")
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
