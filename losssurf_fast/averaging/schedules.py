"""Learning rates that make weights worth averaging: SWA's constant and cyclical rates and FGE's triangle.

With k the number of ``step()`` calls so far (iterations or epochs, as you call it), c = ``cycle`` and a1, a2 =
``lr_1``, ``lr_2``::

    SWAConstantLR   t = k / swa_start: the optimizer's own rate for t <= 0.5, swa_lr for t >= 0.9, linear between
    SWACyclicLR     (1 - t) a1 + t a2,                           t = ((k mod c) + 1) / c: a sawtooth, lowest at t = 1
    FGETriangleLR   (1 - 2t) a1 + 2t a2             for t < 1/2, t = (k mod c) / c: a triangle, lowest at t = 1/2
                    (2 - 2t) a2 + (2t - 1) a1       after

Sources: Izmailov et al., UAI 2018 (SWA), section 3.1, where iteration i = k + 1, and the authors' code for the constant
rate; Garipov et al., NeurIPS 2018 (FGE), in the form of the authors' code, where the first step has t = 0.

Each says in ``collect_now`` whether the weights of the step just taken are to be averaged or kept::

    optimizer.step()
    if schedule.collect_now:
        swa.update_parameters(model)
    schedule.step()
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class _Resumable(LRScheduler):
    """Checks a state before it takes it, by ``_load``; ``_keys`` are those it must have besides the epoch."""

    _keys: tuple[str, ...]

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Take the rates and the place among them from a ``state_dict()``; the optimizer restores its own rate.

        Raises:
            TypeError, ValueError: they are missing, or not as the constructor takes them. Nothing is changed.
        """
        name = f"{type(self).__name__}.load_state_dict"
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{name}: state_dict must be a mapping, got {type(state_dict).__name__}")
        missing = [key for key in (*self._keys, "last_epoch") if key not in state_dict]
        if missing:
            raise ValueError(f"{name}: state_dict lacks {', '.join(missing)}")
        _whole(name, "last_epoch", state_dict["last_epoch"], 0)
        self._load(name, state_dict)
        self.last_epoch = state_dict["last_epoch"]
        self._step_count, self._last_lr = self.last_epoch + 1, self.get_lr()


class SWAConstantLR(_Resumable):
    """The optimizer's rate for half of ``swa_start`` steps, then linearly to ``swa_lr`` at 90 %, where it stays.

    ``collect_now`` holds after the last of the first ``swa_start`` steps and after every ``collect_every``-th from
    there on.

    Args:
        optimizer: any torch optimizer.
        swa_lr: the constant rate, a positive number or one for each parameter group.
        swa_start: steps (calls of ``step``) until averaging begins.
        collect_every: steps from one averaged model to the next.
        last_epoch: as in ``torch.optim.lr_scheduler.LRScheduler``.

    Raises:
        TypeError, ValueError: an argument is not as above. Nothing is changed.
    """

    _keys = ("swa_lrs", "swa_start", "collect_every", "base_lrs")

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | Sequence[float],
        swa_start: int,
        *,
        collect_every: int = 1,
        last_epoch: int = -1,
    ) -> None:
        self._set("SWAConstantLR", optimizer, swa_lr, swa_start, collect_every)
        super().__init__(optimizer, last_epoch)

    def _set(self, name, optimizer, swa_lr, swa_start, collect_every) -> None:
        swa_lrs = _rates(name, "swa_lr", swa_lr, optimizer)
        _whole(name, "swa_start", swa_start)
        _whole(name, "collect_every", collect_every)
        self.swa_lrs, self.swa_start, self.collect_every = swa_lrs, swa_start, collect_every

    def _load(self, name, state) -> None:
        base_lrs, groups = state["base_lrs"], len(self.base_lrs)
        if not isinstance(base_lrs, list | tuple) or len(base_lrs) != groups:
            raise ValueError(f"{name}: base_lrs must be a list of {groups} rates, got {base_lrs!r}")
        for rate in base_lrs:
            if isinstance(rate, bool) or not isinstance(rate, int | float | torch.Tensor):
                raise TypeError(f"{name}: base_lrs must be numbers, got {type(rate).__name__}")
        self._set(name, self.optimizer, state["swa_lrs"], state["swa_start"], state["collect_every"])
        self.base_lrs = list(base_lrs)

    def get_lr(self) -> list:
        share = min(max((self.last_epoch / self.swa_start - 0.5) / 0.4, 0.0), 1.0)
        return [(1 - share) * base + share * swa for base, swa in zip(self.base_lrs, self.swa_lrs, strict=True)]

    @property
    def collect_now(self) -> bool:
        past = self.last_epoch + 1 - self.swa_start
        return past >= 0 and past % self.collect_every == 0


