"""Points of weight space: a model's parameters by name, wherever they come from, and inner products of them.

Only parameters are coordinates. BatchNorm's statistics are functions of the weights and the data; with them as
coordinates, distances are wrong (and 1e4 batches tracked are a distance of 1e4).
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.mesh import require_finite
from losssurf_fast.averaging.model import AveragedModel
from losssurf_fast.curve import Curve
from losssurf_fast.curve.geometry import chunks
from losssurf_fast.ops.curve import curve_weights

Weights = dict[str, torch.Tensor]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_AVERAGED = (AveragedModel, TorchAveragedModel)


def weights_of(caller: str, argument: str, source, model: nn.Module | None = None) -> Weights:
    """The floating parameters of ``source`` by plain name, without gradients.

    Args:
        source: a model, an average of one, or a mapping from names to tensors, such as a state_dict or what
            ``Curve.weights(t)`` returns.
        model: says which entries of a mapping are parameters. Without it those of BatchNorm's buffers' names are
            left out, and so are second names of a tied tensor.

    Raises:
        TypeError, ValueError, NotImplementedError: it is none of these, lacks parameters of the model or has entries
            that the model does not know, or its tensors are sharded, complex, or hold no finite values.
    """
    named = _named(caller, argument, source)
    _require_values(f"{caller}: {argument}", named)
    if model is not None:
        named = _select(caller, argument, named, model)
    else:
        named = _without_repeats({n: t for n, t in named.items() if n.rpartition(".")[2] not in _STATISTICS})
    for name, t in named.items():
        if tensors.is_sharded(t):
            raise NotImplementedError(
                f"{caller}: {argument}: {name} is sharded; give the whole model's weights (t.full_tensor())"
            )
        if t.is_complex():
            raise NotImplementedError(f"{caller}: {argument}: {name} is complex, which is not written")
    found = {n: t.detach() for n, t in named.items() if t.is_floating_point()}
    if not any(t.numel() for t in found.values()):
        raise ValueError(f"{caller}: {argument} must hold floating parameters, got none")
    require_finite(f"{caller}: {argument}", found)
    return found


def _named(caller: str, argument: str, source) -> dict[str, torch.Tensor]:
    if isinstance(source, Curve):
        raise TypeError(f"{caller}: {argument} must be one point; of a Curve give its weights(t)")
    if isinstance(source, _AVERAGED):
        return tensors.named_parameters(source.module)
    if hasattr(source, "averages"):
        return dict(source.averages())
    if isinstance(source, nn.Module):
        return tensors.named_parameters(source)
    if not isinstance(source, Mapping):
        wanted = "a model, an average of one, or a mapping from names to tensors"
        raise TypeError(f"{caller}: {argument} must be {wanted}, got {type(source).__name__}")
    named = {}
    for name, t in source.items():
        if isinstance(name, str) and isinstance(t, torch.Tensor):
            named[name] = t
        elif not str(name).endswith("_extra_state"):  # torch's entry for what a module saves besides tensors
            raise TypeError(f"{caller}: {argument} must map names to tensors, got a {type(t).__name__} under {name!r}")
    inner = {n.removeprefix("module."): t for n, t in named.items() if n.startswith("module.")}
    if inner and all(n.startswith("module.") or n == "n_averaged" for n in named):
        named = inner  # the state_dict of an average, or of a DistributedDataParallel
    return {tensors.plain_name(n): t for n, t in named.items()}


def _require_values(what: str, named: Mapping[str, torch.Tensor]) -> None:
    for name, t in named.items():
        if nn.parameter.is_lazy(t) or t.is_meta:
            raise ValueError(f"{what}: {name} must hold values, got none")


def _without_repeats(named: Weights) -> Weights:
    """Tied tensors once, under their first name, as ``named_parameters`` gives them."""
    first = {}
    for name, t in named.items():
        key = (t.data_ptr(), t.shape, t.stride()) if t.numel() and not tensors.is_sharded(t) else name
        first.setdefault(key, name)
    return {name: named[name] for name in first.values()}


def _select(caller: str, argument: str, named: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = model_parameters(caller, model)
    known = known_names(model)
    require_names(caller, argument, parameters, {n: t for n, t in named.items() if n in parameters or n not in known})
    return {n: named[n] for n in parameters}


def known_names(model: nn.Module) -> set[str]:
    """Every plain name of a model's tensors: parameters under all of their names, and buffers."""
    model = tensors.unwrap(model)
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {tensors.plain_name(name) for name, _ in named}


