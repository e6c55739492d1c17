"""Weights for what runs a network's layers again in backward: activation checkpointing (``torch.utils.checkpoint``).

Recomputation reads the weights off the modules. Before the backward of a forward its own weights are put there, as
leaves: with ``use_reentrant=True`` every segment runs a backward of its own, and several of them cannot pass through
the one node that made all weights. So their gradients wait in the leaves until the backward's end.
"""

import dataclasses
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def prepare_backward(curve: nn.Module, t: torch.Tensor, weights: dict[str, torch.Tensor], outputs) -> None:
    """Let backward from ``outputs``, which the curve's module computed with ``weights``, find them there."""
    alive = weakref.ref(curve)  # the module may keep its outputs, which would keep the module
    leaves: dict[str, torch.Tensor] = {}

    def install(_):
        curve = alive()
        if curve is None or curve._places.installed is leaves:
            return
        if not leaves:
            leaves.update((n, w.detach().requires_grad_(w.requires_grad)) for n, w in weights.items())
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _finish(curve, t, leaves))
        curve._places.install(leaves)

    for output in tensors_in(outputs):
        if output.grad_fn is not None:
            output.register_hook(install)


def _finish(curve: nn.Module, t: torch.Tensor, leaves: dict[str, torch.Tensor]) -> None:
    """At the end of a backward take the leaves away and hand on the gradients that wait in them."""
    if curve._places.installed is leaves:
        curve._places.install(None)
    late = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    leaves.clear()
    if not late:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # gradients have been averaged over the ranks without these
        raise RuntimeError("Curve: activation checkpointing inside the network needs use_reentrant=False over ranks")
    with torch.enable_grad():
        weights = curve.weights(t)
    torch.autograd.backward([weights[name] for name in late], [*late.values()])


def tensors_in(outputs) -> list[torch.Tensor]:
    """The tensors among what a network returns, also in dataclasses."""
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found
