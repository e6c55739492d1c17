"""What a model's losses and errors are along a curve."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from losssurf_fast.arguments import check_number
from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.batch_norm import is_first_rank
from losssurf_fast.averaging.swap import untouched
from losssurf_fast.curve.curve import Curve
from losssurf_fast.curve.geometry import as_points, even_points
from losssurf_fast.curve.report import CurveReport, check_names
from losssurf_fast.evaluation import Evaluation, Metric, statistics_loader
from losssurf_fast.loaders import by_name

_NAME = "evaluate_curve"


@torch.no_grad()
def evaluate_curve(
    curve: Curve,
    loader: Iterable | Mapping[str, Iterable],
    *,
    num_points: int = 61,
    ts: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    loss_fn: Metric = F.cross_entropy,
    metrics: Mapping[str, Metric] | None = None,
    weight_decay: float = 0.0,
    bn_loader: Iterable | None = None,
    recalibrate: bool = True,
    subset: float | int | None = None,
    device: torch.device | str | int | None = None,
    process_group=None,
    progress: bool = True,
) -> CurveReport:
    """Loss, error and other metrics at points of a curve, and the distances between them.

    BatchNorm statistics are set anew at every point (:func:`losssurf_fast.update_bn`), as those of an average of
    weights are not the weights' own. Every point sees the same batches where loaders shuffle by torch's default
    generator. Afterwards, also after an exception, bends, buffers, modes and the generators are as before.

    An ensemble of points is evaluated by :meth:`losssurf_fast.Curve.predict`: with its probabilities ``p`` the loss is
    ``F.nll_loss(p.log(), targets)`` and the error ``(p.argmax(-1) != targets).float().mean()``.

    Args:
        curve: also in DistributedDataParallel or torch.compile.
        loader: loaders by name, or one, which is called "data". Batches are ``(inputs, targets)``, or dicts with the
            targets under "labels", "targets", "target" or "label" and the model's keyword arguments besides. Read once
            per point each, so iterators are refused.
        num_points: at even steps of t, the ends counted.
        ts: places on the curve instead, increasing, at least two.
        loss_fn, metrics: ``loss_fn(outputs, targets)`` gives the mean over a batch as a scalar tensor, and so do
            ``metrics``, by name. One named "error" replaces the fraction of wrong classes. Outputs with ``logits``, and
            the batches' weights, are as for :meth:`losssurf_fast.Plane.evaluate`.
        weight_decay: the L2 term ``weight_decay / 2 * |w(t)|^2`` over all parameters distinguishes "loss" from "nll".
        bn_loader: data for the BatchNorm statistics; None for the loader named "train".
        recalibrate: False keeps the statistics that ``curve.module`` has.
        subset: how much of ``bn_loader`` to read, as in :func:`losssurf_fast.update_bn`.
        device: where to move a batch's tensors; None leaves them.
        process_group: where torch.distributed is initialised each rank reads its share of the data, and all get the
            same report: None for all ranks, False for this one alone.
        progress: show a bar, on the first rank.

    Raises:
        TypeError, ValueError: an argument or a batch is not as above, a loader is empty, the curve's bends are all
            equal, or BatchNorm layers have no data.
        RuntimeError: another rank failed. What a loader, the model or a function raises passes through.
    """
    curve = tensors.unwrap(curve)
    if not isinstance(curve, Curve):
        raise TypeError(f"{_NAME}: curve must be a Curve, got {type(curve).__name__}")
    ts = even_points(_NAME, num_points) if ts is None else as_points(_NAME, ts)
    if len(ts) < 2 or not (ts.diff() > 0).all():
        raise ValueError(f"{_NAME}: ts must be at least two numbers that increase, got {ts.tolist()}")
    weight_decay = check_number(_NAME, "weight_decay", weight_decay, least=0)
    named = by_name(loader)
    evaluation = Evaluation(_NAME, loader, loss_fn, metrics, bn_loader, device, subset, process_group)
    check_names(_NAME, named, metrics or ())
    bn_loader = statistics_loader(_NAME, curve.module, named, bn_loader, recalibrate)
    evaluation = replace(evaluation, bn_loader=bn_loader)
    geometry = curve.geometry()
    on_device = ts.to(geometry.gram.device)
    norms, dl = geometry.norm(on_device).cpu().numpy(), geometry.chords(on_device).cpu().numpy()
    if dl.sum() == 0:
        raise ValueError(f"{_NAME}: the curve must have a length, but its bends are all equal")

    found, shown = [], progress and is_first_rank(process_group)
    buffers = {name: b.detach().clone() for name, b in tensors.named_buffers(curve.module).items()}
    with untouched(curve.module) as write, curve._places.untouched():
        for t in tqdm(ts, desc=_NAME, unit="point", ncols=60, leave=False, disable=not shown):
            write(buffers)  # which every point starts from
            with curve.at(t) as model:
                found.append(evaluation.by_loader(model))
    values = {}
    for name in named:
        columns = {metric: np.array([point[name][metric] for point in found]) for metric in found[0][name]}
        nll = columns.pop("loss")
        values[name] = {
            "loss": nll + weight_decay / 2 * norms**2 if weight_decay else nll.copy(),
            "nll": nll,
            **columns,
        }
    return CurveReport(ts.numpy(), dl, norms, values, float(weight_decay))
