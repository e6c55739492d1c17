"""Predictions by an ensemble of SWAG's draws, each with BatchNorm statistics of its own."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, RandomSampler

from losssurf_fast.averaging.batch_norm import call_on_batch, jointly, spread_over_ranks, tracking_layers, update_bn
from losssurf_fast.ops.noise import as_seed
from losssurf_fast.prediction import evaluation_mode, log_softmax


@torch.no_grad()
def predict(
    swag, data, num_samples, scale, cov, seed, block, bn_loader, recalibrate, subset, device, forward_kwargs,
    process_group,
) -> torch.Tensor:  # fmt: skip
    model = swag.module
    if model is None:
        raise RuntimeError("predict: a sharded model is not copied; call sample(into=model), update_bn and that model")
    recalibrated = recalibrate and bool(tracking_layers(model))
    group = process_group if recalibrated else False  # whose ranks update_bn needs all
    averages = list(swag._mean.values())
    device_here = averages[0].device if averages else torch.device("cpu")
    batches = [data] if isinstance(data, torch.Tensor | Mapping) else data

    def seed_of_arguments() -> torch.Tensor:
        swag._refuse_empty("predict")
        _check_arguments(batches, num_samples, bn_loader, recalibrated)
        return as_seed("predict", seed, device_here)

    def on_all(compute):
        return jointly("predict", compute, device_here, group)

    seed_here = on_all(seed_of_arguments)
    if seed is None and spread_over_ranks(group):
        dist.broadcast(seed_here, group=group, group_src=0)
    total = None
    with evaluation_mode("predict", model):
        for s in range(num_samples):
            on_all(lambda s=s: swag.sample(scale, cov, seed_here, block, sample=s))
            if recalibrated:
                options = {"subset": subset, "forward_kwargs": forward_kwargs, "process_group": process_group}
                update_bn(bn_loader, model, device, **options)
            log_probs = on_all(lambda: _log_probabilities(model, batches, device, forward_kwargs))
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
    return (total - math.log(num_samples)).exp()


def _check_arguments(batches, num_samples, bn_loader, recalibrated: bool) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"predict: num_samples must be a positive int, got {num_samples!r}")
    if recalibrated and bn_loader is None:
        raise ValueError(
            "predict: bn_loader must yield the training data, as the BatchNorm statistics of every draw are its own; "
            "recalibrate=False keeps those of module"
        )
    _refuse_single_pass("data", batches)
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
        raise ValueError("predict: data must come in the same order in every pass, got a DataLoader with shuffle=True")
    if recalibrated:
        _refuse_single_pass("bn_loader", bn_loader)


def _log_probabilities(model, batches: Iterable, device, forward_kwargs) -> torch.Tensor:
    outputs = [log_softmax(call_on_batch("predict", model, b, device, forward_kwargs)) for b in batches]
    if not outputs:
        raise ValueError("predict: data must yield at least one batch, got none")
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _refuse_single_pass(argument: str, loader: Iterable) -> None:
    if not isinstance(loader, Iterable):
        raise TypeError(f"predict: {argument} must be an input or a loader, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ValueError(f"predict: {argument} is read once for every draw, got a {type(loader).__name__} for one pass")
