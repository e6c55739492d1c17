"""A model's tensors beside their averages: paired by name once, used again while they are the same objects."""

import operator
import weakref
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.holder import require_weights


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
        pairs = [
            self._pairs(caller, named(holder), named(model))
            for named in (tensors.named_parameters, tensors.named_buffers)
        ]
        averaged = pairs[0] + (pairs[1] if average_buffers else [])
        floating = [(n, a, v) for n, a, v in averaged if a.is_floating_point() or a.is_complex()]
        chosen = {id(a) for _, a, _ in floating}
        self.names, self._averages, self._values = ([*column] for column in _columns(floating))
        _, self._copies, self._sources = (
            [*column] for column in _columns([pair for pair in pairs[0] + pairs[1] if id(pair[1]) not in chosen])
        )
        self._views = any(tensors.is_sharded(t) or t.is_complex() for t in chain(self._averages, self._copies))
        modules = [*holder.modules(), *model.modules()]
        self._members = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._seen = [*chain.from_iterable(map(dict.values, self._members))]
        self._devices = self._first_devices()

    @staticmethod
    def _pairs(caller, ours, theirs):
        require_weights(caller, theirs)
        return [*zip(ours, ours.values(), tensors.match(caller, ours, theirs), strict=True)]

    def _forget(self, _) -> None:
        self._members, self._seen, self._values, self._sources, self._fsdp = [], [], [], [], []

    def _first_devices(self) -> list[torch.device]:
        first = [*self._averages[:1], *self._values[:1], *self._copies[:1], *self._sources[:1]]
        return [tensors.local(t).device for t in first]

    def holds(self, holder: nn.Module, model: nn.Module) -> bool:
        """Whether these lists are still those of ``holder`` and ``model``."""
        if self._holder is not holder or self._model() is not model:
            return False
        for module in self._fsdp:
            module.reshard()
        now = chain.from_iterable(map(dict.values, self._members))
        same = sum(map(len, self._members)) == len(self._seen) and all(map(operator.is_, self._seen, now))
        return same and self._devices == self._first_devices()

    def lists(self) -> tuple[list[torch.Tensor], ...]:
        """(averages, values, copies, sources): what is averaged and what is copied; of shards what lies here."""
        found = (self._averages, self._values, self._copies, self._sources)
        return tuple([_real(tensors.local(t)) for t in ts] for ts in found) if self._views else found

    @property
    def moves(self) -> bool:
        """Whether averages are on another device than the model, by the first of them."""
        return self._devices[::2] != self._devices[1::2]

    def refuse_nonfinite(self, caller: str) -> None:
        """One flag for all values, and for all ranks that hold a part of them."""
        values = self.lists()[1]
        finite = _finite(values)
        meshes = {v.device_mesh for v in self._values if tensors.is_sharded(v)}
        for mesh in sorted(meshes, key=lambda m: (m.size(), m.mesh.flatten().tolist())):  # in one order on every rank
            for dimension in range(mesh.ndim):
                finite = finite.to(mesh.device_type)
                dist.all_reduce(finite, dist.ReduceOp.MIN, group=mesh.get_group(dimension))
        if not finite.item():
            bad = [name for name, v in zip(self.names, values, strict=True) if not v.isfinite().all()]
            where = tensors.some(bad) or "other ranks' shards"
            raise ValueError(f"{caller}: the model's weights must be finite, got NaN or inf in {where}")


def _columns(pairs):
    return zip(*pairs, strict=True) if pairs else ((), (), ())


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _finite(values: list[torch.Tensor]) -> torch.Tensor:
    """0-d int32: 1 where no value is NaN or infinite. The largest magnitude tells, read in one pass."""
    values = [v for v in values if v.numel()]
    if not values:
        return torch.ones((), dtype=torch.int32)
    largest = torch._foreach_norm(values, float("inf"))
    return torch.stack([x.to(largest[0].device, torch.float64) for x in largest]).isfinite().all().int()
