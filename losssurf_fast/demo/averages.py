"""The demo's second part: SGD and SWA from the same weights, and the time one update of an average takes.

A perceptron is trained at a constant rate until its weights are good enough. From there SGD goes on with a rate that
falls to zero, and SWA with the constant rate while it averages the weights it passes, the first ones included (Izmailov
et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, algorithm 1).
"""

import copy
import dataclasses
import functools
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import PolynomialLR
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from tqdm import tqdm

from losssurf_fast.averaging import AveragedModel
from losssurf_fast.averaging.schedules import SWACyclicLR
from losssurf_fast.demo.data import Data
from losssurf_fast.demo.models import perceptron, resnet50_tensors
from losssurf_fast.demo.timing import Timing, alternate
from losssurf_fast.figures import finish, new_figure

WIDTH = 256  # of the two hidden layers
BATCH = 32
RATES = {"digits": 0.1, "mnist": 0.02}  # with momentum; MNIST's images are longer vectors
MODELS = 40  # averaged after the first
SEEDS = 3
PICTURES = ("averages.png",)
WEIGHTS = ("start", "SGD", "SWA's last iterate", "SWA")


@dataclasses.dataclass
class Track:
    """Test errors along a training, and test error and training loss of the weights at its end; fractions."""

    epochs: list[float] = dataclasses.field(default_factory=list)
    errors: list[float] = dataclasses.field(default_factory=list)
    error: float = float("nan")
    loss: float = float("nan")

    def measure(self, model: nn.Module, data: Data, epoch: float) -> None:
        self.epochs.append(epoch)
        self.errors.append(_error(model, data))

    @torch.no_grad()
    def finish(self, model: nn.Module, data: Data) -> None:
        self.error = _error(model, data)
        self.loss = F.cross_entropy(model(data.train_x), data.train_y).item()


@torch.no_grad()
def _error(model: nn.Module, data: Data) -> float:
    return (model(data.test_x).argmax(-1) != data.test_y).float().mean().item()


