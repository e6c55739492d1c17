"""A model's tensors beside their averages: paired by name once, used again while they are the same objects."""

import operator
import weakref
from itertools import chain

import torch
from torch import nn

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.holder import require_weights
from losssurf_fast.averaging.mesh import require_finite


class Pairing:
    """Lists of averages and of the model's tensors, in one order.

    Walking two models of 167 tensors takes longer than averaging them, so the walk is done once; ``holds`` then
    compares identities alone. The model is not kept alive.

    Raises:
        ValueError: names, shapes or placements differ, or a tensor has no values.
        TypeError: a tensor has a dtype that cannot be averaged.
    """

    def __init__(self, caller: str, holder: nn.Module, model: nn.Module, average_buffers: bool):
        self._holder, self._model = holder, weakref.ref(model, self._forget)
        self._fsdp = [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
        self.names: list[str] = []
        self._averages, self._values, self._copies, self._sources = [], [], [], []
        for averaged, named in ((True, tensors.named_parameters), (average_buffers, tensors.named_buffers)):
            ours, theirs = named(holder), named(model)
            require_weights(caller, theirs)
            for (name, a), v in zip(ours.items(), tensors.match(caller, ours, theirs), strict=True):
                if averaged and (a.is_floating_point() or a.is_complex()):
                    self.names.append(name)
                    self._averages.append(a)
                    self._values.append(v)
                else:
                    self._copies.append(a)
                    self._sources.append(v)
        self._views = any(tensors.is_sharded(t) or t.is_complex() for t in chain(self._averages, self._copies))
        modules = [*holder.modules(), *model.modules()]
        self._members = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._filled = [d for d in self._members if d]
        self._seen = [*chain.from_iterable(map(dict.values, self._filled))]
        self._sizes = self._numels()
        self._devices = self._first_devices()
        devices = lambda ts: [tensors.local(t).device for t in ts]
        self.moves = devices(self._averages) != devices(self._values)  # from the model's devices to the averages'

    def _forget(self, _) -> None:
        self._members, self._filled, self._seen, self._fsdp = [], [], [], []
        self._values, self._sources = [], []

    def _numels(self) -> list[int]:
        return [*map(torch.Tensor.numel, self._sources)]  # copies broadcast; averaging refuses another shape itself

    def _first_devices(self) -> list[torch.device]:
        first = [*self._averages[:1], *self._values[:1], *self._copies[:1], *self._sources[:1]]
        return [tensors.local(t).device for t in first]

    def holds(self, holder: nn.Module, model: nn.Module) -> bool:
        """Whether these lists are still those of ``holder`` and ``model``."""
        if self._holder is not holder or self._model() is not model:
            return False
        for module in self._fsdp:
            module.reshard()
        now = chain.from_iterable(map(dict.values, self._filled))
        same = sum(map(len, self._members)) == len(self._seen) and all(map(operator.is_, self._seen, now))
        return same and self._sizes == self._numels() and self._devices == self._first_devices()

    def lists(self) -> tuple[list[torch.Tensor], ...]:
        """(averages, values, copies, sources): what is averaged and what is copied; of shards what lies here."""
        found = (self._averages, self._values, self._copies, self._sources)
        return tuple([tensors.real(tensors.local(t)) for t in ts] for ts in found) if self._views else found

    def refuse_nonfinite(self, caller: str) -> None:
        require_finite(caller, dict(zip(self.names, self._values, strict=True)))
