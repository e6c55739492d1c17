"""AutoNEB: a band between two minima whose pivots become more where its loss is not known well enough.

Source: Draxler et al., "Essentially no barriers in neural network energy landscape", ICML 2018, algorithms 1 and 2.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.arguments import check_number
from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.batch_norm import call_on_batch, is_first_rank, jointly, spread_over_ranks, to_device
from losssurf_fast.averaging.swap import untouched
from losssurf_fast.curve import Curve
from losssurf_fast.evaluation import Evaluation, Metric, statistics_loader
from losssurf_fast.loaders import refuse_single_pass, split_batch
from losssurf_fast.neb import band
from losssurf_fast.neb.cycles import CYCLES, Cycle, places_to_insert, read_cycles
from losssurf_fast.neb.report import NEBReport, report_of
from losssurf_fast.neb.weights import Rows, weights_of
from losssurf_fast.outputs import call_metric

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
    bn_loader: Iterable | None = None,
    recalibrate: bool = True,
    subset: float | int | None = None,
    device: torch.device | str | int | None = None,
    process_group=None,
    resume: Curve | None = None,
    after_cycle: Callable[[Curve], None] | None = None,
    progress: bool = True,
) -> Curve:
    """A path of low loss between two minima: a chain of pivots, trained as an elastic band in several cycles.

    Every step takes one batch for the whole band, so that neighbours' losses can be compared. The model is in training
    mode: BatchNorm layers use the batch's statistics at every pivot. When a cycle's band is measured they get those of
    the training data at each point (:func:`losssurf_fast.update_bn`), and the model is in evaluation mode.

    The path lies in the space of the trainable parameters, which alone enter distances, tangents and weight decay;
    frozen ones must be equal at both ends. It is held in float32 (float64 where a parameter is that): N pivots with
    their gradients and momenta take 3 N times the memory of the parameters. The ends are never changed.

    Where torch.distributed is initialised each rank reads its share of the data, in batches as large as the others';
    gradients and losses are means over the ranks, and all get the same path. Where one fails all raise.

    Args:
        model: gives the architecture and buffers; it and its mode are as before afterwards, also on an exception.
        start, end: the minima: models, averages of models, or state_dicts; buffers are not used.
        loader: yields (inputs, targets) or dicts, as in :func:`losssurf_fast.evaluate_curve`, again and again.
        loss_fn: of (outputs, targets), the mean over the batch as a scalar; outputs with ``logits`` are as for
            :meth:`losssurf_fast.Plane.evaluate`.
        cycles: a list of :class:`losssurf_fast.neb.Cycle` or of dicts, each of which says what differs from the cycle
            before; or the name of a JSON file of such a list. The default is what the paper takes for a ResNet-20.
        weight_decay: adds ``weight_decay * w`` to the loss's gradient; not part of the losses measured.
        eval_loader: what the band is measured on; ``loader`` if it is None. N + (N - 1) * subsample passes over it.
        metrics: further functions like ``loss_fn`` for the report, by name.
        bn_loader: data for the BatchNorm statistics of every measured point; ``loader`` if it is None.
        recalibrate: False measures with the statistics that ``model`` has, which belong to other weights.
        subset: how much of ``bn_loader`` to read, as in :func:`losssurf_fast.update_bn`.
        device: where to move batches; None leaves them.
        process_group: over whose ranks the data are spread: None for all ranks, False for this one alone.
        resume: the curve that an earlier call returned, or ``after_cycle`` got: its cycles, which must be the first of
            ``cycles``, are not done again.
        after_cycle: called with the curve so far after every cycle.
        progress: show a bar, on the first rank.

    Returns:
        A :class:`losssurf_fast.Curve` of kind "polychain" whose bends are the pivots. Its attribute ``report``, a
        :class:`NEBReport`, has the losses along the path and the history of the cycles; copies and pickles of the curve
        keep it, the state_dict has no part of it.

    Raises:
        TypeError, ValueError: an argument is not as above, ``start`` and ``end`` are equal or not finite, the loader is
            empty.
        RuntimeError: the loss on the path is not finite, or another rank failed.
        NotImplementedError: complex or sharded weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    rows = Rows(_NAME, model)

    def prepare() -> tuple[_Run, list[Cycle]]:
        decay = check_number(_NAME, "weight_decay", weight_decay, least=0)
        measure = measurement(
            _NAME, model, loader, eval_loader, bn_loader, recalibrate,
            loss_fn=loss_fn, metrics=metrics, subset=subset, device=device, process_group=process_group,
        )  # fmt: skip
        if "t" in (metrics or ()):
            raise ValueError(f"{_NAME}: a metric must not be named 't', which is the place on the path")
        plan = read_cycles(_NAME, cycles)
        ends = [weights_of(_NAME, argument, source, model) for argument, source in (("start", start), ("end", end))]
        _check_ends(ends, rows)
        run = _Run(model, rows, ends, measure, loader, decay)
        if resume is not None:
            run.take_up(resume, plan)
        return run, plan[len(run.report.history) :]

    run, remaining = jointly(_NAME, prepare, rows.device, process_group)
    shown = progress and is_first_rank(process_group)
    steps = sum(cycle.steps for cycle in remaining)
    with tqdm(total=steps, desc=_NAME, unit="step", ncols=60, leave=False, disable=not shown) as bar:
        for cycle in remaining:
            run.do(cycle, bar)
            if after_cycle is not None:
                jointly(_NAME, lambda: after_cycle(run.curve()), rows.device, process_group)
    return run.curve()


