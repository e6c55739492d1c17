"""Fast geometric ensembling: networks on the way from minimum to minimum, and the mean of their predictions."""

import functools
import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from losssurf_fast.averaging.batch_norm import jointly, tracking_layers, update_bn
from losssurf_fast.averaging.schedules import FGETriangleLR
from losssurf_fast.averaging.swap import averaged_weights
from losssurf_fast.averaging.tensors import is_sharded, match, named_buffers, named_parameters
from losssurf_fast.files import load_state, save_state
from losssurf_fast.prediction import predict


class FGE:
    """Ensemble of the networks that training under a triangular rate passes at the middle of each cycle.

    Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", NeurIPS 2018, section 4: from a
    network trained for most of its budget, go on with a rate that falls from ``lr_1`` to ``lr_2`` and rises again
    (:class:`lsf.FGETriangleLR`), and keep the weights after each step at ``lr_2``::

        fge = lsf.FGE(model, optimizer, cycle=4 * len(loader), lr_1=0.05, lr_2=1e-4)
        for x, y in batches:
            ...
            optimizer.step()
            fge.step()
        probabilities = fge.predict(x_test)

    A member is all parameters and buffers, in the model's dtypes; BatchNorm statistics are its own from training.

    Args:
        model: the network; ``predict`` computes with it, and leaves it as it was.
        optimizer: whose rate to set; None for an ensemble that is only loaded, or filled by ``collect_model``.
        cycle: steps (calls of ``step``) of a cycle, an even number.
        lr_1, lr_2: highest and lowest rate, positive numbers or one for each parameter group.
        device: where the members are kept; None is where the model's tensors are.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: the model is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        cycle: int | None = None,
        lr_1: float | Sequence[float] = 0.05,
        lr_2: float | Sequence[float] = 1e-4,
        *,
        device: torch.device | str | None = "cpu",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"FGE: model must be a torch.nn.Module, got {type(model).__name__}")
        if any(is_sharded(p) for p in model.parameters()):
            raise NotImplementedError("FGE: model must not be sharded; members are whole networks")
        if optimizer is None and cycle is not None:
            raise ValueError(f"FGE: cycle={cycle} needs the optimizer whose rate it sets, got optimizer=None")
        self.model = model
        self.device = None if device is None else torch.device(device)
        self.schedule = None if optimizer is None else FGETriangleLR(optimizer, cycle, lr_1, lr_2)
        self._members: list[_Member] = []

    @property
    def members(self) -> tuple[Mapping[str, torch.Tensor], ...]:
        """The members in the order they were collected, tensors by name."""
        return tuple(self._members)

    def step(self) -> None:
        """To be called after every ``optimizer.step()``: keeps the weights if it was at ``lr_2``, and moves the rate.

        Raises:
            RuntimeError: there is no optimizer.
        """
        if self.schedule is None:
            raise RuntimeError("FGE.step: there is no schedule; make FGE with an optimizer and a cycle")
        if self.schedule.collect_now:
            self.collect_model()
        self.schedule.step()

    @torch.no_grad()
    def collect_model(self, model: nn.Module | None = None) -> None:
        """Make the weights of ``model`` (None: the ensemble's own) a member.

        Raises:
            TypeError, ValueError: it is no module, or its names, shapes or kinds of dtypes are not those of the
                ensemble's model.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"FGE.collect_model: model must be a torch.nn.Module, got {type(model).__name__}")
        tensors = _tensors(self.model)
        if model is not None:
            theirs = _tensors(model)
            tensors = dict(zip(tensors, match("FGE.collect_model", tensors, theirs), strict=True))
        self._members.append(_Member({name: self._kept(t) for name, t in tensors.items()}))

    def predict(self, x: torch.Tensor, *, bn_loader: Iterable | None = None) -> torch.Tensor:
        """The members' mean class probabilities ``[..., classes]``, float32 (float64 for float64 logits).

        The model is in ``eval()`` meanwhile; its tensors and modes are as before afterwards, also by an exception.

        Args:
            x: passed to the model, which returns logits, classes last.
            bn_loader: if given, each member predicts with BatchNorm statistics of this data (``lsf.update_bn``) in
                place of those it trained with. For many x call ``update_bn`` once.

        Raises:
            RuntimeError: there are no members, or another rank failed (``bn_loader`` is read as ``update_bn`` does).
        """
        self._require_members("FGE.predict")
        layers = {} if bn_loader is None else tracking_layers(self.model)
        device, group = (next(iter(layers.values())).running_mean.device, None) if layers else (None, False)
        total = 0
        for member in self._members:
            with averaged_weights(self.model, member):
                if bn_loader is not None:
                    update_bn(bn_loader, self.model)
                infer = functools.partial(predict, self.model, x, scheme="deterministic")
                total = total + jointly("FGE.predict", infer, device, group)
        return total / len(self._members)

    def update_bn(self, loader: Iterable, *, subset: float | int | None = None) -> None:
        """Give every member the BatchNorm statistics of the loader's data; arguments as for ``lsf.update_bn``.

        Raises:
            RuntimeError: there are no members.
        """
        self._require_members("FGE.update_bn")
        recalibrated = []
        for member in self._members:
            with averaged_weights(self.model, member):
                update_bn(loader, self.model, subset=subset)
                recalibrated.append(_Member({n: self._kept(t) for n, t in _tensors(self.model).items()}))
        self._members = recalibrated

    def state_dict(self) -> dict:
        """``members``, and the state of the ``schedule`` (None without one)."""
        return {
            "members": [dict(member) for member in self._members],
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Take members, and where there is a schedule its rates, its cycle and the place in it.

        The optimizer's own state holds the rate of the next step.

        Raises:
            TypeError, ValueError: the members are not of this model, the schedule is not whole, or the state is none
                of FGE's. Nothing is changed.
        """
        name = "FGE.load_state_dict"
        if not isinstance(state, Mapping) or not {"members", "schedule"} <= state.keys():
            raise ValueError(f"{name}: state must have the keys members and schedule")
        if not isinstance(state["members"], Sequence) or not all(map(_is_network, state["members"])):
            raise ValueError(f"{name}: state['members'] must be a list of dicts of tensors")
        if self.schedule is not None and not isinstance(state["schedule"], Mapping):
            raise ValueError(f"{name}: state was saved without a schedule and cannot resume one")
        ours = _tensors(self.model)
        members = [dict(zip(ours, match(name, ours, member), strict=True)) for member in state["members"]]
        members = [_Member({key: self._kept(t, ours[key]) for key, t in m.items()}) for m in members]
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self._members = members

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a file; it is whole or not there."""
        save_state(self.state_dict(), path)

    def load(self, path: str | os.PathLike) -> None:
        """Take the state from a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: the file is damaged, or of another model. Nothing is changed.
        """
        self.load_state_dict(load_state("FGE.load", path))

    def _kept(self, tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """A copy as members hold it, in the dtype of ``like``."""
        like = tensor if like is None else like
        return tensor.detach().to(self.device or like.device, like.dtype, copy=True)

    def _require_members(self, caller: str) -> None:
        if not self._members:
            raise RuntimeError(f"{caller}: there are no members yet; call step() or collect_model() while training")


class _Member(dict):
    """A network's tensors by name, as :func:`averaged_weights` takes them."""

    def averages(self) -> dict[str, torch.Tensor]:
        return self


def _is_network(member: object) -> bool:
    return isinstance(member, Mapping) and all(isinstance(t, torch.Tensor) for t in member.values())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return named_parameters(model) | named_buffers(model)
