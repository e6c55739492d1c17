"""The demo's third part: paths between two networks, what the loss does on them, and what a step on a curve costs.

Two perceptrons are trained from different random weights. Between them lie the straight line, a Bezier curve and a
polygonal chain with one trained bend each (Garipov et al., NeurIPS 2018), and the band of AutoNEB (Draxler et al., ICML
2018).
"""

import dataclasses
import functools
import time

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.curve import Curve
from losssurf_fast.demo.data import Data
from losssurf_fast.demo.models import EagerBezier, bezier_coefficients, perceptron, resnet50_tensors
from losssurf_fast.demo.report import new_figure
from losssurf_fast.demo.timing import Timing, alternate
from losssurf_fast.evaluation import Evaluation
from losssurf_fast.neb import auto_neb
from losssurf_fast.ops import curve_coefficients, curve_weights

WIDTH = 32  # of the two hidden layers
BATCH = 32
RATES = {"digits": 0.05, "mnist": 0.02}  # of SGD with momentum; MNIST's images are longer vectors
DECAY = 5e-4
POINTS = 61  # on each path
SEEN = 10_000  # training images at most on which paths and planes are measured
TIMED_WIDTH, TIMED_BATCH = 1024, 128
PICTURES = ("paths.png",)
LINE, BEZIER, CHAIN, BAND = "straight line", "Bezier curve", "polygonal chain", "AutoNEB"


@dataclasses.dataclass
class Path:
    """Training losses and test errors (fractions) at the points of a path, and its length in weight space."""

    t: list[float]
    losses: list[float]
    errors: list[float]
    length: float


