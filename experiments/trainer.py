"""The one training loop of all experiments: epochs, schedule, average, checkpoints, and ranks.

A training has a name and a file ``<out>/<name>.pt``, which is whole after every epoch. The same command goes on from
there after it was killed, with the numbers of a run that was not: each epoch's batches and noise come from a seed of
its own. A training that is done is only loaded. Numbers depend on how many ranks there are (noise, BatchNorm), so a
checkpoint is refused by another number of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losssurf_fast as lsf
from experiments.command import Setting
from experiments.data import Batches
from losssurf_fast.evaluation import evaluate as measure_model
from losssurf_fast.files import load_state, save_state

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], torch.Tensor]


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, done: float) -> torch.Tensor:
    return F.cross_entropy(model(x).float(), y)


def train(
    setting: Setting,
    name: str,
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    loss: Loss = cross_entropy,
    schedule: Any = None,
    average: nn.Module | None = None,
    measure: Callable[[int], Mapping[str, float]] | None = None,
    seed: int | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return what was measured, one dict per epoch: "loss" and what ``measure`` found.

    Args:
        name: of the checkpoint; one of each in an experiment.
        loss: ``loss(model, x, y, done)``, a scalar; ``done`` in [0, 1) is the share of the training that is over.
        schedule: of learning rates, stepped after every epoch.
        average: updated after the epochs that ``schedule.collect_now`` names.
        measure: called with the number of epochs so far, on all ranks.
        seed: of the batches' order and of noise; None is ``--seed``.

    Raises:
        SystemExit: the checkpoint is of another run or damaged, or the loss is not finite.
    """
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    checkpoint = _Checkpoint(setting, name, epochs, {k: part for k, part in parts.items() if part is not None})
    history = checkpoint.resume()
    seed = setting.seed if seed is None else seed
    if len(history) < epochs:
        forward = _prepared(setting, model)
    bar = tqdm(range(len(history), epochs), desc=name, unit="epoch", ncols=70, leave=False, disable=not setting.first)
    for epoch in bar:
        torch.manual_seed((seed * 1_000_003 + epoch) * 1_009 + setting.rank)
        batches.set_epoch(seed, epoch)
        model.train()
        found = {"loss": _epoch(setting, forward, batches, optimizer, loss, epoch, epochs)}
        if not math.isfinite(found["loss"]):
            raise SystemExit(f"{setting.experiment}: the loss of {name} is {found['loss']} in epoch {epoch + 1};"
                             f"\ntry a smaller --lr than {setting.lr:g}")  # fmt: skip
        _share_buffers(setting, model)
        if average is not None and schedule.collect_now:
            average.update_parameters(model)
        if schedule is not None:
            schedule.step()
        found |= measure(epoch + 1) if measure else {}
        history.append(found)
        bar.set_postfix_str(" ".join(f"{key} {value:.3g}" for key, value in found.items())[:30])
        checkpoint.save(history)
    return history


def _epoch(setting, model, batches, optimizer, loss, epoch: int, epochs: int) -> float:
    total = torch.zeros((), device=setting.device)
    for i, (x, y) in enumerate(batches):
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
            value = loss(model, x, y, (epoch + i / len(batches)) / epochs)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.detach()
    if setting.world > 1:
        dist.all_reduce(total)
    return total.item() / len(batches) / setting.world


def _share_buffers(setting: Setting, model: nn.Module) -> None:
    """Give all ranks the first one's running statistics, which are those that the checkpoint keeps."""
    if setting.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _prepared(setting: Setting, model: nn.Module) -> nn.Module:
    if setting.world > 1:
        model = DistributedDataParallel(model)
    return torch.compile(model) if setting.compile else model


def evaluate(setting: Setting, model: nn.Module, batches: Iterable) -> dict[str, float]:
    """{"loss": mean cross-entropy, "error": fraction of wrong classes} in evaluation mode, over all ranks' shares."""
    return measure_model(setting.experiment, model, batches)


def sgd(setting: Setting, model: nn.Module, weight_decay: float, lr: float | None = None) -> torch.optim.SGD:
    """SGD with momentum 0.9 on what is trainable, at ``lr`` (None: ``--lr``)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, setting.lr if lr is None else lr, momentum=0.9, weight_decay=weight_decay)


def falling(optimizer: torch.optim.Optimizer, epochs: int) -> lsf.SWAConstantLR:
    """The schedule of the talk's papers without averages: constant for half the epochs, at 90 % a hundredth."""
    return lsf.SWAConstantLR(optimizer, [0.01 * group["lr"] for group in optimizer.param_groups], epochs)


class RegularisedLoss:
    """Cross-entropy + weight_decay / 2 * |w|^2 with the weights that ``model`` has when it is called."""

    __name__ = "RegularisedLoss"

    def __init__(self, model: nn.Module, weight_decay: float):
        self.model, self.weight_decay = model, weight_decay

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        return F.cross_entropy(outputs, targets) + 0.5 * self.weight_decay * torch.stack(norms).square().sum()


class _Checkpoint:
    """The file of one training: the states of its parts and its history, with the flags that it belongs to."""

    def __init__(self, setting: Setting, name: str, epochs: int, parts: Mapping[str, Any]):
        self.setting, self.parts, self.path = setting, parts, setting.out / f"{name}.pt"
        shapes = str([tuple(p.shape) for p in parts["model"].parameters()])
        self.identity = {**setting.identity(), "name": name, "length": epochs, "shapes": shapes}

    def resume(self) -> list[dict[str, float]]:
        """Load the file, if there is one, into the parts; its history, else an empty one."""
        found = self.setting.jointly(lambda: self._read() if self.setting.first else None)
        if self.setting.world > 1:
            shared = [found]
            dist.broadcast_object_list(shared, src=0, device=self.setting.device)
            found = shared[0]
        if found is None:
            return []
        if isinstance(found, str):
            raise SystemExit(f"{self.setting.experiment}: {found}")
        for key, part in self.parts.items():
            part.load_state_dict(found["states"][key])
        return found["history"]

    def _read(self) -> dict | str | None:
        """What the file holds, or in words why it is of no use."""
        if not self.path.exists():
            return None
        try:
            found = load_state(self.setting.experiment, self.path)
        except ValueError as error:
            return f"{str(error).removeprefix(self.setting.experiment + ': ')};\ndelete it, or give another --out"
        if not isinstance(found, dict) or found.keys() != {"identity", "states", "history"}:
            return f"{self.path} is no checkpoint of an experiment;\ndelete it, or give another --out"
        theirs = found["identity"]
        for key, value in self.identity.items():
            if theirs.get(key) != value:
                label = "number of ranks" if key == "world" else key
                what = "another architecture" if key == "shapes" else f"{label} {theirs.get(key)}, this run has {value}"
                return f"{self.path} is of a run with {what};\nuse its flags, delete it, or give another --out"
        return found

    def save(self, history: list[dict[str, float]]) -> None:
        states = {key: part.state_dict() for key, part in self.parts.items()}
        state = {"identity": self.identity, "states": states, "history": history}
        self.setting.jointly(lambda: save_state(state, self.path) if self.setting.first else None)