def measurement(
    caller: str, model: nn.Module, loader, eval_loader, bn_loader, recalibrate: bool, **how: Any
) -> Evaluation:
    """What measures a model at points of a band, and minima alike; ``how`` are further attributes of it.

    Raises:
        TypeError, ValueError: there are several loaders in one place, one can be read only once, or of ``how``.
    """
    for argument, given in (("loader", loader), ("eval_loader", eval_loader), ("bn_loader", bn_loader)):
        if isinstance(given, Mapping):
            raise TypeError(f"{caller}: {argument} must be one loader, got a {type(given).__name__} of them")
        if given is not None or argument == "loader":
            refuse_single_pass(caller, argument, given, "cycle")
    bn_loader = statistics_loader(caller, model, {"train": loader}, bn_loader, recalibrate)
    return Evaluation(caller, loader if eval_loader is None else eval_loader, bn_loader=bn_loader, **how)


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
    """A band, on which cycles are done."""

    def __init__(self, model, rows, ends, measure: Evaluation, loader, weight_decay: float):
        self.model, self.rows, self.measure = _called(model), rows, measure
        self.batches, self.weight_decay = _endless(loader), weight_decay
        self.path = torch.stack([rows.row(weights) for weights in ends])  # [N, P]
        self.frozen = {name: t.clone() for name, t in ends[0].items() if name not in rows.names}
        self.places = torch.tensor([0.0, 1.0], dtype=torch.float64, device=rows.device)  # [N]
        self.report = NEBReport()

    def take_up(self, curve: Curve, plan: list[Cycle]) -> None:
        """Go on from a path and its report."""
        report = report_of(_NAME, "resume", curve)
        done = [entry["cycle"] for entry in report.history]
        if done != [asdict(cycle) for cycle in plan[: len(done)]]:
            raise ValueError(f"{_NAME}: resume must be of a run with the same first {len(done)} cycles, got others")
        bends = [self.rows.row(dict(bend.named_parameters())) for bend in curve.bends]
        if not (torch.equal(bends[0], self.path[0]) and torch.equal(bends[-1], self.path[-1])):
            raise ValueError(f"{_NAME}: resume must be of a path between start and end, got one between others")
        if len(report.places) != len(bends):
            raise ValueError(f"{_NAME}: resume has {len(bends)} pivots, and a report of {len(report.places)}")
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
        for part in (self._train, self._measure):  # each with the model's own buffers
            with untouched(self.model) as write:
                write(self.frozen)
                part(cycle, bar)

    def _train(self, cycle: Cycle, bar: tqdm) -> None:
        self.model.train()
        inner, group = nn.Parameter(self.path[1:-1]), self.measure.process_group  # the same memory
        inner.grad = torch.empty_like(inner)
        losses = torch.empty(len(self.path), dtype=torch.float64, device=self.path.device)
        optimizer = torch.optim.SGD([inner], lr=cycle.lr, momentum=cycle.momentum)
        for _ in range(cycle.steps):
            jointly(_NAME, lambda: self._fill(losses, inner.grad), self.path.device, group)
            if spread_over_ranks(group):
                for t in (inner.grad, losses):
                    dist.all_reduce(t, group=group)
                    t /= dist.get_world_size(group)
            inner.grad.add_(inner, alpha=self.weight_decay)
            band.nudge_(inner.grad, self.path, losses, self.places, cycle.spring)
            optimizer.step()
            if cycle.spring == float("inf"):
                band.redistribute(self.path, self.places)
            bar.update()

    def _fill(self, losses: torch.Tensor, grads: torch.Tensor) -> None:
        """Losses [N] of the pivots for the next batch, and gradients [N-2, P] of the inner ones."""
        batch = next(self.batches)
        for i, row in enumerate(self.path):
            losses[i] = self._loss(row, batch, grads[i - 1] if 0 < i < len(self.path) - 1 else None)

    def _loss(self, row: torch.Tensor, batch, grad: torch.Tensor | None) -> torch.Tensor:
        """The loss of one pivot; its gradient goes to ``grad`` [P]."""
        self.rows.install(row)
        inputs, targets = split_batch(_NAME, batch)
        device, loss_fn = self.measure.device, self.measure.loss_fn
        with torch.set_grad_enabled(grad is not None):
            outputs = call_on_batch(_NAME, self.model, (inputs,), device, None)
            loss = call_metric(loss_fn, outputs, to_device(targets, device))
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
        """The path so far with its report; its ends have the minima's own bits, which float32 keeps."""
        bends = [self.frozen | dict(self.rows.named_views(row)) for row in self.path]
        curve = Curve(bends, kind="polychain", num_bends=len(bends), model=self.model)
        curve.report = copy.deepcopy(self.report)
        return curve
