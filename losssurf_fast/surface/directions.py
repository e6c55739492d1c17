"""Random directions in weight space, which a seed replays on any device and any cut of the model.

Sources: Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, section 4 (filter normalization);
Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.3 (rays).
"""

import torch

from losssurf_fast.ops.noise import philox_normal
from losssurf_fast.surface.weights import Weights

NORMALIZATIONS = ("filter", "layer", None)


def check_normalization(caller: str, normalization: str | None) -> None:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{caller}: normalization must be one of {NORMALIZATIONS}, got {normalization!r}")


def random_direction(caller: str, weights: Weights, seed: int, number: int, normalization: str | None) -> Weights:
    """Direction ``number`` of ``seed`` at ``weights``, not of unit length.

    Normal noise with row = the parameter's place among ``weights``, column = the flat index, sample = ``number``.

    Args:
        normalization: "filter" gives every filter of the direction (what one index of a tensor's first dimension
            selects) the norm of that filter of the weights; "layer" does so with whole tensors. Both leave out
            tensors of fewer than two dimensions (biases, BatchNorm's parameters), as Li et al. do. None is the
            noise itself: normalised to unit length, uniform on the sphere.

    Raises:
        ValueError: nothing of the direction is left.
    """
    check_normalization(caller, normalization)
    direction = {}
    for row, (name, w) in enumerate(weights.items()):
        if normalization is not None and w.dim() < 2:
            direction[name] = torch.zeros_like(w)
            continue
        noise = philox_normal(w.numel(), seed, row_offset=row, sample=number, dtype=w.dtype, device=w.device)
        noise = noise.view(w.shape)
        direction[name] = noise if normalization is None else _rescaled(noise, w, normalization)
    if not any(d.count_nonzero() for d in direction.values()):
        raise ValueError(
            f"{caller}: normalization={normalization!r} leaves no direction: it takes weights of two or more "
            "dimensions that are not zero, and there are none; use normalization=None"
        )
    return direction


def _rescaled(noise: torch.Tensor, weight: torch.Tensor, normalization: str) -> torch.Tensor:
    dims = tuple(range(1 if normalization == "filter" else 0, weight.dim()))
    size = lambda t: torch.linalg.vector_norm(t, dim=dims, keepdim=True, dtype=torch.float64)
    scale = size(weight) / size(noise).clamp_min(torch.finfo(torch.float64).tiny)
    return noise * scale.to(noise.dtype)