def show(data: Data, epochs: int, seed: int, quick: bool) -> dict:
    """Train, print what comes out, and return the figures by the names of their files."""
    epochs = max(1, 2 * epochs // 5)
    print("Paths between networks: two networks without noise,")
    print(f"{data.side**2}-{WIDTH}-{WIDTH}-{data.classes}, from different random weights, and what")
    print(f"lies between them (epochs: {epochs} for each network and curve).\n", flush=True)
    curves = connect(data, epochs, seed, quick)
    paths = {name: measure(curve, data) for name, curve in curves.items()}
    print(table(paths))
    print("error in percent; length as a multiple of the line's\n")
    line, bezier = (max(paths[name].losses) for name in (LINE, BEZIER))
    print(f"On the straight line the training loss rises to {line:.2f}, on")
    print(f"the Bezier curve to {bezier:.3f}: the two are joined by a path on")
    print("which every network is good.\n", flush=True)

    blocks, seconds = (2, 0) if quick else (15, 5)
    tensors = list(resnet50_tensors().parameters())
    t = time_weights(tensors, blocks, seconds)
    print("Weights on a Bezier curve, forward and backward, for")
    print(f"ResNet-50's {len(tensors)} tensors, {sum(p.numel() for p in tensors) / 1e6:.1f} million weights:")
    print(f"per tensor {t.eager_ms:6.1f} ms   ours {t.ours_ms:6.1f} ms   {t.ratio:.2f}x", flush=True)
    t = time_steps(data, blocks, seconds)
    print(f"One step of SGD at width {TIMED_WIDTH} with {TIMED_BATCH} images, for one")
    print(f"network {t.plain_ms:.2f} ms, and on the curve between two:")
    print(f"per layer  {t.eager_ms:6.2f} ms   ours {t.ours_ms:6.2f} ms   {t.ratio:.2f}x")
    print(f"on one thread, medians of {t.blocks} alternating blocks\n")
    return {PICTURES[0]: _figure(paths)}


# ---- paths ----------------------------------------------------------------------------------------------------------


def connect(data: Data, epochs: int, seed: int, quick: bool = False) -> dict[str, Curve]:
    """Two trained networks and the paths between them."""
    ends = [perceptron(data.train_x.shape[1], WIDTH, data.classes, (seed + i) % 2**63) for i in (0, 1)]
    for i, end in enumerate(ends):
        _train(end, data, epochs, seed, f"network {i + 1}")
    curves = {LINE: Curve(ends, kind="polychain", num_bends=2)}
    for name, kind in ((BEZIER, "bezier"), (CHAIN, "polychain")):
        curves[name] = Curve(ends, kind=kind, num_bends=3)
        _train(curves[name], data, epochs, seed, name)
    steps = 5 if quick else max(5, epochs * (len(data.train_x) // BATCH) // 8)
    cycles = [
        {"steps": steps, "lr": RATES[data.name], "subsample": 4},
        {"insert": "highest", "count": 2},
        {},
        {"lr": RATES[data.name] / 5},
    ]
    curves[BAND], _ = auto_neb(
        ends[0], *ends, _Batches(data, seed), cycles=cycles[: 2 if quick else None], weight_decay=DECAY,
        eval_loader=[(data.train_x[:SEEN], data.train_y[:SEEN])], progress=False,
    )  # fmt: skip
    return curves


class _Batches:
    """A loader of shuffled batches."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data.train_x) // BATCH

    def __iter__(self):
        order = torch.randperm(len(self.data.train_x), generator=self.generator)
        for i in range(len(self)):
            batch = order[i * BATCH : (i + 1) * BATCH]
            yield self.data.train_x[batch], self.data.train_y[batch]


def _train(model: nn.Module, data: Data, epochs: int, seed: int, name: str) -> None:
    """SGD whose rate falls to zero in the second half."""
    torch.manual_seed(seed)  # a curve draws t
    loader = _Batches(data, seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, RATES[data.name], momentum=0.9, weight_decay=DECAY)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(1e-3, min(1.0, 2 * (1 - i / steps))))
    for _ in tqdm(range(epochs), desc=name, unit="epoch", ncols=60, leave=False):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()


def measure(curve: Curve, data: Data) -> Path:
    """Training loss and test error at :data:`POINTS` points."""
    loaders = {"train": [(data.train_x[:SEEN], data.train_y[:SEEN])], "test": [(data.test_x, data.test_y)]}
    evaluation = Evaluation("demo", loaders)
    ts, found = torch.linspace(0, 1, POINTS).tolist(), []
    for t in ts:
        with curve.at(t) as model:
            found.append(evaluation(model))
    losses, errors = ([point[name] for point in found] for name in ("train_loss", "test_error"))
    return Path(ts, losses, errors, 1.0)


def table(paths: dict[str, Path]) -> str:
    """One path per line, 58 columns wide."""
    line = "{:18s}{:>8s}{:>8s}{:>8s}{:>8s}{:>8s}".format
    lines = ["{:18s}{:>16s}{:>16s}".format("", "train loss", "test error")]
    lines += [line("path", "max", "mean", "max", "mean", "length"), "-" * 58]
    ends = next(iter(paths.values()))
    rows = {"the two networks": Path([0, 1], ends.losses[:: POINTS - 1], ends.errors[:: POINTS - 1], 0.0), **paths}
    for name, path in rows.items():
        loss, error = (f"{max(values):.4f}" for values in (path.losses,)), None
        lines.append(
            line(
                name,
                f"{max(path.losses):.4f}",
                f"{sum(path.losses) / len(path.losses):.4f}",
                f"{100 * max(path.errors):.2f}",
                f"{100 * sum(path.errors) / len(path.errors):.2f}",
                f"{path.length / ends.length:.2f}" if path.length else "",
            )
        )
    return "\n".join(lines)


# ---- times ----------------------------------------------------------------------------------------------------------


def time_weights(tensors: list[torch.Tensor], blocks: int, seconds: float) -> Timing:
    """Weights on a Bezier curve and the gradient of its bend, tensor by tensor and by one :func:`curve_weights`.

    Raises:
        RuntimeError: the gradients or weights differ by more than rounding.
    """
    bends = [[torch.randn_like(p, requires_grad=j == 1) for p in tensors] for j in range(3)]
    grads, t = [torch.randn_like(p) for p in tensors], torch.tensor(0.3)

    def eager():
        c = bezier_coefficients(t)
        return [c[0] * a + c[1] * b + c[2] * d for a, b, d in zip(*bends, strict=True)]

    def run(combine) -> tuple:
        weights = combine()
        return weights, torch.autograd.grad(weights, bends[1], grads)

    def timed(combine) -> float:
        began = time.thread_time()
        run(combine)
        return (time.thread_time() - began) * 1e3

    ways = {"eager": eager, "ours": lambda: curve_weights(bends, curve_coefficients(t, 3))}
    results = [run(combine) for combine in ways.values()]
    for ours, theirs in zip(*results, strict=True):
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True)):
            raise RuntimeError("demo: plain PyTorch's and our weights on a curve differ")
    del results
    return alternate({name: functools.partial(timed, way) for name, way in ways.items()}, blocks, seconds, "weights")


def time_steps(data: Data, blocks: int, seconds: float) -> Timing:
    """Steps of SGD on one network and on a Bezier curve between two, whose weights are made layer by layer or by ours.

    Raises:
        RuntimeError: the two curves' outputs differ by more than rounding.
    """
    ends = [perceptron(data.train_x.shape[1], TIMED_WIDTH, data.classes, seed) for seed in (0, 1)]
    models = {"plain": ends[0], "eager": EagerBezier(*ends), "ours": Curve(ends)}
    x, y = data.train_x[:TIMED_BATCH], data.train_y[:TIMED_BATCH]
    with torch.no_grad():
        outputs = [models[name](x, t=torch.tensor(0.3)) for name in ("eager", "ours")]
    if not torch.allclose(*outputs, atol=1e-4):
        raise RuntimeError("demo: plain PyTorch's and our curve differ")

    def block(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> float:
        began = time.thread_time()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return (time.thread_time() - began) * 1e3 / steps

    calls = {}
    for name, model in models.items():
        trainable = [p for p in model.parameters() if p.requires_grad]
        calls[name] = functools.partial(block, model, torch.optim.SGD(trainable, 1e-3, momentum=0.9))
        calls[name](steps=2)  # first steps allocate
    return alternate(calls, blocks, seconds, "steps")


# ---- pictures -------------------------------------------------------------------------------------------------------

_COLOURS = {LINE: "#888888", BEZIER: "#08519c", CHAIN: "#cb181d", BAND: "#238b45"}


def _figure(paths: dict[str, Path]):
    """Training loss and test error along the paths."""
    figure = new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for name, path in paths.items():
        left.plot(path.t, path.losses, color=_COLOURS[name], lw=1.8, label=name)
        right.plot(path.t, [100 * error for error in path.errors], color=_COLOURS[name], lw=1.8)
    left.set_yscale("log")
    left.set_ylabel("training loss")
    right.set_ylabel("test error (%)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlim(0, 1)
        axes.set_xlabel("t, from one network to the other")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
