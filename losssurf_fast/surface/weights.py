"""Points of weight space: a model's parameters by name, wherever they come from, and inner products of them.

Only parameters are coordinates. BatchNorm's statistics are functions of the weights and the data; with them as
coordinates, distances are wrong (and 1e4 batches tracked are a distance of 1e4).
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from losssurf_fast import weights
from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.mesh import require_finite
from losssurf_fast.curve import Curve, geometry
from losssurf_fast.ops.curve import curve_weights
from losssurf_fast.weights import Weights

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def weights_of(caller: str, argument: str, source, model: nn.Module | None = None) -> Weights:
    """The floating parameters of ``source`` by plain name, without gradients.

    Args:
        source: as for :func:`losssurf_fast.weights.tensors_of`.
        model: says which entries of a mapping are parameters, and which are tied. Without it those of BatchNorm's
            buffers' names are left out, and so are second names of one memory.

    Raises:
        TypeError, ValueError, NotImplementedError: it is none of these, lacks parameters of the model or has entries
            that the model does not know, or its tensors are sharded, complex, or hold no finite values.
    """
    if model is not None:
        found = weights.weights_of(caller, argument, source, model, model_parameters(caller, model))
    else:
        named = weights.tensors_of(caller, argument, source)
        weights.require_usable(caller, argument, named)
        named = _without_repeats({n: t for n, t in named.items() if n.rpartition(".")[2] not in _STATISTICS})
        _refuse_complex(f"{caller}: {argument}", named)
        found = {n: t.detach() for n, t in named.items() if t.is_floating_point()}
        require_finite(f"{caller}: {argument}", found)
    if not any(t.numel() for t in found.values()):
        raise ValueError(f"{caller}: {argument} must hold floating parameters, got none")
    return found


def _without_repeats(named: Weights) -> Weights:
    """Tied tensors once, under their first name, as ``named_parameters`` gives them."""
    first = {}
    for name, t in named.items():
        first.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else name, name)
    return {name: named[name] for name in first.values()}


def model_parameters(caller: str, model: nn.Module) -> Weights:
    """The floating parameters of a live model by plain name, which are its place in weight space."""
    named = weights.parameters_of(caller, model)
    _refuse_complex(f"{caller}: model", named)
    return {n: p for n, p in named.items() if p.is_floating_point()}


def _refuse_complex(what: str, named: Weights) -> None:
    for name, t in named.items():
        if t.is_complex():
            raise NotImplementedError(f"{what}: {name} is complex, which is not written")


def common_weights(
    caller: str, sources: Mapping[str, object], model: nn.Module | None = None
) -> tuple[list[Weights], float]:
    """Several points of one weight space, on the devices of the first and in one dtype for each name.

    Args:
        sources: what :func:`weights_of` takes, by the names of the arguments.
        model: as there; if None, the first of the sources that is a model or an average of one.

    Returns:
        The weights, in at least float32, and the relative rounding error of the coarsest dtype that they came in.
    """
    if model is None:
        networks = {a: weights.network_of(source) for a, source in sources.items() if not isinstance(source, Curve)}
        argument, model = next(((a, n) for a, n in networks.items() if n is not None), (None, None))
        weights.require_usable(caller, argument, tensors.named_parameters(model) if model is not None else {})
    found = {argument: weights_of(caller, argument, source, model) for argument, source in sources.items()}
    (first, reference), *others = found.items()
    for argument, other in others:
        tensors.match(caller, reference, other, first, argument)
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
    return geometry.gram([[v[name] for name in vectors[0]] for v in vectors]).cpu()


def norm(vector: Weights) -> float:
    return gram([vector]).sqrt().item()
