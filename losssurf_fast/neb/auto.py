"""AutoNEB: a band between two minima whose pivots become more where its loss is not known well enough.

Source: Draxler et al., "Essentially no barriers in neural network energy landscape", ICML 2018, algorithms 1 and 2.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.batch_norm import call_on_batch, spread_over_ranks, to_device
from losssurf_fast.averaging.swap import untouched
from losssurf_fast.curve import Curve
from losssurf_fast.evaluation import Evaluation, Metric
from losssurf_fast.loaders import refuse_single_pass, split_batch
from losssurf_fast.neb import band
from losssurf_fast.neb.cycles import CYCLES, Cycle, places_to_insert, read_cycles
from losssurf_fast.neb.report import NEBReport
from losssurf_fast.neb.weights import Rows, weights_of

_NAME = "auto_neb"


def auto_neb(
    model: nn.Module,
    start: nn.Module | Mapping[str, torch.Tensor],
    end: nn.Module | Mapping[str, torch.Tensor],
    loader: Iterable,
    *,
    loss_fn: Metric = F.cross_entropy,
    cycles: Sequence[Mapping | Cycle] | str = CYCLES,
    weight_decay: float = 0.0,
    eval_loader: Iterable | None = None,
    metrics: Mapping[str, Metric] | None = None,
    device: torch.device | str | None = None,
    resume: tuple[Curve, NEBReport] | None = None,
    after_cycle: Callable[[Curve, NEBReport], None] | None = None,
    progress: bool = True,
) -> tuple[Curve, NEBReport]:
    """A path of low loss between two minima: a chain of pivots, trained as an elastic band in several cycles.

    Every step takes one batch for the whole band, so that neighbours' losses can be compared. The model is in training
    mode: BatchNorm layers use the batch's statistics at every pivot. When a cycle's band is measured they get those of
    ``loader`` at each point (:func:`losssurf_fast.update_bn`), and the model is in evaluation mode.

    The path lies in the space of the trainable parameters, which alone enter distances, tangents and weight decay;
    frozen ones must be equal at both ends. It is held in float32 (float64 where a parameter is that): N pivots with
    their gradients and momenta take 3 N times the memory of the parameters. The ends are never changed.

    Where torch.distributed is initialised each rank reads its share of the data, in as many batches as the others;
    gradients and losses are means over all ranks, and all get the same path.

    Args:
        model: gives the architecture and buffers; it and its mode are as before afterwards, also on an exception.
        start, end: the minima, as models or as state_dicts, of which buffers are not used.
        loader: yields (inputs, targets) or dicts, as in :func:`losssurf_fast.evaluate_curve`, again and again.
        loss_fn: of (outputs, targets), the mean over the batch as a scalar.
        cycles: a list of :class:`Cycle` or of dicts, each of which says what differs from the cycle before; or the name
            of a JSON file of such a list. The default is what the paper takes for a ResNet-20.
        weight_decay: adds ``weight_decay * w`` to the loss's gradient; not part of the losses measured.
        eval_loader: what the band is measured on; ``loader`` if it is None. N + (N - 1) * subsample passes over it.
        metrics: further functions like ``loss_fn`` for the report, by name.
        device: where to move batches; None leaves them.
        resume: what an earlier call returned, or ``after_cycle`` got: its cycles, which must be the first of
            ``cycles``, are not done again.
        after_cycle: called with the curve and the report after every cycle.
        progress: show a bar.

    Returns:
        A curve of kind "polychain" whose bends are the pivots, and a :class:`NEBReport`.

    Raises:
        TypeError, ValueError: an argument is not as above, ``start`` and ``end`` are equal, the loader is empty.
        RuntimeError: the loss on the path is not finite.
        NotImplementedError: complex or sharded weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
        raise TypeError(f"{_NAME}: weight_decay must be a number, got {type(weight_decay).__name__}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"{_NAME}: weight_decay must be a finite number of at least 0, got {weight_decay}")
    refuse_single_pass(_NAME, "loader", loader, "cycle")
    plan = read_cycles(_NAME, cycles)
    ends = [weights_of(_NAME, argument, source, model) for argument, source in (("start", start), ("end", end))]
    rows = Rows(_NAME, model)
    _check_ends(ends, rows)
    measure = Evaluation(
        _NAME, loader if eval_loader is None else eval_loader, loss_fn, metrics, bn_loader=loader, device=device
    )
    run = _Run(_called(model), rows, ends, measure, loader, loss_fn, float(weight_decay), device)
    if resume is not None:
        run.take_up(*resume, plan)
    remaining = plan[len(run.report.history) :]
    steps = sum(cycle.steps for cycle in remaining)
    with tqdm(total=steps, desc=_NAME, unit="step", ncols=60, leave=False, disable=not progress) as bar:
        for cycle in remaining:
            with untouched(model) as write:
                write(run.frozen)
                run.do(cycle, bar)
            if after_cycle is not None:
                after_cycle(run.curve(), copy.deepcopy(run.report))
    return run.curve(), run.report


def _called(model: nn.Module) -> nn.Module:
    """What runs forward: a compiled model as it is; not DistributedDataParallel, which waits for its own backward."""
    inner = tensors.unwrap(model)
    return model if isinstance(model, torch._dynamo.OptimizedModule) and model._orig_mod is inner else inner


def _check_ends(ends: list[dict[str, torch.Tensor]], rows: Rows) -> None:
    start, end = ends
    for name, value in start.items():
        if name not in rows.names and not torch.equal(value, end[name].to(value)):
            raise ValueError(f"{_NAME}: {name} requires no gradient and must be equal in start and end, it differs")
    if all(torch.equal(start[name], end[name].to(start[name])) for name in rows.names):
        raise ValueError(f"{_NAME}: start and end must differ, got equal weights")


def _endless(loader: Iterable) -> Iterator:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{_NAME}: loader must yield at least one batch, every time it is read; got none")


class _Run:
    """A band, on which cycles are done; :meth:`do` writes to the model."""

    def __init__(self, model, rows, ends, measure, loader, loss_fn, weight_decay, device):
        self.model, self.rows, self.measure = model, rows, measure
        self.batches, self.loss_fn, self.weight_decay, self.device = _endless(loader), loss_fn, weight_decay, device
        self.path = torch.stack([rows.row(weights) for weights in ends])  # [N, P]
        self.frozen = {name: t.clone() for name, t in ends[0].items() if name not in rows.names}
        self.places = torch.tensor([0.0, 1.0], dtype=torch.float64, device=rows.device)  # [N]
        self.report = NEBReport()

    def take_up(self, curve: Curve, report: NEBReport, plan: list[Cycle]) -> None:
        """Go on from a path and its report."""
        if not isinstance(curve, Curve) or not isinstance(report, NEBReport):
            raise TypeError(
                f"{_NAME}: resume must be a Curve and its NEBReport, got {type(curve).__name__} and "
                f"{type(report).__name__}"
            )
        done = [entry["cycle"] for entry in report.history]
        if done != [asdict(cycle) for cycle in plan[: len(done)]]:
            raise ValueError(f"{_NAME}: resume must be of a run with the same first {len(done)} cycles, got others")
        bends = [self.rows.row(dict(bend.named_parameters())) for bend in curve.bends]
        if not (torch.equal(bends[0], self.path[0]) and torch.equal(bends[-1], self.path[-1])):
            raise ValueError(f"{_NAME}: resume must be of a path between start and end, got one between others")
        self.path = torch.stack([bend.detach() for bend in bends])
        self.places = torch.tensor(report.places, dtype=torch.float64, device=self.path.device)
        self.report = copy.deepcopy(report)

    @torch.no_grad()
    def do(self, cycle: Cycle, bar: tqdm) -> None:
        losses = self.report.points.get("loss", [])
        segment, along = places_to_insert(cycle, len(self.path), losses, self.report.subsample)
        segment, along = segment.to(self.path.device), along.to(self.path.device)
        self.path = band.insert(self.path, segment, along)
        self.places = band.insert(self.places, segment, along)
        if cycle.spacing == "equal":
            self.places = torch.linspace(0, 1, len(self.places), dtype=torch.float64, device=self.places.device)
        self._train(cycle, bar)
        self._measure(cycle, bar)

    def _train(self, cycle: Cycle, bar: tqdm) -> None:
        self.model.train()
        inner = nn.Parameter(self.path[1:-1])  # the same memory
        inner.grad = torch.empty_like(inner)
        losses = torch.empty(len(self.path), dtype=torch.float64, device=self.path.device)
        optimizer = torch.optim.SGD([inner], lr=cycle.lr, momentum=cycle.momentum)
        for _ in range(cycle.steps):
            batch = next(self.batches)
            for i, row in enumerate(self.path):
                losses[i] = self._loss(row, batch, inner.grad[i - 1] if 0 < i < len(self.path) - 1 else None)
            if spread_over_ranks(None):
                for t in (inner.grad, losses):
                    dist.all_reduce(t)
                    t /= dist.get_world_size()
            inner.grad.add_(inner, alpha=self.weight_decay)
            band.nudge_(inner.grad, self.path, losses, self.places, cycle.spring)
            optimizer.step()
            if cycle.spring == float("inf"):
                band.redistribute(self.path, self.places)
            bar.update()

    def _loss(self, row: torch.Tensor, batch, grad: torch.Tensor | None) -> torch.Tensor:
        """The loss of one pivot; its gradient goes to ``grad`` [P]."""
        self.rows.install(row)
        inputs, targets = split_batch(_NAME, batch)
        with torch.set_grad_enabled(grad is not None):
            outputs = call_on_batch(_NAME, self.model, (inputs,), self.device, None)
            loss = self.loss_fn(outputs, to_device(targets, self.device))
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise ValueError(f"{_NAME}: loss_fn must return a scalar, the mean over a batch, got {got}")
            if grad is not None:
                if not loss.requires_grad:
                    raise ValueError(f"{_NAME}: loss_fn must depend on the weights, got a loss without gradient")
                found = torch.autograd.grad(loss.reshape(()), self.rows.parameters, materialize_grads=True)
                torch._foreach_copy_(self.rows.views(grad), list(found))
        return loss.detach().reshape(())

    def _measure(self, cycle: Cycle, bar: tqdm) -> None:
        """Fill the report with the losses at the pivots and between them."""
        step, gaps = cycle.subsample + 1, len(self.path) - 1
        points: dict[str, list[float]] = {}
        for i in range(gaps * step + 1):
            segment, j = divmod(i, step)
            if j == 0:
                self.rows.install(self.path[segment])
            else:
                self.rows.install(torch.lerp(self.path[segment], self.path[segment + 1], j / step))
            for name, value in {"t": i / (gaps * step), **self.measure(self.model)}.items():
                points.setdefault(name, []).append(value)
        finite = torch.tensor(points["loss"]).isfinite()
        number = len(self.report.history) + 1
        if not finite.all():
            raise RuntimeError(
                f"{_NAME}: the loss must be finite on the path, it is not at {int((~finite).sum())} of {len(finite)} "
                f"points after cycle {number}, with lr={cycle.lr}; a smaller one may help"
            )
        report = self.report
        report.points, report.subsample, report.places = points, cycle.subsample, self.places.tolist()
        report.lengths = band.segment_lengths(self.path).tolist()
        entry = {"cycle": asdict(cycle), "pivots": len(self.path), "saddle": report.saddle, "length": report.length}
        report.history.append(entry)
        bar.set_postfix_str(f"saddle {report.saddle:.2g}")

    def curve(self) -> Curve:
        """The path so far; its ends have the minima's own bits, which float32 keeps."""
        bends = [self.frozen | dict(self.rows.named_views(row)) for row in self.path]
        return Curve(bends, kind="polychain", num_bends=len(bends), model=self.model)
