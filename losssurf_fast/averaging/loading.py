"""State dicts for :class:`AveragedModel`: given its names, and looked through before anything is loaded."""

from collections.abc import Mapping

import torch

from losssurf_fast.averaging import tensors


def rename(loaded: dict, ours: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Give the keys that wrappers of the averaged model have changed the names of ``ours``, after ``prefix``."""
    names = {tensors.plain_name(k): k for k in ours}
    keys = [k for k in loaded if k.startswith(f"{prefix}module.")]
    plain = {k: tensors.plain_name(k.removeprefix(prefix)) for k in keys}
    wrapped = lambda: all(p.startswith("module.module.") for p in plain.values())  # by DistributedDataParallel
    while keys and wrapped() and not set(plain.values()) <= names.keys():
        plain = {k: p.removeprefix("module.") for k, p in plain.items()}
    renamed = {k: prefix + names.get(p, p) for k, p in plain.items()}
    if len(set(renamed.values())) == len(renamed):
        for k, value in [(k, loaded.pop(k)) for k in keys]:
            loaded[renamed[k]] = value


def check(caller: str, loaded: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], strict: bool) -> None:
    """Refuse what cannot take the place of ``ours``.

    Raises:
        RuntimeError: keys (if ``strict``), shapes, placements or kinds of dtype differ, or values are none.
    """
    problems = []
    if strict:
        problems += [f"{k} is missing" for k in ours if k not in loaded]
        problems += [f"{k} is not of this model" for k in loaded if k not in ours]
    for k, mine in ours.items():
        if k in loaded and isinstance(mine, torch.Tensor):  # what get_extra_state returns need not be one
            problems += [f"{k} must {wanted}" for wanted in _wanted(loaded[k], mine)[:1]]
    count = loaded.get("n_averaged")
    if not problems and count is not None and int(count) < 0:
        problems.append(f"n_averaged must not be negative, got {int(count)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(f"{caller}: {'; '.join(problems[:5])}{more}")


def _wanted(value, mine: torch.Tensor) -> list[str]:
    """What ``value`` would have to be or have to be loaded into ``mine``."""
    if not isinstance(value, torch.Tensor):
        return [f"be a tensor, got {type(value).__name__}"]
    wanted = []
    if value.shape != mine.shape:
        wanted.append(f"have shape {tuple(mine.shape)}, got {tuple(value.shape)}")
    if value.is_meta and not mine.is_meta:
        wanted.append("hold values, got a tensor on the meta device")
    if tensors.kind_of(value.dtype) != tensors.kind_of(mine.dtype):
        wanted.append(f"have a dtype like {mine.dtype}, got {value.dtype}")
    if tensors.is_sharded(value) != tensors.is_sharded(mine):
        wanted.append(f"{'' if tensors.is_sharded(mine) else 'not '}be a DTensor, got {type(value)}")
    elif tensors.is_sharded(mine) and value.placements != mine.placements:
        wanted.append(f"be placed as {mine.placements}, got {value.placements}")
    return wanted
