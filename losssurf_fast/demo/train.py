"""The demo's training and evaluation."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.demo.data import Data
from losssurf_fast.nn import LRTLinear
from losssurf_fast.objective import ELBOLoss, kl_divergence
from losssurf_fast.prediction import predict, prediction

BATCH = 64
RATE, NOISE_RATE = 1e-3, 5e-2  # Adam's, for weights and for the logs of alpha and sigma^2, which have far to go
WARM_UP = 0.3  # share of training over which the KL term grows to its full weight


@dataclasses.dataclass
class Result:
    """One row of the table, accuracies as fractions; curves have one entry per evaluation during training."""

    network: str
    elbo: float | None  # None where there is no posterior: binary dropout
    stochastic: float
    deterministic: float
    ensemble: float
    epochs: list[int] = dataclasses.field(default_factory=list)
    curve_deterministic: list[float] = dataclasses.field(default_factory=list)
    curve_ensemble: list[float] = dataclasses.field(default_factory=list)


def train(model: nn.Module, data: Data, epochs: int, seed: int, name: str) -> Result:
    """Train by Adam with a rate that falls to zero, ELBO for stochastic layers, cross-entropy for dropout."""
    torch.manual_seed(seed)
    bayesian = any(isinstance(m, LRTLinear) for m in model.modules())
    noise = [p for n, p in model.named_parameters() if "log_" in n]
    rest = [p for n, p in model.named_parameters() if "log_" not in n]
    optimizer = torch.optim.Adam([{"params": rest, "lr": RATE}, {"params": noise, "lr": NOISE_RATE}], fused=True)
    steps = epochs * (len(data.train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(1e-3, min(1.0, 2 * (1 - i / steps))))
    loss_fn = ELBOLoss(model, len(data.train_x)) if bayesian else F.cross_entropy
    result = Result(name, None, 0.0, 0.0, 0.0)
    moments = {round(epochs ** (i / 12)) for i in range(13)}  # evenly on a logarithmic axis, the last one included
    bar = tqdm(range(epochs), desc=f"{name:9s}", unit="epoch", ncols=60, leave=False)
    step = 0
    for epoch in bar:
        model.train()
        order = torch.randperm(len(data.train_x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            terms = (min(1.0, step / (WARM_UP * steps)),) if bayesian else ()
            loss = loss_fn(model(data.train_x[batch]), data.train_y[batch], *terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        if epoch + 1 in moments:
            result.epochs.append(epoch + 1)
            result.curve_deterministic.append(accuracy(model, data, "deterministic"))
            result.curve_ensemble.append(accuracy(model, data, "ensemble", num_samples=10))
            bar.set_postfix_str(f"ens {100 * result.curve_ensemble[-1]:.1f}%")
    result.elbo = evidence_lower_bound(model, data) if bayesian else None
    result.stochastic = sum(accuracy(model, data, "stochastic") for _ in range(20)) / 20
    result.deterministic = accuracy(model, data, "deterministic")
    result.ensemble = accuracy(model, data, "ensemble", num_samples=100)
    return result


def accuracy(model: nn.Module, data: Data, scheme: str, num_samples: int = 1) -> float:
    draws = max(1, min(num_samples, 20_000 // len(data.test_x)))
    probabilities = predict(model, data.test_x, scheme, num_samples, draws_per_call=draws)
    return (probabilities.argmax(-1) == data.test_y).float().mean().item()


@torch.no_grad()
def evidence_lower_bound(model: nn.Module, data: Data, draws: int = 10) -> float:
    """-(N * mean cross-entropy + KL) on the training set, averaged over draws."""
    with prediction(model, "stochastic"):
        loss = sum(F.cross_entropy(model(data.train_x), data.train_y) for _ in range(draws)) / draws
    return -(len(data.train_x) * loss + kl_divergence(model)).item()
