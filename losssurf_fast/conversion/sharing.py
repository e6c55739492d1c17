"""Weights that several modules hold: one weight can have one noise only."""

from collections.abc import Mapping

from torch import nn

from losssurf_fast.conversion.classes import outputs_dim
from losssurf_fast.conversion.reasons import matrices
from losssurf_fast.nn.lrt import LRTLayer


def sharing(weighted: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of the modules that hold a weight, for every weight that several hold."""
    holders: dict[int, list[str]] = {}
    for name, module in weighted.items():
        for parameter in matrices(module):
            holders.setdefault(id(parameter), []).append(name)
    return [names for names in holders.values() if len(names) > 1]


def conflicts(
    weighted: Mapping[str, nn.Module], names: list[str], reasons: Mapping[str, str | None], parameterization: str
) -> dict[str, str]:
    """Why some of the modules ``names``, which share a weight, cannot be converted although nothing else forbids it.

    Noise of another parameterization is there already; alphas of "neuron" are along different dimensions; or
    "variance" would take the weight from a module that stays.
    """
    chosen = [name for name in names if reasons[name] is None]
    earlier = [name for name in names if isinstance(weighted[name], LRTLayer)]
    for name in earlier:
        if weighted[name].parameterization != parameterization:
            return dict.fromkeys(chosen, f"it shares its weight with {name}, which has other noise already")
    if parameterization == "variance" and 0 < len(chosen) < len(names):
        stays = next(name for name in names if name not in chosen)
        return dict.fromkeys(chosen, f"it shares its weight with {stays}, which stays and needs it")
    if parameterization != "neuron" or not chosen:
        return {}
    kept = min(outputs_dim(weighted[name]) for name in earlier or chosen)
    other = [name for name in chosen if outputs_dim(weighted[name]) != kept]
    return dict.fromkeys(other, "it shares its weight with a layer whose outputs are another dimension of it")
