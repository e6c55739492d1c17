"""What the experiments on variance networks share: networks with noise, their training, and what is measured of them.

Source: Neklyudov et al., "Variance networks: when expectation does not meet your expectations", ICLR 2019.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

import losssurf_fast as lsf
from experiments import trainer
from experiments.command import Setting
from experiments.data import Batches, Data
from losssurf_fast.nn.lrt import LRTLayer
from losssurf_fast.prediction import predicted

SCHEMES = ("stochastic", "deterministic", "ensemble")
STYLES = {
    "deterministic": {"color": "#d7301f", "lw": 2},
    "stochastic": {"color": "#9ecae1", "lw": 3.5},
    "ensemble": {"color": "#08519c", "lw": 1.5},
}
# Adam moves a logarithm by its rate per step: the logs of alpha and sigma^2 cross the same ground in the digits' few
# thousand steps as in the hundred thousand that the paper takes with the rate of the weights.
NOISE_RATE = {"digits": 0.5}
WARM_UP = 0.1  # share of the training over which the KL term grows to its full weight


def network(setting: Setting, data: Data, kind: str, seed: int | None = None) -> nn.Module:
    """The network of ``--model`` with "dropout", or with weights drawn by the parameterization ``kind``."""
    model = setting.build(data, seed)
    if not hasattr(model, "draw_weights"):
        raise SystemExit(f"{setting.experiment}: --model must be a LeNet-5 or vgg-like, got {setting.model}")
    return model if kind == "dropout" else model.draw_weights(kind)


def fit(
    setting: Setting, data: Data, model: nn.Module, name: str, measure: Callable[[], Mapping[str, float]]
) -> list[dict[str, float]]:
    """Train by Adam with a rate that falls to zero; ``measure`` is called at most twenty times, first after one epoch.

    The loss is the negative ELBO where weights are drawn by local reparameterization, else the cross-entropy.
    """
    logs = [p for n, p in model.named_parameters() if n.endswith(("log_alpha", "log_sigma2"))]
    rest = [p for n, p in model.named_parameters() if not n.endswith(("log_alpha", "log_sigma2"))]
    rates = [{"params": rest}, {"params": logs, "lr": NOISE_RATE.get(setting.data, setting.lr)}]
    optimizer = torch.optim.Adam([group for group in rates if group["params"]], lr=setting.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=setting.epochs)
    moments = {round(setting.epochs ** (i / 19)) for i in range(20)}  # evenly on a logarithmic axis, the end included
    return trainer.train(
        setting, name, model, setting.train_batches(data), optimizer, setting.epochs,
        loss=_negative_elbo(model, len(data.train_x)) if logs else trainer.cross_entropy, schedule=schedule,
        measure=lambda epoch: measure() if epoch in moments else {},
    )  # fmt: skip


def _negative_elbo(model: nn.Module, num_data: int) -> trainer.Loss:
    objective = lsf.ELBOLoss(model, num_data)
    return lambda forward, x, y, done: objective(forward(x), y, min(1.0, done / WARM_UP))


def plot(axes, history: list[dict[str, float]], key: str, **style) -> None:
    """A line of what was measured under ``key``, over a logarithmic axis of epochs."""
    points = [(epoch, found[key]) for epoch, found in enumerate(history, 1) if key in found]
    axes.plot(*zip(*points, strict=True), **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("epoch")


class Prediction(nn.Module):
    """A model under a prediction scheme, as one that returns log-probabilities; the same seed draws the same noise."""

    def __init__(self, model: nn.Module, scheme: str, num_samples: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.model, self.scheme, self.num_samples, self.seed = model, scheme, num_samples, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return predicted(self.model, x, self.scheme, self.num_samples, self.seed).log_probs


def accuracy(setting: Setting, model: nn.Module, batches: Batches, scheme: str, num_samples: int = 1) -> float:
    """In percent; "stochastic" is a mean over ``num_samples`` draws, each a prediction of its own."""
    single = scheme == "stochastic"
    draws = num_samples if single else 1
    predictors = [Prediction(model, scheme, 1 if single else num_samples, seed) for seed in range(draws)]
    return 100 - 100 * sum(trainer.evaluate(setting, p, batches)["error"] for p in predictors) / draws


def accuracies(setting: Setting, model: nn.Module, batches: Batches, num_samples: int) -> dict[str, float]:
    """By scheme, in percent."""
    return {scheme: accuracy(setting, model, batches, scheme, num_samples) for scheme in SCHEMES}


def evidence_lower_bound(setting: Setting, model: nn.Module, data: Data, draws: int = 10) -> float:
    """-(N * mean cross-entropy + KL) on the training set, averaged over draws."""
    batches = setting.test_batches(data, train=True)
    losses = [trainer.evaluate(setting, Prediction(model, "stochastic", 1, s), batches)["loss"] for s in range(draws)]
    with torch.no_grad():
        return -(len(data.train_x) * sum(losses) / draws + lsf.kl_divergence(model).item())


def gaussian_layers(model: nn.Module) -> list[LRTLayer]:
    return [module for module in model.modules() if isinstance(module, LRTLayer)]


@torch.no_grad()
def separated(model: nn.Module) -> nn.Module:
    """A copy whose weights have the same distribution, with means and variances in tensors of their own."""
    model = copy.deepcopy(model)
    for layer in gaussian_layers(model):
        log_sigma2 = nn.Parameter(layer.posteriors()[0].log_sigma2().clone())
        delattr(layer, layer.scale_name)
        layer.become_stochastic("additive", scale=log_sigma2)
    return model


@torch.no_grad()
def without_means(model: nn.Module) -> nn.Module:
    """A copy whose drawn weights have mean zero and the variances that they had."""
    model = separated(model)
    for layer in gaussian_layers(model):
        layer.weight.zero_()
    return model


@torch.no_grad()
def with_permuted_sigmas(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose drawn weights keep their means, the variances of a layer permuted among its weights."""
    model, generator = separated(model), torch.Generator().manual_seed(seed)
    for layer in gaussian_layers(model):
        order = torch.randperm(layer.scale.numel(), generator=generator).to(layer.scale.device)
        layer.scale.copy_(layer.scale.flatten()[order].view_as(layer.scale))
    return model
