"""Weights for what runs a network's layers again in backward: activation checkpointing (``torch.utils.checkpoint``).

Recomputation reads the weights off the modules. Before the backward of a forward its own weights are put there, as
leaves: with ``use_reentrant=True`` every segment runs a backward of its own, and several of them cannot pass through
the one node that made all weights. So their gradients wait in the leaves until the backward's end.

Who finds none of a network's outputs finds no backward either: its weights are taken away at once, and recomputation
fails on tensors without values instead of reading another forward's.
"""

import dataclasses
import functools
import types
import weakref
from collections.abc import Iterator

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
    task = None

    def install(_):
        nonlocal leaves, task
        curve = alive()
        if curve is None:
            return
        running = torch._C._current_graph_task_id()
        if task != running:  # the leaves of a backward that failed hold gradients that nobody shall have
            task = running
            leaves = {n: w.detach().requires_grad_(w.requires_grad) for n, w in weights.items()}
            end = functools.partial(_finish, curve, t, weights, leaves)
            # a backward that fails drops its callbacks: then the leaves must not stay as the module's parameters
            weakref.finalize(end, curve._places.forget, leaves).atexit = False
            at_end_of_backward(end)
        if curve._places.installed is not leaves:
            curve._places.install(leaves, registered=True)

    hooks = [output.register_hook(install) for output in tensors_in(outputs) if output.grad_fn is not None]
    if not hooks:
        curve._places.forget(weights)


def at_end_of_backward(callback) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _finish(
    curve: nn.Module, t: torch.Tensor, weights: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]
) -> None:
    """At the end of a backward take the weights away and hand on the gradients that wait in the leaves."""
    curve._places.forget(leaves)
    curve._forget(weights)
    late = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    leaves.clear()
    if not late:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # gradients have been averaged over the ranks without these
        raise RuntimeError("Curve: activation checkpointing inside the network needs use_reentrant=False over ranks")
    with torch.enable_grad():
        again = curve.weights(t)
    torch.autograd.backward([again[name] for name in late], [*late.values()])


def tensors_in(outputs) -> Iterator[torch.Tensor]:
    """The tensors among what a network returns, also in the attributes of objects, dataclasses among them."""
    seen, waiting = set(), pytree.tree_leaves(outputs)
    while waiting:
        leaf = waiting.pop()
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif not isinstance(leaf, type | types.ModuleType | nn.Module) and id(leaf) not in seen:
            seen.add(id(leaf))
            fields = dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()  # may be slots
            attributes = {f.name: getattr(leaf, f.name) for f in fields} | getattr(leaf, "__dict__", {})
            waiting += pytree.tree_leaves([*attributes.values()])
