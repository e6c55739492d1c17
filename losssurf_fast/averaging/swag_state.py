"""SWAG's state by key, alone and as a part of another module's."""

from collections.abc import Mapping

import torch

from losssurf_fast.averaging.swag_convert import check_entries
from losssurf_fast.averaging.tensors import local, match


def entries(swag) -> dict[str, torch.Tensor]:
    state = {"n_models": torch.tensor(swag.n_models)}
    for name, mean in swag._mean.items():
        state |= {f"base.{name}_mean": mean, f"base.{name}_m2": swag._m2[name]}
        if not swag.no_cov_mat:
            state[f"base.{name}_deviations"] = swag._deviations[name]
    return state | {f"base.{name}": b for name, b in swag._collected_buffers.items()}


def check(swag, state_dict: Mapping[str, torch.Tensor], strict: bool) -> None:
    """Refuse what :func:`load` would, before it changes anything."""
    ours = entries(swag)
    if not strict and isinstance(state_dict, Mapping):
        state_dict = {key: state_dict[key] for key in ours if key in state_dict}
        if len(state_dict) < len(ours):
            return
    check_entries(f"load_state_dict: state_dict (no_cov_mat={swag.no_cov_mat})", ours, state_dict)
    _check_values("load_state_dict", ours, state_dict)


@torch.no_grad()
def load(swag, state_dict, prefix: str, missing: list, unexpected: list, errors: list) -> None:
    """What torch asks of ``_load_from_state_dict``, which is not told ``strict``; the whole state, or nothing."""
    ours = entries(swag)
    theirs = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    absent = [prefix + key for key in ours if key not in theirs]
    missing += absent
    unexpected += [prefix + key for key in theirs if key not in ours]
    if absent:
        return
    theirs = {key: theirs[key] for key in ours}
    try:
        check_entries(f"{prefix}state_dict", ours, theirs)
        _check_values(f"{prefix}load_state_dict", ours, theirs)
    except (TypeError, ValueError) as error:
        errors.append(str(error))
        return
    for key, mine in ours.items():
        local(mine).copy_(local(theirs[key]))
    swag._copy_buffers([theirs[f"base.{name}"] for name in swag._collected_buffers])
    swag.n_models, swag._drawn = int(theirs["n_models"]), False


def _check_values(caller: str, ours: dict, theirs: Mapping[str, torch.Tensor]) -> None:
    match(caller, ours, theirs)
    if int(theirs["n_models"]) < 0:
        raise ValueError(f"{caller}: n_models must not be negative, got {int(theirs['n_models'])}")
