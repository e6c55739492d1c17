"""A GPT's losses, its training, and what a step of it costs."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import losssurf_fast as lsf
from benchmarks.eager import eager_kl, with_eager_layers
from benchmarks.timing import Step, peak_mib
from examples.gpt.corpus import Corpus
from examples.gpt.model import GPT

EVALUATED = 8  # windows of held-out text


class Objective(nn.Module):
    """(tokens, targets, KL weight) -> negative evidence lower bound per token, computed in bf16 under autocast."""

    def __init__(self, model: nn.Module, kl: Callable[[], torch.Tensor | float], num_tokens: int):
        super().__init__()
        self.model, self.kl, self.num_tokens = model, kl, num_tokens

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, kl_weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = self.model(tokens)
        return cross_entropy(logits, targets) + kl_weight * self.kl() / self.num_tokens


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def stochastic(model: GPT, parameterization: str) -> GPT:
    """The same GPT with Gaussian weights in its blocks; the embedding, which shares its weight with head, has none."""
    return lsf.to_lrt(model, parameterization, include="blocks.*")


def objectives(plain: GPT, ours: GPT, num_tokens: int) -> dict[str, Objective]:
    """The plain model's, that with the formula in plain torch, and ours."""
    eager = with_eager_layers(ours)
    return {
        "plain": Objective(plain, lambda: 0.0, num_tokens),
        "eager": Objective(eager, lambda: eager_kl(eager), num_tokens),
        "ours": Objective(ours, lambda: lsf.kl_divergence(ours), num_tokens),
    }


def train(step: Callable, model: GPT, corpus: Corpus, steps: int, batch: int, learning_rate: float) -> list[float]:
    """Losses of all steps; the KL's weight rises to 1 over the run, so that the data speak first."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(1), []
    for done in tqdm(range(steps), desc="training", unit="step", ncols=80, leave=False):
        loss = step(*corpus.windows(corpus.train, batch, generator), kl_weight(done / steps, corpus.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def kl_weight(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, device=device)  # a tensor: torch.compile makes a new graph for every number


@torch.no_grad()
def held_out(objective: Objective, corpus: Corpus, weight: float) -> float:
    """The objective on held-out text with one draw of the noise; without the KL divergence where ``weight`` is 0."""
    windows = corpus.windows(corpus.held_out, EVALUATED, torch.Generator().manual_seed(2))
    return objective(*windows, kl_weight(weight, corpus.device)).item()


def costs(steps: dict[str, Callable], inputs: tuple, rounds: int) -> dict[str, dict]:
    """Median milliseconds of forward and backward, taken in turns, and memory in MiB, of every step."""
    runs = {name: Step(step, inputs, "full") for name, step in steps.items()}
    on_gpu = inputs[0].is_cuda
    for run in runs.values():
        run.warm_up()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run.sample(_synchronized if on_gpu else time.perf_counter, 1))
    return {
        name: {
            "step_ms": 1e3 * statistics.median(times[name]),
            "saved_mib": run.saved_mib(),
            "peak_mib": peak_mib(run, inputs[0].device),
        }
        for name, run in runs.items()
    }


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
