"""What a curve is made from: networks or state_dicts as weights by name, looked through before anything is built."""

import contextlib
import copy
import inspect
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from losssurf_fast import weights
from losssurf_fast.averaging import tensors
from losssurf_fast.curve.bends import combined, computed_in
from losssurf_fast.ops.curve import CURVE_DTYPES

_NAME = "Curve"


def as_models(models, num_bends: int) -> list[nn.Module | Mapping]:
    """The end points, or all bends."""
    if isinstance(models, nn.Module | Mapping | torch.Tensor) or not isinstance(models, Sequence):
        raise TypeError(f"{_NAME}: models must be a sequence of modules or state_dicts, got {type(models).__name__}")
    if len(models) not in (2, num_bends):
        wanted = "the two end points" if num_bends == 2 else f"the two end points or all {num_bends} bends"
        raise ValueError(f"{_NAME}: models must be {wanted}, got {len(models)}")
    return list(models)


def template_of(models: Sequence[nn.Module | Mapping], model: nn.Module | None) -> nn.Module:
    """The module whose forward the curve calls, not copied yet.

    Raises:
        TypeError: there is none.
        ValueError: it is sharded, lazy or on the meta device, or has no parameters to combine.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a module, got {type(model).__name__}")
    found = next((network for m in (model, *models) if (network := weights.network_of(m)) is not None), None)
    if found is None:
        raise TypeError(f"{_NAME}: state_dicts need the module that they are of: Curve(models, model=...)")
    parameters = tensors.named_parameters(found)
    for name, p in parameters.items():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{_NAME}: {name} is lazy; run the model once before it is put on a curve")
        if p.is_meta:
            raise ValueError(f"{_NAME}: {name} must hold values, got a tensor on the meta device")
        if tensors.is_sharded(p):
            raise ValueError(f"{_NAME}: {name} is sharded; give the whole module as model=, and shard the curve")
        if p.is_floating_point() and p.dtype not in CURVE_DTYPES:
            raise TypeError(f"{_NAME}: {name} must have a dtype of {CURVE_DTYPES}, got {p.dtype}")
    if "t" in inspect.signature(found.forward).parameters:
        warnings.warn(
            f"{_NAME}: {type(found).__name__}.forward has an argument t, which curve(..., t=) takes for the place on "
            "the curve; pass the network's by position",
            stacklevel=3,
        )
    if not any(combined(p) for p in parameters.values()):
        raise ValueError(f"{_NAME}: {type(found).__name__} has no floating parameters to combine")
    return found


def weights_of(models: Sequence[nn.Module | Mapping], template: nn.Module) -> list[dict[str, torch.Tensor]]:
    """The models' parameters by the template's names, in its order, shards gathered.

    Raises:
        TypeError, ValueError: names, shapes, kinds of dtypes, or layers differ, or a parameter holds no finite values.
    """
    wanted = tensors.named_parameters(template)
    found = []
    for i, model in enumerate(models):
        named = weights.weights_of(_NAME, f"models[{i}]", model, template, wanted, of="the curve", gather=True)
        caller = f"{_NAME}: models[{i}]"
        if (network := weights.network_of(model)) is not None:
            _check_layers(caller, network, template)
        for name, t in named.items():
            first = found[0][name] if found else t
            if not combined(t) and not torch.equal(t, first.to(t.device)):
                raise ValueError(f"{caller}: {name} is of {t.dtype}, which stays constant; it must equal models[0]'s")
        found.append(named)
    first = found[0]
    if all(_equal(named, first) for named in found[1:]):
        raise ValueError(f"{_NAME}: models must differ, got {len(found)} with equal weights: the path has length zero")
    return found


def copy_of(template: nn.Module) -> nn.Module:
    """A copy with parameters on the meta device instead of those to combine, for :class:`Places` to take out.

    Raises:
        NotImplementedError: the copy would go on reading the template's own parameters or modules.
    """
    parameters = {id(p): p for p in template.parameters() if combined(p)}
    _refuse_hidden(template, parameters)
    memo = {key: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for key, p in parameters.items()}
    return copy.deepcopy(template, memo | computed_in(template))


def load_buffers(model: nn.Module, state: Mapping) -> None:
    """Copy the buffers of a state_dict into ``model``; those that it lacks stay.

    Raises:
        ValueError: the shape of one differs.
    """
    found = weights.tensors_of(_NAME, "models[0]", state, model)
    for name, buffer in tensors.named_buffers(model).items():
        if name in found:
            if found[name].shape != buffer.shape:
                shapes = f"{tuple(buffer.shape)}, got {tuple(found[name].shape)}"
                raise ValueError(f"{_NAME}: models[0]: {name} must have shape {shapes}")
            buffer.copy_(found[name])


def _equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    pairs = [(t, b[name]) for name, t in a.items() if combined(t)]
    return all(torch.equal(t.to(other), other) for t, other in pairs)


def _check_layers(caller: str, model: nn.Module, template: nn.Module) -> None:
    """Refuse other layers under the same names, which have no parameters to tell them apart: ReLU for Tanh."""
    wanted, found = _leaves(template), _leaves(model)
    for name in {**wanted, **found}:
        expected, got = wanted.get(name, "absent"), found.get(name, "none")
        if expected != got:
            raise ValueError(f"{caller}: {name or 'it'} must be {expected} like the curve's, got {got}")


def _leaves(model: nn.Module) -> dict[str, str]:
    leaves = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if not m._modules]
    named = {tensors.plain_name(f"{n}.").removesuffix("."): m for n, m in leaves}  # a wrapper's name ends in a dot
    kind = lambda m: type(m).__name__.removeprefix("FSDP") if isinstance(m, FSDPModule) else type(m).__name__
    return {name: kind(m) for name, m in named.items()}


def _refuse_hidden(template: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
    """Refuse what deepcopy would leave with the template: views of parameters, and what functions have captured."""
    live = {*parameters, *(id(m) for m in template.modules() if any(id(p) in parameters for p in m.parameters()))}
    for module in template.modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            continue  # its copy compiles anew
        for attribute, value in vars(module).items():
            if "state_dict" in attribute:  # hooks of saving and loading
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            reached = [t._base for t in held if isinstance(t, torch.Tensor)] + _captured(held)
            if any(id(item) in live for item in reached):
                raise NotImplementedError(
                    f"{_NAME}: {type(module).__name__}.{attribute} refers to the model's own parameters or modules, "
                    "also in copies of the model; the weights of the curve would not reach it"
                )


def _captured(held: Iterable) -> list:
    """What functions among ``held`` have captured, and functions that these have captured."""
    found, seen, waiting = [], set(), [f for f in held if isinstance(f, types.FunctionType)]
    while waiting:
        function = waiting.pop()
        seen.add(function)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                found.append(cell.cell_contents)
        waiting += [f for f in found if isinstance(f, types.FunctionType) and f not in seen]
    return found
