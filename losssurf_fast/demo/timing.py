"""What the demo times, with plain PyTorch and with ours, in alternating blocks: its training at a larger width."""

import dataclasses
import functools
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.conversion import to_lrt
from losssurf_fast.demo.data import Data
from losssurf_fast.demo.models import EagerLRT, perceptron
from losssurf_fast.objective import ELBOLoss

HIDDEN, BATCH = 1024, 128


@dataclasses.dataclass
class Timing:
    """CPU milliseconds per step, medians over blocks; ``plain_ms`` where a step without either was timed, too."""

    eager_ms: float
    ours_ms: float
    blocks: int
    plain_ms: float | None = None

    @property
    def ratio(self) -> float:
        return self.eager_ms / self.ours_ms


def compare(data: Data, parameterization: str, blocks: int, steps: int, seconds: float) -> Timing:
    """Time up to ``blocks`` pairs of ``steps`` training steps on the ELBO: forward, backward and Adam.

    On a slow or busy machine fewer pairs, at least two, keep it near ``seconds``. Call it with one thread: it counts
    the CPU time of its own.
    """
    ours = to_lrt(perceptron(data.train_x.shape[1], HIDDEN, data.classes, seed=0), parameterization, include="hidden")
    eager = perceptron(data.train_x.shape[1], HIDDEN, data.classes, seed=0)
    eager.hidden = EagerLRT(eager.hidden, ours.hidden.log_sigma2, zero_mean=parameterization == "variance")
    num_data = len(data.train_x)
    runs = {
        "eager": _Run(eager, data, lambda *args: num_data * F.cross_entropy(*args) + eager.hidden.kl()),
        "ours": _Run(ours, data, ELBOLoss(ours, num_data, exact=False)),
    }
    for run in runs.values():
        run.block(3)  # first steps allocate
    calls = {name: functools.partial(run.block, steps) for name, run in runs.items()}
    return alternate(calls, blocks, seconds, f"timing {parameterization}")


def alternate(calls: dict, blocks: int, seconds: float, description: str) -> Timing:
    """Medians of ``eager``, ``ours`` and perhaps ``plain``: functions that run a block and return its milliseconds."""
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for i in tqdm(range(blocks), desc=description, unit="round", ncols=60, leave=False):
        if i >= 2 and time.perf_counter() - began > seconds:
            break
        for name in calls if i % 2 == 0 else reversed(calls):
            milliseconds[name].append(calls[name]())
    found = {f"{name}_ms": statistics.median(times) for name, times in milliseconds.items()}
    return Timing(blocks=len(milliseconds["ours"]), **found)


class _Run:
    def __init__(self, model: nn.Module, data: Data, loss_fn) -> None:
        self.model, self.data, self.step = model, data, 0
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        self.loss_fn = loss_fn

    def block(self, steps: int) -> float:
        """Train for ``steps`` and return milliseconds of this thread's CPU time per step."""
        batches = len(self.data.train_x) // BATCH
        began = time.thread_time()
        for _ in range(steps):
            rows = slice(self.step % batches * BATCH, self.step % batches * BATCH + BATCH)
            loss = self.loss_fn(self.model(self.data.train_x[rows]), self.data.train_y[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
        return (time.thread_time() - began) * 1e3 / steps
