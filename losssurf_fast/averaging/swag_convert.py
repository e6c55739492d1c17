"""SWAG's state to and from the keys of wjmaddox/swa_gaussian, which stores E[w^2] and a growing [r, numel] matrix."""

from collections.abc import Collection, Mapping

import torch
from torch.distributed.tensor import DTensor

_SUFFIXES = ("_mean", "_sq_mean", "_cov_mat_sqrt")


@torch.no_grad()
def to_swa_gaussian(swag) -> dict[str, torch.Tensor]:
    n = swag.n_models
    held = min(n, swag.max_num_models)
    slots = [i % swag.max_num_models for i in range(n - held, n)]  # from the oldest
    result = {"n_models": torch.tensor([n])}
    for name, average in swag._mean.items():
        mean, m2 = _whole(average), _whole(swag._m2[name])
        second = m2.double() / max(n, 1) + mean.double().square()
        result |= {f"base.{name}_mean": mean.clone(), f"base.{name}_sq_mean": second.to(mean.dtype)}
        if not swag.no_cov_mat:
            deviations = _whole(swag._deviations[name])
            result[f"base.{name}_cov_mat_sqrt"] = deviations[slots].view(held, mean.numel()).to(mean.dtype)
    return result | {f"base.{name}": _whole(b).clone() for name, b in swag._collected_buffers.items()}


@torch.no_grad()
def from_swa_gaussian(cls, state_dict, model, max_num_models, deviations_dtype, device):
    check_entries("from_swa_gaussian: state_dict", None, state_dict)
    if "n_models" not in state_dict or state_dict["n_models"].numel() != 1:
        raise ValueError("from_swa_gaussian: state_dict must have n_models, a single number")
    n = int(state_dict["n_models"])
    ranks = {len(v) if v.dim() == 2 else -1 for k, v in state_dict.items() if k.endswith("_cov_mat_sqrt")}
    if n < 0 or len(ranks) > 1 or not all(0 <= r <= n for r in ranks):
        raise ValueError(
            f"from_swa_gaussian: every *_cov_mat_sqrt must be [r, numel] with one r <= n_models, got n_models {n} and "
            f"rows {sorted(ranks)}"
        )
    found = ranks.pop() if ranks else 0
    if found == 0 < n:  # its class keeps none by default, under a key all the same
        state_dict = {k: v for k, v in state_dict.items() if not k.endswith("_cov_mat_sqrt")}
    kept = (found if 0 < found < n else max(found, 20)) if max_num_models is None else max_num_models
    swag = cls(
        model, max_num_models=kept, no_cov_mat=not any(k.endswith("_cov_mat_sqrt") for k in state_dict),
        deviations_dtype=deviations_dtype, device=device,
    )  # fmt: skip
    if swag._mesh is not None:
        raise NotImplementedError("from_swa_gaussian: model must not be sharded")
    held = 0 if swag.no_cov_mat else min(n, kept)
    if held > found:
        raise ValueError(
            f"from_swa_gaussian: max_num_models must be at most the {found} deviations that were kept of {n} models, "
            f"got {kept}"
        )
    suffixes = _SUFFIXES[: 2 if swag.no_cov_mat else 3]
    keys = [f"base.{name}{suffix}" for name in swag._mean for suffix in suffixes]
    keys += ["n_models", *(f"base.{name}" for name in swag._collected_buffers)]
    check_entries("from_swa_gaussian: state_dict", set(keys), state_dict)
    state = {"n_models": torch.tensor(n)}
    for name, mean in swag._mean.items():
        parts = [state_dict[f"base.{name}{suffix}"] for suffix in suffixes]
        sizes = [tuple(mean.shape), tuple(mean.shape), (found, mean.numel())]
        for part, size, suffix in zip(parts, sizes, suffixes, strict=False):
            if tuple(part.shape) != size:
                got = tuple(part.shape)
                raise ValueError(f"from_swa_gaussian: base.{name}{suffix} must have shape {size}, got {got}")
        first, second = parts[0], parts[1].double()
        m2 = (second - first.double().square()).clamp_(min=0) * n
        state |= {f"base.{name}_mean": first, f"base.{name}_m2": m2}
        if not swag.no_cov_mat:
            slots = torch.zeros_like(swag._deviations[name])
            for back in range(held):  # 0 is the newest
                slots[(n - 1 - back) % kept] = parts[2][found - 1 - back].view(mean.shape)
            state[f"base.{name}_deviations"] = slots
    state |= {f"base.{name}": state_dict[f"base.{name}"] for name in swag._collected_buffers}
    swag.load_state_dict(state)
    return swag


def check_entries(what: str, keys: Collection[str] | None, state_dict) -> None:
    """Refuse what is no mapping to tensors, or not from just ``keys``."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{what}'s {key} must be a tensor, got {type(value).__name__}")
    if keys is None:
        return
    missing, unexpected = [k for k in keys if k not in state_dict], [k for k in state_dict if k not in keys]
    if missing or unexpected:
        raise ValueError(
            f"{what} must be of a SWAG of this model; missing keys {missing[:3]} of {len(missing)}, unexpected keys "
            f"{unexpected[:3]} of {len(unexpected)}"
        )


def _whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t
