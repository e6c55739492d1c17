"""The demo's third part: paths between two networks, what the loss does on them, and what a step on a curve costs.

Two perceptrons are trained from different random weights. Between them lie the straight line, a Bezier curve and a
polygonal chain with one trained bend each (Garipov et al., NeurIPS 2018), and the band of AutoNEB (Draxler et al., ICML
2018).
"""

import functools
import time

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.curve import Curve, CurveReport, evaluate_curve
from losssurf_fast.demo.data import Data
from losssurf_fast.demo.models import EagerBezier, bezier_coefficients, perceptron, resnet50_tensors
from losssurf_fast.demo.timing import Timing, alternate
from losssurf_fast.figures import new_figure
from losssurf_fast.neb import auto_neb
from losssurf_fast.ops import curve_coefficients, curve_weights
from losssurf_fast.surface import Plane

WIDTH = 32  # of the two hidden layers
BATCH = 32
RATES = {"digits": 0.05, "mnist": 0.02}  # of SGD with momentum; MNIST's images are longer vectors
DECAY = 5e-4
POINTS = 61  # on each path
SEEN = 10_000  # training images at most on which paths and planes are measured
TIMED_WIDTH, TIMED_BATCH = 1024, 128
PICTURES = ("paths.png", "bezier.png", "chain.png")
LINE, BEZIER, CHAIN, BAND = "straight line", "Bezier curve", "polygonal chain", "AutoNEB"


def show(data: Data, epochs: int, seed: int, quick: bool) -> dict:
    """Train, print what comes out, and return the figures by the names of their files."""
    epochs = max(1, 2 * epochs // 5)
    print("Paths between networks: two networks without noise,")
    print(f"{data.side**2}-{WIDTH}-{WIDTH}-{data.classes}, from different random weights, and what")
    print(f"lies between them (epochs: {epochs} for each network and curve).\n", flush=True)
    curves = connect(data, epochs, seed, quick)
    loaders = {"train": [(data.train_x[:SEEN], data.train_y[:SEEN])], "test": [(data.test_x, data.test_y)]}
    reports = {name: evaluate_curve(curve, loaders, num_points=POINTS) for name, curve in curves.items()}
    print(table(reports))
    print("error in percent; length as a multiple of the line's\n")
    line, bezier, band = (reports[name]["train"]["loss"].max for name in (LINE, BEZIER, BAND))
    print(f"The training loss rises to {line:.2g} on the straight line,")
    print(f"to {bezier:.2g} on the Bezier curve and to {band:.2g} on AutoNEB's")
    print(f"chain of {curves[BAND].num_bends} networks.\n", flush=True)
    figures = {PICTURES[0]: _figure(reports)}
    for picture, name in zip(PICTURES[1:], (BEZIER, CHAIN), strict=True):
        figures[picture] = _plane(curves[name], name, loaders["train"], points=5 if quick else 25)

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
    return figures


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
    curves[BAND] = auto_neb(
        ends[0], *ends, _Batches(data, seed), cycles=cycles[: 2 if quick else None], weight_decay=DECAY,
        eval_loader=[(data.train_x[:SEEN], data.train_y[:SEEN])],
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


def table(reports: dict[str, CurveReport]) -> str:
    """One path per line, 58 columns wide."""
    line = "{:18s}{:>8s}{:>8s}{:>8s}{:>8s}{:>8s}".format
    lines = ["{:18s}{:>16s}{:>16s}".format("", "train loss", "test error")]
    lines += [line("path", "max", "mean", "max", "mean", "length"), "-" * 58]
    straight = reports[LINE]
    for name, report in reports.items():
        loss, error = report["train"]["loss"], report["test"]["error"]
        numbers = f"{loss.max:.4f}", f"{loss.mean:.4f}", f"{100 * error.max:.2f}", f"{100 * error.mean:.2f}"
        lines.append(line(name, *numbers, f"{report.length / straight.length:.2f}"))
    ends = [straight[loader][metric].values[[0, -1]] for loader, metric in (("train", "loss"), ("test", "error"))]
    numbers = [number for values in (ends[0], 100 * ends[1]) for number in (values.max(), values.mean())]
    lines.append(line("only the ends", *(f"{n:.{d}f}" for n, d in zip(numbers, (4, 4, 2, 2), strict=True)), ""))
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


def _figure(reports: dict[str, CurveReport]):
    """Training loss and test error along the paths."""
    figure = new_figure(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for name, report in reports.items():
        style = {"color": _COLOURS[name], "lw": 1.8}
        left.plot(report.ts, report["train"]["loss"].values, label=name, **style)
        right.plot(report.ts, 100 * report["test"]["error"].values, **style)
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


def _plane(curve: Curve, name: str, loader: list, points: int):
    """The training loss on the plane through a curve's two networks and its bend."""
    start, bend, end = (dict(bend.named_parameters()) for bend in curve.bends)
    plane = Plane.through(start, end, bend, labels=("network 1", "network 2", "bend"))
    return plane.evaluate(
        curve.module_at(0.0), loader, points=points, margin=(0.2, 0.2, 0.6, 0.4), trajectories={name: curve},
        progress=False,
    ).plot()  # fmt: skip
