"""What networks are given as: models, averages of them, and mappings from names to tensors.

The one reader of a curve's end points, a surface's points and a band's minima.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.mesh import require_finite

Weights = dict[str, torch.Tensor]

KINDS = "a model, an average of one, or a mapping from names to tensors"
_MOMENTS = ("_mean", "_m2", "_deviations")  # of every parameter in a SWAG's state_dict


def network_of(source) -> nn.Module | None:
    """The network that ``source`` is or averages, without wrappers; None for tensors and averages of shards."""
    if not isinstance(source, nn.Module):
        return None
    source = tensors.unwrap(source)
    if isinstance(source, TorchAveragedModel):
        return tensors.unwrap(source.module)
    if not hasattr(source, "averages"):
        return source
    inner = None if source._sharded else source.module
    return None if inner is None else tensors.unwrap(inner)


def tensors_of(caller: str, argument: str, source, model: nn.Module | None = None) -> Weights:
    """What ``source`` holds, by plain name: of a model the parameters, of a mapping buffers too.

    Args:
        source: a model, also in DistributedDataParallel or torch.compile; an ``AveragedModel``, ours or torch's, or a
            ``SWAG``, whose mean counts; a state_dict of any of these; or other tensors by name, such as what
            ``Curve.weights(t)`` returns.
        model: the architecture: tensors that are tied there must be equal, and come once, under its first name.

    Raises:
        TypeError: it is none of these.
        ValueError: tensors that are tied in ``model`` differ.
    """
    from losssurf_fast.curve.curve import Curve  # which imports this file

    inner = tensors.unwrap(source) if isinstance(source, nn.Module) else source
    if isinstance(inner, Curve):
        raise TypeError(f"{caller}: {argument} must be one point; of a Curve give its weights(t)")
    if isinstance(inner, TorchAveragedModel):
        return tensors.named_parameters(inner.module)
    if isinstance(inner, nn.Module):
        return dict(inner.averages()) if hasattr(inner, "averages") else tensors.named_parameters(inner)
    if not isinstance(inner, Mapping):
        raise TypeError(f"{caller}: {argument} must be {KINDS}, got {type(source).__name__}")
    first_names = _first_names(model) if model is not None else {}
    return _tied_once(caller, argument, _without_prefixes(_tensors(caller, argument, inner), first_names), first_names)


def weights_of(
    caller: str,
    argument: str,
    source,
    model: nn.Module,
    wanted: Mapping[str, torch.Tensor],
    *,
    of: str = "the model",
    gather: bool = False,
) -> Weights:
    """The values that ``source`` has for ``wanted``, parameters of ``model``, in their order and without gradients.

    Args:
        source, model: as for :func:`tensors_of`; other tensors of the model's may be among them.
        wanted: parameters by plain name.
        of: what the parameters are those of, in messages.
        gather: make sharded tensors whole, on all ranks together; they are refused otherwise.

    Raises:
        TypeError, ValueError: as there; or names, shapes or kinds of dtypes differ, or values are none or not finite.
        NotImplementedError: tensors are sharded.
    """
    found, known = tensors_of(caller, argument, source, model), known_names(model)
    found = {name: t for name, t in found.items() if name in wanted or name not in known}
    if gather:
        found = {name: t.full_tensor() if tensors.is_sharded(t) else t for name, t in found.items()}
    require_usable(caller, argument, found)
    found = {name: t.detach() for name, t in found.items()}
    found = dict(zip(wanted, tensors.match(caller, wanted, found, of, argument), strict=True))
    require_finite(f"{caller}: {argument}", {n: t for n, t in found.items() if t.is_floating_point() or t.is_complex()})
    return found


def parameters_of(caller: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a live model by plain name.

    Raises:
        TypeError, ValueError, NotImplementedError: it is no module, or they hold no values or are sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    named = tensors.named_parameters(model)
    if any(tensors.is_sharded(p) for p in named.values()):
        raise NotImplementedError(f"{caller}: model is sharded (FSDP2, tensor parallel), which is not written")
    require_usable(caller, "model", named)
    return named


def require_usable(caller: str, argument: str, named: Mapping[str, torch.Tensor]) -> None:
    """Raise where tensors hold no values (ValueError) or only this rank's part of them (NotImplementedError)."""
    for name, t in named.items():
        if tensors.without_values(t):
            raise ValueError(f"{caller}: {argument}: {name} must hold values, got {tensors.without_values(t)}")
        if tensors.is_sharded(t):
            raise NotImplementedError(
                f"{caller}: {argument}: {name} is sharded; give the whole model's weights (t.full_tensor())"
            )


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every plain name of a model's tensors -> the first name of the same tensor."""
    model = tensors.unwrap(model)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    firsts: dict[int, str] = {}
    return {tensors.plain_name(n): firsts.setdefault(id(t), tensors.plain_name(n)) for n, t in named}


def known_names(model: nn.Module) -> set[str]:
    """Every plain name of a model's tensors: parameters under all of their names, and buffers."""
    return set(_first_names(model))


def _tensors(caller: str, argument: str, source: Mapping) -> Weights:
    named = {}
    for name, t in source.items():
        if str(name).rpartition(".")[2] == "_extra_state":  # torch's entry for what a module saves besides tensors
            continue
        if not isinstance(name, str) or not isinstance(t, torch.Tensor):
            raise TypeError(f"{caller}: {argument} must map names to tensors, got a {type(t).__name__} under {name!r}")
        named[tensors.plain_name(name)] = t
    return named


def _without_prefixes(named: Weights, known: Mapping[str, str]) -> Weights:
    """The names of the network inside a DistributedDataParallel, an average or a SWAG whose state_dict this is."""
    if "n_models" in named and "n_models" not in known:
        names = [n.removeprefix("base.").removesuffix("_m2") for n in named if n.endswith("_m2")]
        means = {name: named[f"base.{name}_mean"] for name in names if f"base.{name}_mean" in named}
        moments = {f"base.{name}{moment}" for name in means for moment in _MOMENTS}
        return means | {n.removeprefix("base."): t for n, t in named.items() if n not in moments and n != "n_models"}
    if "n_averaged" not in known and all(n.startswith("module.") or n == "n_averaged" for n in named):
        named = {n: t for n, t in named.items() if n != "n_averaged"}
    while named and all(n.startswith("module.") for n in named) and not named.keys() <= known.keys():
        named = {n.removeprefix("module."): t for n, t in named.items()}
    return named


def _tied_once(caller: str, argument: str, named: Weights, first_names: Mapping[str, str]) -> Weights:
    found: Weights = {}
    for name, t in named.items():
        first = found.setdefault(first_names.get(name, name), t)
        if first is not t and not _same(first, t):
            first_name = first_names[name]
            raise ValueError(
                f"{caller}: {argument}: {name} and {first_name} are one tensor of the model, got unequal ones"
            )
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if any(tensors.without_values(t) for t in (a, b)):
        return True  # which is refused for holding no values
    return a.shape == b.shape and torch.equal(a, b.to(a.device))
