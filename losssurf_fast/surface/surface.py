"""Metrics over a plane in weight space."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from losssurf_fast import peer_fields
from losssurf_fast.surface.measurements import Measurements


@dataclass(eq=False)
class Projection:
    """A trajectory as a plane sees it.

    Attributes:
        path: ``[n, 3]``: x, y and the distance off the plane of every point.
        knots: ``[k, 3]``, the same of a curve's bends; empty for a list of weights.
    """

    path: np.ndarray
    knots: np.ndarray


@dataclass(eq=False)
class Surface(Measurements):
    """What :meth:`Plane.evaluate` measured; x and y are distances in weight space along orthonormal directions.

    Attributes:
        xs, ys: ``[X]`` and ``[Y]``, the grid's coordinates; ``values[metric][i, j]`` lies at ``(xs[i], ys[j])``, so
            matplotlib, whose first index is y, takes the transpose: ``contourf(xs, ys, values[metric].T)``.
        values: by metric: "loss", "error" ... of one loader, "train_loss" ... of loaders by name; errors are fractions.
        marks: coordinates (x, y) of the plane's points, by label.
        trajectories: paths near the plane, by label.

    The file has the fields ``grid``, ``bend_coordinates`` and, with loaders called "train" and "test", ``tr_loss``,
    ``te_err`` ... of dnn-mode-connectivity's plane.npz besides, errors and accuracies in percent as there.
    """

    kind: ClassVar[str] = "Surface"

    xs: np.ndarray
    ys: np.ndarray
    marks: dict[str, tuple[float, float]] = field(default_factory=dict)
    trajectories: dict[str, Projection] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.xs), len(self.ys)

    def heading(self) -> str:
        xs, ys = (f"from {a[0]:.4g} to {a[-1]:.4g}" for a in (self.xs, self.ys))
        return f"{len(self.xs)} x {len(self.ys)} points of a plane, x {xs}, y {ys}"

    def summary(self, metric: str) -> dict[str, float]:
        """With the value at the grid's point next to each mark."""
        nearest = lambda x, y: self.values[metric][np.abs(self.xs - x).argmin(), np.abs(self.ys - y).argmin()]
        return super().summary(metric) | {f"by {label}": float(nearest(*xy)) for label, xy in self.marks.items()}

    def plot(self, path: str | os.PathLike | None = None, metric: str | None = None, *, log: bool = True, vmax=None):
        """A contour picture of a metric.

        Args:
            path: where to save it (png, pdf, svg); None saves nothing.
            metric: one of ``values``; None for the first, a loss.
            log: levels at growing distances above the smallest value, or at equal ones.
            vmax: larger values are all shown alike.

        Returns:
            The matplotlib figure.
        """
        from losssurf_fast.surface.contours import contour_figure

        return contour_figure(self, path, metric, log=log, vmax=vmax)

    def arrays(self) -> dict[str, np.ndarray]:
        found = {"xs": self.xs, "ys": self.ys}
        found["labels"] = np.array([*self.marks], dtype=str)
        found["bend_coordinates"] = np.array([*self.marks.values()], dtype=np.float64).reshape(-1, 2)
        for label, t in self.trajectories.items():
            found |= {f"trajectory.{label}": t.path, f"knots.{label}": t.knots}
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        marks = zip(arrays["labels"].tolist(), arrays["bend_coordinates"].tolist(), strict=True)
        labels = [n.removeprefix("trajectory.") for n in arrays if n.startswith("trajectory.")]
        trajectories = {n: Projection(arrays[f"trajectory.{n}"], arrays[f"knots.{n}"]) for n in labels}
        return cls(arrays["xs"], arrays["ys"], {label: tuple(xy) for label, xy in marks}, trajectories)

    def extra_arrays(self) -> dict[str, np.ndarray]:
        found = {"grid": np.stack(np.meshgrid(self.xs, self.ys, indexing="ij"), axis=-1)}
        if self.trajectories:
            found["curve_coordinates"] = next(iter(self.trajectories.values())).path[:, :2]
        return found | peer_fields.by_name(self.values)
