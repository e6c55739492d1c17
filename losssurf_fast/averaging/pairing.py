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
    compares identities alone. The model is not kept alive: its tensors are held while it lives, its modules weakly,
    because layers of a sharded model know the whole.

    Raises:
        ValueError: names, shapes or placements differ, or a tensor has no values.
        TypeError: a tensor has a dtype that cannot be averaged.
    """

    def __init__(self, caller: str, holder: nn.Module, model: nn.Module, average_buffers: bool):
        forget = weakref.WeakMethod(self._forget)  # a bound method would keep these lists, and the averages, alive
        self._holder, self._model = holder, weakref.ref(model, lambda _: (method := forget()) and method())
        self._fsdp = weakref.WeakSet(tensors.fsdp_modules(model))
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
        members = [d for m in modules for d in (m._parameters, m._buffers)]
        self._empty = [d for d in members if not d] + [m._modules for m in modules if not m._modules]
        self._filled = [d for d in members if d]
        self._seen = [*chain.from_iterable(map(dict.values, self._filled))]
        self._parents = [weakref.ref(m) for m in modules if m._modules]
        self._children = self._children_now()
        self._sizes = self._numels()

    def _forget(self) -> None:
        self._empty, self._filled, self._seen = [], [], []
        self._values, self._sources = [], []

    def _children_now(self) -> list[weakref.ref]:
        parents = [parent() for parent in self._parents]
        children = chain.from_iterable(p._modules.values() for p in parents if p is not None)
        return [weakref.ref(child) for child in children if child is not None]

    def _numels(self) -> list[int]:
        return [*map(torch.Tensor.numel, self._sources)]  # copies broadcast; averaging refuses another shape itself

    def holds(self, holder: nn.Module, model: nn.Module) -> bool:
        """Whether these lists are still those of ``holder`` and ``model``."""
        if self._holder is not holder or self._model() is not model:
            return False
        if any(self._empty) or self._children != self._children_now() or self._sizes != self._numels():
            return False
        tensors.reshard(self._fsdp)
        now = [*chain.from_iterable(map(dict.values, self._filled))]
        return len(now) == len(self._seen) and all(map(operator.is_, self._seen, now))

    def lists(self) -> tuple[list[torch.Tensor], ...]:
        """(averages, values, copies, sources): what is averaged and what is copied; of shards what lies here."""
        found = (self._averages, self._values, self._copies, self._sources)
        return tuple([tensors.real(tensors.local(t)) for t in ts] for ts in found) if self._views else found

    def refuse_nonfinite(self, caller: str) -> None:
        require_finite(caller, dict(zip(self.names, self._values, strict=True)))


def by_device(averages: list[torch.Tensor], values: list[torch.Tensor]) -> list[tuple[list, list]]:
    """The pairs as pairs of lists, each on one device: that of its averages, to which the values are moved."""
    number = torch.Tensor.get_device  # for all tensors at each update: this is a third cheaper than `device`
    if len({*map(number, averages), *map(number, values)}) == 1:
        return [(averages, values)]
    groups: dict[int, tuple[list, list]] = {}
    for a, v in zip(averages, values, strict=True):
        ours, theirs = groups.setdefault(number(a), ([], []))
        ours.append(a)
        theirs.append(v.to(a.device))
    return [*groups.values()]
