"""The loss along the straight line through two networks, such as SWA's and SGD's."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.evaluation import Metric
from losssurf_fast.surface.grid import axis_through_ends, check_labels, check_margin, check_points
from losssurf_fast.surface.measurements import Measurements
from losssurf_fast.surface.walk import Walk
from losssurf_fast.surface.weights import combine, common_weights, difference, norm


@dataclass(eq=False)
class Line(Measurements):
    """What :func:`line` measured.

    Attributes:
        distances: ``[points]``, in weight space from the first network: negative before it; the second lies at
            ``length``. Both are among the points.
        length: distance of the two networks.
        labels: of the two.
    """

    kind: ClassVar[str] = "Line"

    distances: np.ndarray
    length: float
    labels: tuple[str, str]

    @property
    def shape(self) -> tuple[int]:
        return (len(self.distances),)

    def heading(self) -> str:
        a, b = self.labels
        return f"{len(self.distances)} points on the line through {a} and {b}, which lie {self.length:.4g} apart"

    def summary(self, metric: str) -> dict[str, float]:
        ends = (self.values[metric][np.abs(self.distances - at).argmin()] for at in (0, self.length))
        found = dict(zip(self.labels, map(float, ends), strict=True))
        return found | super().summary(metric) | {"barrier": self.barrier(metric)}

    def barrier(self, metric: str | None = None) -> float:
        """How far a metric (None: the first) rises between the networks above the higher of its values at them.

        At least 0; NaN where the metric is NaN in between. (Some papers measure from the straight line between the two
        values instead, which is never higher than the higher one.)
        """
        values = self.values[self.metric("barrier", metric)]
        between = values[(self.distances >= 0) & (self.distances <= self.length)]
        return float(np.max(between) - max(between[0], between[-1]))

    def plot(self, path: str | os.PathLike | None = None, metrics: Sequence[str] | None = None, *, log: bool = False):
        """The metrics over the distance, one panel for each kind; returns the matplotlib figure.

        Args:
            path: where to save it (png, pdf, svg); None saves nothing.
            metrics: some of ``values``; None for all. Those that differ in the loader alone share a panel.
            log: logarithmic metrics.
        """
        from losssurf_fast.surface.profiles import line_figure

        return line_figure(self, path, metrics, log=log)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"distances": self.distances, "length": np.array(self.length), "labels": np.array(self.labels)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        return cls(arrays["distances"], float(arrays["length"]), tuple(arrays["labels"].tolist()))


def line(
    model: nn.Module,
    w_a,
    w_b,
    loader: Iterable | Mapping[str, Iterable],
    *,
    points: int = 61,
    margin: float | Sequence[float] = 0.0,
    labels: Sequence[str] = ("a", "b"),
    loss_fn: Metric = F.cross_entropy,
    metrics: Mapping[str, Metric] | None = None,
    bn_loader: Iterable | None = None,
    recalibrate: bool = True,
    subset: float | int | None = None,
    device: torch.device | str | int | None = None,
    process_group=None,
    path: str | os.PathLike | None = None,
    progress: bool = True,
) -> Line:
    """Loss and other metrics along the line through two networks.

    Args:
        model: any live model of their architecture; bit-equal afterwards, whatever happens.
        w_a, w_b: models, averages of models, or mappings from names to tensors, as for :meth:`Plane.through`.
        points: how many, at least 2; the two networks are among them.
        margin: how far the line goes on beyond the networks, as a fraction of their distance; one, or (before, after).
        labels: of the two networks, for pictures.
        loader, loss_fn and all others: as for :meth:`Plane.evaluate`.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is not as above, the networks are the same, or of
            another architecture than the model.
    """
    (points,) = check_points("line", points, 1)
    margins = check_margin("line", margin, 2)
    labels = check_labels("line", labels, 2)
    fractions = axis_through_ends("line", points, margins)
    walk = Walk(
        "line", model, loader, loss_fn=loss_fn, metrics=metrics, bn_loader=bn_loader, recalibrate=recalibrate,
        subset=subset, device=device, process_group=process_group, path=path, progress=progress,
    )  # fmt: skip
    ends, _ = common_weights("line", {"w_a": w_a, "w_b": w_b}, model)
    length = norm(difference(ends[1], ends[0]))
    if length == 0:
        raise ValueError("line: w_a and w_b must be different networks, their distance is 0")
    ends = [walk.here(w) for w in ends]
    result = Line(fractions * length, length, labels)
    result.identity = walk.identity(ends, {"points": points, "margin": margins})
    at = lambda place: fractions[place[0]].item()
    walk.run(result, [(i,) for i in range(points)], lambda place: combine(ends, [1 - at(place), at(place)]))
    return result
