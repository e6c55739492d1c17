"""Curves over several ranks: one t for all, and bends of which every rank holds the rows that FSDP2 would give it.

Sharded bends are combined where they lie; then one all-gather makes the weights whole: 1/K of what gathering the K
bends would move. Its backward is one reduce-scatter to averages over the ranks, as with FSDP2.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from losssurf_fast.averaging import tensors

T_PER_RANK = ("same", "stratified")
LOSES_COMPILED_GRADIENTS = torch.__version__ < (2, 13)  # seen with 2.11: zeros, where 2.13 is right
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


def t_of_rank(t: torch.Tensor, t_per_rank: str) -> torch.Tensor:
    """What each rank makes of the t that it drew: that of rank 0, shifted by rank / world if stratified."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return t
    t = collectives.wait_tensor(collectives.broadcast(t, 0, dist.group.WORLD))
    if t_per_rank == "stratified":
        t = (t + dist.get_rank() / dist.get_world_size()) % 1
    return t


def shard_(trees: nn.ModuleList, mesh: DeviceMesh | None) -> DeviceMesh:
    """Turn the trees' parameters into DTensors: rows over the mesh, scalars on every rank.

    Raises:
        ValueError: torch.distributed is not initialised, or they are sharded already.
        NotImplementedError: the mesh has several dimensions.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("Curve.shard_: torch.distributed must be initialised")
    first = next(trees.parameters())
    if tensors.is_sharded(first):
        raise ValueError("Curve.shard_: the bends are sharded already")
    mesh = mesh or init_device_mesh(first.device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise NotImplementedError(f"Curve.shard_: mesh must have one dimension, got {mesh.ndim}")
    for tree in trees:
        for module in tree.modules():
            for leaf, p in module._parameters.items():
                part = distribute_tensor(p.detach(), mesh, [Shard(0) if p.dim() else Replicate()])
                module._parameters[leaf] = nn.Parameter(part, p.requires_grad)
    return mesh


@dataclass(frozen=True)
class Layout:
    """How the parts of whole tensors lie in the buffers of the ranks, one after another, padded to equal sizes."""

    mesh: DeviceMesh
    shapes: list[torch.Size]

    @classmethod
    def of(cls, bend: list[torch.Tensor]) -> "Layout":
        """That of a bend's DTensors.

        Raises:
            NotImplementedError: they are placed otherwise than by :func:`shard_` or ``fully_shard`` on one dimension.
        """
        mesh = bend[0].device_mesh
        for p in bend:
            wanted = (Shard(0) if p.dim() else Replicate(),)
            if p.device_mesh != mesh or tuple(p.placements) != wanted:
                raise NotImplementedError(f"Curve: bends must be placed as {wanted} on one mesh, got {p.placements}")
        return cls(mesh, [p.shape for p in bend])

    def rows(self, shape: torch.Size) -> int:
        """Rows of the largest part, the first, as ``Shard(0)`` cuts them."""
        return -(-shape[0] // self.mesh.size()) if shape else 1

    def size(self, shape: torch.Size) -> int:
        return self.rows(shape) * math.prod(shape[1:])


class _Whole(torch.autograd.Function):
    """Whole tensors from the parts of all ranks, in their layout."""

    @staticmethod
    def forward(ctx, layout: Layout, *parts: torch.Tensor):
        ctx.layout = layout
        ctx.sizes = [p.shape for p in parts]
        ranks = layout.mesh.size()
        gathered = [None] * len(parts)
        for members in _by_dtype(parts):
            sizes = [layout.size(layout.shapes[i]) for i in members]
            flat = parts[members[0]].new_zeros(sum(sizes))
            for here, i in zip(flat.split(sizes), members, strict=True):
                here[: parts[i].numel()].copy_(parts[i].reshape(-1))
            everywhere = collectives.wait_tensor(_all_gather(flat, 0, layout.mesh)).view(ranks, -1)
            for columns, i in zip(everywhere.split(sizes, 1), members, strict=True):
                shape = layout.shapes[i]
                if shape:
                    gathered[i] = columns.reshape(ranks * layout.rows(shape), *shape[1:])[: shape[0]].contiguous()
                else:  # the same on every rank
                    gathered[i] = columns[0].reshape(())
        return tuple(gathered)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        layout, ranks, result = ctx.layout, ctx.layout.mesh.size(), [None] * len(grads)
        for members in _by_dtype(grads):
            sizes = [layout.size(layout.shapes[i]) for i in members]
            everywhere = grads[members[0]].new_zeros(ranks, sum(sizes))
            for columns, i in zip(everywhere.split(sizes, 1), members, strict=True):
                shape = layout.shapes[i]
                if shape:
                    padded = grads[i].new_zeros(ranks * layout.rows(shape), *shape[1:])
                    padded[: shape[0]] = grads[i]
                    columns.copy_(padded.view(ranks, -1))
                else:
                    columns.copy_(grads[i].expand(ranks, 1))
            mean = collectives.wait_tensor(_reduce_scatter(everywhere.view(-1), "sum", 0, layout.mesh)) / ranks
            for here, i in zip(mean.split(sizes), members, strict=True):
                shape = ctx.sizes[i]
                result[i] = here[: math.prod(shape)].view(shape)
        return None, *result


def whole(layout: Layout, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Whole tensors on every rank; backward gives each the mean over the ranks of its part's gradient.

    Raises:
        NotImplementedError: under ``torch.compile`` of a torch that loses these gradients.
    """
    if LOSES_COMPILED_GRADIENTS and torch.compiler.is_compiling():
        raise NotImplementedError("Curve: sharded bends under torch.compile need torch 2.13 or newer")
    return list(_Whole.apply(layout, *parts))


def part(p: torch.Tensor) -> torch.Tensor:
    """What of a DTensor lies here, with a gradient that is one again."""
    return p.to_local() if p.requires_grad else p._local_tensor


def same_t(t: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The first rank's t, as a weight is made from all ranks' parts.

    Raises:
        NotImplementedError: it requires a gradient.
    """
    if t.requires_grad:
        raise NotImplementedError("Curve: sharded bends give no gradient to t")
    return collectives.wait_tensor(collectives.broadcast(t.detach(), 0, mesh))


def is_sharded(p: torch.Tensor) -> bool:
    return isinstance(p, DTensor)


def _by_dtype(parts) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(parts):
        groups.setdefault(p.dtype, []).append(i)
    return [*groups.values()]
