"""Predictions by an ensemble of SWAG's draws."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from losssurf_fast.averaging.batch_norm import spread_over_ranks
from losssurf_fast.averaging.ensemble import Ensemble
from losssurf_fast.ops.noise import as_seed


@torch.no_grad()
def predict(
    swag, data, num_samples, scale, cov, seed, block, bn_loader, recalibrate, subset, device, forward_kwargs,
    process_group,
) -> torch.Tensor:  # fmt: skip
    model = swag.module
    if model is None:
        raise RuntimeError("predict: a sharded model is not copied; call sample(into=model), update_bn and that model")
    averages = list(swag._mean.values())
    here = averages[0].device if averages else torch.device("cpu")
    ensemble = Ensemble(
        model, "draw", data, bn_loader, recalibrate, subset, device, forward_kwargs, process_group, here
    )

    def seed_of_arguments() -> torch.Tensor:
        swag._refuse_empty("predict")
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"predict: num_samples must be a positive int, got {num_samples!r}")
        ensemble.check()
        return as_seed("predict", seed, here)

    seed_here = ensemble.jointly(seed_of_arguments)
    if seed is None and spread_over_ranks(ensemble.group):
        dist.broadcast(seed_here, group=ensemble.group, group_src=0)

    @contextlib.contextmanager
    def draw(s: int) -> Iterator[None]:
        ensemble.jointly(lambda: swag.sample(scale, cov, seed_here, block, sample=s))
        yield

    return ensemble.mean_of_softmax(draw(s) for s in range(num_samples))