def model_parameters(caller: str, model: nn.Module) -> Weights:
    """The floating parameters of a live model by plain name, which are its place in weight space."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    named = tensors.named_parameters(model)
    _require_values(f"{caller}: model", named)
    if any(tensors.is_sharded(p) for p in named.values()):
        raise NotImplementedError(f"{caller}: model is sharded (FSDP2, tensor parallel), which is not written")
    return {n: p for n, p in named.items() if p.is_floating_point()}


def require_names(caller: str, argument: str, wanted: Weights, got: Weights, of: str = "the model") -> None:
    """Raise unless ``got`` has the names and shapes of ``wanted``, which are those of ``of``."""
    missing, unexpected = [n for n in wanted if n not in got], [n for n in got if n not in wanted]
    if missing or unexpected:
        parts = [f"lacks {tensors.some(missing)}"] if missing else []
        parts += [f"has {tensors.some(unexpected)} besides"] if unexpected else []
        raise ValueError(f"{caller}: {argument} must have the parameters of {of}; it {' and '.join(parts)}")
    for name, t in wanted.items():
        if t.shape != got[name].shape:
            shapes = f"shape {tuple(t.shape)} as in {of}, got {tuple(got[name].shape)}"
            raise ValueError(f"{caller}: {argument}: {name} must have {shapes}")


def common_weights(
    caller: str, sources: Mapping[str, object], model: nn.Module | None = None
) -> tuple[list[Weights], float]:
    """Several points of one weight space, on the devices of the first and in one dtype for each name.

    Args:
        sources: what :func:`weights_of` takes, by the names of the arguments.
        model: as there; if None, the first of the sources that is a model.

    Returns:
        The weights, in at least float32, and the relative rounding error of the coarsest dtype that they came in.
    """
    live = [s.module if isinstance(s, _AVERAGED) else s for s in sources.values() if isinstance(s, nn.Module)]
    live = [s for s in live if not isinstance(s, Curve) and not hasattr(s, "averages")]  # a SWAG's names are enough
    model = model if model is not None else next(iter(live), None)
    found = {argument: weights_of(caller, argument, source, model) for argument, source in sources.items()}
    (first, reference), *others = found.items()
    for argument, weights in others:
        require_names(caller, argument, reference, weights, of=first)
    given = {n: {w[n].dtype for w in found.values()} for n in reference}
    dtypes = {n: functools.reduce(torch.promote_types, dtypes, torch.float32) for n, dtypes in given.items()}
    coarsest = max(torch.finfo(dtype).eps for dtypes in given.values() for dtype in dtypes)
    return [{n: w[n].to(reference[n].device, dtypes[n]) for n in reference} for w in found.values()], coarsest


def copy_of(weights: Weights) -> Weights:
    return {name: t.clone() for name, t in weights.items()}


def difference(a: Weights, b: Weights) -> Weights:
    return {n: t - b[n] for n, t in a.items()}


def _by_device(weights: Weights) -> dict[torch.device, list[str]]:
    groups: dict[torch.device, list[str]] = {}
    for name, t in weights.items():
        groups.setdefault(t.device, []).append(name)
    return groups


def combine(points: Sequence[Weights], coefficients: Sequence[float]) -> Weights:
    """``sum_j coefficients[j] * points[j]``, one pass on each device."""
    found = {}
    for device, names in _by_device(points[0]).items():
        on_device = torch.tensor(coefficients, dtype=torch.float64, device=device)
        found |= zip(names, curve_weights([[p[n] for n in names] for p in points], on_device), strict=True)
    return {name: found[name] for name in points[0]}


def gram(vectors: Sequence[Weights]) -> torch.Tensor:
    """Inner products [K, K] of K vectors in float64, on the CPU."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for device, names in _by_device(vectors[0]).items():
        here = torch.zeros_like(total, device=device)
        for rows in chunks([[v[name].reshape(-1) for name in names] for v in vectors]):
            rows = rows.double()
            here += rows @ rows.T
        total += here.cpu()
    return total


def norm(vector: Weights) -> float:
    return gram([vector]).sqrt().item()
