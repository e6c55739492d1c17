"""What tells one run from another: digests of weights, of models, and of functions as they are called."""

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Mapping, Set

import numpy as np
import torch
from torch import nn

from losssurf_fast.averaging import tensors


def digest(*weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors' names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for each in weights:
        for name, t in each.items():
            found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def name_of_model(model: nn.Module) -> str:
    """Its layers with their settings, and its parameters' dtypes."""
    model = tensors.unwrap(model)
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    dtypes = {name: str(p.dtype) for name, p in tensors.named_parameters(model).items()}
    return f"{type(model).__qualname__} {_short(layers + str(dtypes))}"


def name_of_autocast(device: torch.device) -> str:
    enabled = torch.is_autocast_enabled(device.type)
    return str(torch.get_autocast_dtype(device.type)) if enabled else "none"


def name_of_function(function: Callable) -> str:
    """Its name, with a digest of its code and of the values that it was made with.

    These are defaults, what it closes over, a partial's arguments, a module's tensors and a callable object's
    attributes. Numbers, strings, tensors, arrays, functions and containers of these count, others by their type;
    globals that it reads do not.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {_short(_described(function, ()))}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(value, around: tuple[int, ...]) -> str:
    if id(value) in around:  # a function that calls itself
        return f"<{around.index(id(value))}>"
    of = functools.partial(_described, around=(*around, id(value)))
    kind = type(value).__qualname__  # without the module, which is __main__ in some runs
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return f"{kind} {value!r}"
    if isinstance(value, torch.Tensor):
        return digest({"": tensors.local(value)})
    if isinstance(value, np.ndarray | np.generic):
        return f"{kind} {value.dtype} {value.shape} {_bytes(value)}"
    if isinstance(value, Mapping):
        return f"{kind} {[(of(key), of(item)) for key, item in value.items()]}"
    if isinstance(value, Set):
        return f"{kind} {sorted(of(item) for item in value)}"
    if isinstance(value, list | tuple):
        return f"{kind} {[of(item) for item in value]}"
    if isinstance(value, functools.partial):
        return f"{kind} {of(value.func)} {of(value.args)} {of(value.keywords)}"
    if isinstance(value, types.MethodType):
        return f"{kind} {of(value.__self__)} {of(value.__func__)}"
    if isinstance(value, types.CodeType):
        return f"{kind} {value.co_code!r} {value.co_names} {of(value.co_consts)}"
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        parts = value.__code__, value.__defaults__, value.__kwdefaults__, cells
        return f"{kind} {value.__qualname__} {of(parts)}"
    if inspect.isbuiltin(value) or inspect.isclass(value):
        return f"{kind} {value.__qualname__}"
    if isinstance(value, nn.Module):
        state = {n: t for n, t in [*value.named_parameters(), *value.named_buffers()]}
        children = {n: _attributes(m) for n, m in value.named_modules()}
        return f"{kind} {digest(state)} {of(children)}"
    return f"{kind} {of(_attributes(value))}" if callable(value) else kind


def _attributes(value) -> dict:
    """Those that say how an object was made; a module's hooks, tensors, children and mode do not."""
    found = {k: v for k, v in getattr(value, "__dict__", {}).items() if k != "training"}
    if isinstance(value, nn.Module):
        found = {k: v for k, v in found.items() if not k.startswith("_")} | {"": type(value)}
    return found


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _bytes(value) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