class _CyclicLR(_Resumable):
    """Rates between ``lr_1`` and ``lr_2`` by the place in a cycle alone; ``_share`` is that of ``lr_2``."""

    _keys = ("lrs_1", "lrs_2", "cycle")
    _multiple = 1  # of which a cycle must be one

    def __init__(self, optimizer, cycle, lr_1, lr_2, last_epoch) -> None:
        self._set(type(self).__name__, optimizer, cycle, lr_1, lr_2)
        super().__init__(optimizer, last_epoch)

    def _set(self, name, optimizer, cycle, lr_1, lr_2) -> None:
        lrs_1, lrs_2 = _rates(name, "lr_1", lr_1, optimizer), _rates(name, "lr_2", lr_2, optimizer)
        if any(low > high for high, low in zip(lrs_1, lrs_2, strict=True)):
            raise ValueError(f"{name}: lr_2 must be at most lr_1, got lr_1={lr_1} and lr_2={lr_2}")
        _whole(name, "cycle", cycle)
        if cycle % self._multiple:
            raise ValueError(f"{name}: cycle must be even, got {cycle}")
        self.lrs_1, self.lrs_2, self.cycle = lrs_1, lrs_2, cycle

    def _load(self, name, state) -> None:
        self._set(name, self.optimizer, state["cycle"], state["lrs_1"], state["lrs_2"])

    def get_lr(self) -> list:
        share = self._share()
        return [(1 - share) * high + share * low for high, low in zip(self.lrs_1, self.lrs_2, strict=True)]


class SWACyclicLR(_CyclicLR):
    """The sawtooth of the SWA paper: from near ``lr_1`` linearly down to ``lr_2`` within ``cycle`` steps, and again.

    ``collect_now`` holds after the step at ``lr_2``, once a cycle.

    Args:
        optimizer: any torch optimizer; the rates it has are replaced.
        cycle: steps (calls of ``step``) of a cycle.
        lr_1, lr_2: highest and lowest rate, positive numbers or one for each parameter group.
        last_epoch: as in ``torch.optim.lr_scheduler.LRScheduler``.

    Raises:
        TypeError, ValueError: an argument is not as above. Nothing is changed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle: int,
        lr_1: float | Sequence[float],
        lr_2: float | Sequence[float],
        *,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, cycle, lr_1, lr_2, last_epoch)

    def _share(self) -> float:
        return (self.last_epoch % self.cycle + 1) / self.cycle

    @property
    def collect_now(self) -> bool:
        return self.last_epoch % self.cycle == self.cycle - 1


class FGETriangleLR(_CyclicLR):
    """The triangle of fast geometric ensembling: ``lr_1`` to ``lr_2`` in half a cycle and back in the other half.

    ``collect_now`` holds after the step at ``lr_2``, in the middle of each cycle. :class:`lsf.FGE` has one of its own.

    Args:
        optimizer: any torch optimizer; the rates it has are replaced.
        cycle: steps (calls of ``step``) of a cycle, an even number.
        lr_1, lr_2: highest and lowest rate, positive numbers or one for each parameter group.
        last_epoch: as in ``torch.optim.lr_scheduler.LRScheduler``.

    Raises:
        TypeError, ValueError: an argument is not as above. Nothing is changed.
    """

    _multiple = 2

    def __init__(
        self,
        optimizer: Optimizer,
        cycle: int,
        lr_1: float | Sequence[float] = 0.05,
        lr_2: float | Sequence[float] = 1e-4,
        *,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, cycle, lr_1, lr_2, last_epoch)

    def _share(self) -> float:
        t = self.last_epoch % self.cycle / self.cycle
        return min(2 * t, 2 - 2 * t)

    @property
    def collect_now(self) -> bool:
        return self.last_epoch % self.cycle == self.cycle // 2


def _rates(name: str, argument: str, value: float | Sequence[float], optimizer: Optimizer) -> list[float]:
    """One positive rate for each parameter group."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    groups = len(optimizer.param_groups)
    rates = list(value) if isinstance(value, list | tuple) else [value] * groups
    if len(rates) != groups:
        raise ValueError(f"{name}: {argument} must be one number or {groups}, one for each group, got {len(rates)}")
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(f"{name}: {argument} must be a number, got {type(rate).__name__}")
        if not 0 < rate < math.inf:
            raise ValueError(f"{name}: {argument} must be positive and finite, got {rate}")
    return [float(rate) for rate in rates]


def _whole(name: str, argument: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive int" if least else "an int of at least 0"
        raise ValueError(f"{name}: {argument} must be {wanted}, got {value!r}")