def show(data: Data, epochs: int, seed: int, quick: bool) -> dict:
    """Train, print what comes out, and return the figures by the names of their files."""
    before, after = max(1, epochs // 5), max(1, 2 * epochs // 5)
    seeds = [(seed + i) % 2**63 for i in range(1 if quick else SEEDS)]
    print("Averages of weights: the same network without noise.")
    print("SGD finds good weights; SGD and SWA go on from there")
    print(f"(epochs: {before}, then {after}; seeds: {len(seeds)}).\n", flush=True)
    trials = [train(data, before, after, s) for s in seeds]
    print(table(trials))
    print("accuracy and error in percent, means over the seeds;")
    print("+- is the standard deviation between seeds\n")
    swa, sgd = ([100 * trial[name].error for trial in trials] for name in ("SWA", "SGD"))
    better = sum(a < b for a, b in zip(swa, sgd, strict=True))
    print(f"The average of {len(trials[0]['SWA'].errors) + 1} models makes {statistics.mean(swa):.2f} % errors, SGD's")
    print(f"last model {statistics.mean(sgd):.2f} %; fewer than SGD in {better} of {len(seeds)} runs.\n", flush=True)

    model = resnet50_tensors()
    parameters = list(model.parameters())
    print(f"One update of an average of ResNet-50's {len(parameters)} tensors,")
    print(f"{sum(p.numel() for p in parameters) / 1e6:.1f} million weights, held in fp32:")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if torch.__version__ < (2, 13):  # whose AveragedModel refuses averages of another dtype
        del dtypes["bf16"]
    for name, dtype in dtypes.items():
        t = time_updates(model.to(dtype), blocks=2 if quick else 15, seconds=3)
        times = f"torch {t.eager_ms:6.1f} ms   ours {t.ours_ms:6.1f} ms   {t.ratio:.2f}x"
        print(f"{name} weights  {times}", flush=True)
    print("torch's AveragedModel and ours on one thread, medians of")
    print(f"{t.blocks} alternating updates\n")
    return {PICTURES[0]: _figure(trials, before)}


class _Training:
    """SGD from random weights; a deep copy goes on from where it is, with the batches that would have come."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.rate = data, RATES[data.name]
        self.model = perceptron(data.train_x.shape[1], WIDTH, data.classes, seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), self.rate, momentum=0.9, weight_decay=5e-3)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_steps = len(data.train_x) // BATCH

    def steps(self, epochs: int):
        """Train for some epochs; yields the share of an epoch done so far after each step."""
        for epoch in range(epochs):
            order = torch.randperm(len(self.data.train_x), generator=self.generator)
            for i in range(self.epoch_steps):
                batch = order[i * BATCH : (i + 1) * BATCH]
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(self.data.train_x[batch]), self.data.train_y[batch]).backward()
                self.optimizer.step()
                yield epoch + (i + 1) / self.epoch_steps


def train(data: Data, before: int, after: int, seed: int) -> dict[str, Track]:
    """``before`` epochs to the start, from which SGD and SWA go on for ``after`` epochs with the same batches."""
    tracks = {name: Track() for name in WEIGHTS}
    start = _Training(data, seed)
    cycle = max(1, after * start.epoch_steps // MODELS)
    with tqdm(total=before + 2 * after, desc=f"seed {seed}", unit="epoch", ncols=60, leave=False) as bar:
        for step, epoch in enumerate(start.steps(before), 1):
            if step % cycle == 0 or epoch == before:
                tracks["start"].measure(start.model, data, epoch)
                bar.update(int(epoch) - bar.n)
        tracks["start"].finish(start.model, data)

        sgd = copy.deepcopy(start)
        schedule = PolynomialLR(sgd.optimizer, total_iters=after * sgd.epoch_steps)
        for step, epoch in enumerate(sgd.steps(after), 1):
            schedule.step()
            if step % cycle == 0:
                tracks["SGD"].measure(sgd.model, data, before + epoch)
                bar.update(int(before + epoch) - bar.n)
        tracks["SGD"].finish(sgd.model, data)

        swa = copy.deepcopy(start)
        average = AveragedModel(swa.model, include_start=True)
        schedule = SWACyclicLR(swa.optimizer, cycle, lr_1=swa.rate, lr_2=swa.rate)  # constant
        for epoch in swa.steps(after):
            if schedule.collect_now:
                average.update_parameters(swa.model)
                tracks["SWA's last iterate"].measure(swa.model, data, before + epoch)
                tracks["SWA"].measure(average, data, before + epoch)
                bar.update(int(before + after + epoch) - bar.n)
            schedule.step()
        tracks["SWA's last iterate"].finish(swa.model, data)
        tracks["SWA"].finish(average, data)
    return tracks


def table(trials: list[dict[str, Track]]) -> str:
    """One kind of weights per line, means over the trials, 58 columns wide."""
    line = "{:20s}{:>12s}{:>12s}{:>14s}".format
    lines = [line("weights", "train loss", "accuracy", "error"), "-" * 58]
    for name in WEIGHTS:
        errors = [100 * trial[name].error for trial in trials]
        error = statistics.mean(errors)
        deviation = f" +- {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        loss = statistics.mean(trial[name].loss for trial in trials)
        lines.append(line(name, f"{loss:.4f}", f"{100 - error:.2f}", f"{error:.2f}{deviation}"))
    return "\n".join(lines)


def time_updates(model: nn.Module, blocks: int, seconds: float) -> Timing:
    """One ``update_parameters`` of torch's AveragedModel and of ours, both with fp32 averages of ``model``.

    Raises:
        RuntimeError: their averages differ by more than rounding.
    """
    averages = {"eager": TorchAveragedModel(copy.deepcopy(model).float()), "ours": AveragedModel(model)}

    def update(average) -> float:
        began = time.thread_time()
        average.update_parameters(model)
        return (time.thread_time() - began) * 1e3

    with torch.no_grad():
        for factor in (1.0, 3.0, -1.0):  # the first updates copy and allocate
            for t in model.parameters():
                t.mul_(factor)
            for average in averages.values():
                update(average)
    pairs = zip(averages["eager"].parameters(), averages["ours"].parameters(), strict=True)
    if not all(torch.allclose(a, b, atol=1e-6) for a, b in pairs):
        raise RuntimeError("demo: torch's and our averages of the same weights differ")
    calls = {name: functools.partial(update, average) for name, average in averages.items()}
    return alternate(calls, blocks, seconds, "timing updates")


def _figure(trials: list[dict[str, Track]], before: int):
    """Test errors along the trainings, means over the trials."""
    from matplotlib.ticker import LogLocator

    curves = {name: zip(*(trial[name].errors for trial in trials), strict=True) for name in WEIGHTS}
    mean = {name: [100 * statistics.mean(errors) for errors in curve] for name, curve in curves.items()}
    figure = new_figure(7.2, 3.8)
    axes = figure.add_subplot()
    axes.plot(trials[0]["start"].epochs, mean["start"], color="#888888", lw=1.6, label="to the start")
    for name, colour, width, label in (
        ("SWA's last iterate", "#fcae91", 1.4, "SWA's iterates, constant rate"),
        ("SGD", "#08519c", 1.8, "SGD, rate falls to 0"),
        ("SWA", "#cb181d", 2.2, "average of SWA's iterates"),
    ):
        epochs = [before, *trials[0][name].epochs]
        axes.plot(epochs, [mean["start"][-1], *mean[name]], color=colour, lw=width, label=label)
    axes.axvline(before, color="#888888", lw=0.8, ls=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error (%)")
    several = f", mean of {len(trials)} seeds" if len(trials) > 1 else ""
    axes.set_title(f"SGD and SWA from the same weights{several}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return finish(figure)
