"""Sharded models: tensors cut as their parameters are, and sums over every dimension of their mesh."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from losssurf_fast.averaging.tensors import local, real, some


def mesh_of(caller: str, tensors: Iterable[torch.Tensor]) -> DeviceMesh | None:
    """The mesh over which tensors are placed, None where all are plain.

    Raises:
        NotImplementedError: there are several.
    """
    meshes = {t.device_mesh for t in tensors if isinstance(t, DTensor)}
    if len(meshes) > 1:
        raise NotImplementedError(f"{caller}: parameters on {len(meshes)} different meshes")
    return meshes.pop() if meshes else None


def all_reduce_(tensor: torch.Tensor, mesh: DeviceMesh) -> None:
    for dim in range(mesh.ndim):
        dist.all_reduce(tensor, group=mesh.get_group(dim))


def broadcast_(tensor: torch.Tensor, mesh: DeviceMesh) -> None:
    """Give every rank the tensor of the mesh's first."""
    for dim in range(mesh.ndim):
        dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)


def require_finite(caller: str, named: Mapping[str, torch.Tensor]) -> None:
    """Raise where a value is NaN or infinite: one flag for all tensors, and for all ranks that hold a part of them.

    Raises:
        ValueError: on every rank of a mesh; only where the value lies it names the tensor.
    """
    values = {name: real(local(t)) for name, t in named.items()}
    broken = _nonfinite([*values.values()])
    meshes = {t.device_mesh for t in named.values() if isinstance(t, DTensor)}
    for mesh in sorted(meshes, key=lambda m: (m.size(), m.mesh.flatten().tolist())):  # in one order on every rank
        broken = broken.to(mesh.device_type)
        all_reduce_(broken, mesh)
    if broken.item():
        where = some([name for name, v in values.items() if not v.isfinite().all()]) or "other ranks' shards"
        raise ValueError(f"{caller}: the model's weights must be finite, got NaN or inf in {where}")


def _nonfinite(values: list[torch.Tensor]) -> torch.Tensor:
    """0-d int32: 1 where a value is NaN or infinite. The largest magnitude tells, read in one pass."""
    values = [v for v in values if v.numel()]
    if not values:
        return torch.zeros((), dtype=torch.int32)
    largest = torch._foreach_norm(values, float("inf"))
    largest = torch.stack([x.to(largest[0].device, torch.float64) for x in largest])
    return largest.isfinite().all().logical_not().int()


def is_first_copy(tensor: torch.Tensor, mesh: DeviceMesh | None) -> bool:
    """Whether this rank counts its part of ``tensor`` in a sum over the mesh, where others hold the same part."""
    if mesh is None:
        return True
    coordinate = mesh.get_coordinate()
    replicated = [True] * mesh.ndim
    if isinstance(tensor, DTensor):
        replicated = [p.is_replicate() for p in tensor.placements]
    return all(c == 0 for c, r in zip(coordinate, replicated, strict=True) if r)


def zeros_beside(p: torch.Tensor, leading: tuple[int, ...], dtype: torch.dtype, device=None) -> torch.Tensor:
    """Zeros [*leading, *shape] placed as ``p`` is, contiguous on every rank; by default on its device."""
    here = local(p)
    return part_of(p, torch.zeros((*leading, *here.shape), dtype=dtype, device=device or here.device), leading)


def part_of(p: torch.Tensor, here: torch.Tensor, leading: tuple[int, ...]) -> torch.Tensor:
    """``here`` as this rank's part of a tensor [*leading, *shape] that is cut where ``p`` is."""
    if not isinstance(p, DTensor):
        return here
    shape = torch.Size((*leading, *p.shape))
    placements = [Shard(q.dim + len(leading)) if q.is_shard() else q for q in p.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(here, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)
