"""The loss along random rays from a network, and from it the width of its optimum as a number.

Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.3:
w(t, d) = w + t d with d uniform on the unit sphere.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.arguments import check_int, check_number
from losssurf_fast.evaluation import Metric
from losssurf_fast.surface.directions import check_normalization, random_direction
from losssurf_fast.surface.grid import check_points
from losssurf_fast.surface.measurements import Measurements
from losssurf_fast.surface.walk import Walk
from losssurf_fast.surface.weights import Weights, combine, common_weights, gram, norm


@dataclass(eq=False)
class Rays(Measurements):
    """What :func:`rays` measured.

    Attributes:
        distances: ``[points]``, in weight space from the network; ``values[metric][r, k]`` is ray r at distances[k].
        num_rays: R.
        delta: the rise of the loss that defines its width, unless :meth:`widths` is told another.
    """

    kind: ClassVar[str] = "Rays"

    distances: np.ndarray
    num_rays: int
    delta: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rays, len(self.distances)

    def heading(self) -> str:
        found = f"{self.num_rays} rays of {len(self.distances)} points and length {self.distances[-1]:.4g}"
        first = next(iter(self.values), None)
        return found if first is None else f"{found}; {first.replace('_', ' ')}: {self.rise(first)} (median)"

    def rise(self, metric: str) -> str:
        """In words where the median ray has risen by ``delta``."""
        width = self.width(metric)
        if np.isinf(width):
            return f"+{self.delta:g} not reached"
        return "no width, it is NaN" if np.isnan(width) else f"+{self.delta:g} at {width:.3g}"

    def summary(self, metric: str) -> dict[str, float]:
        values = self.values[metric]
        return {"start": float(values[0, 0]), "median end": float(np.median(values[:, -1])), **super().summary(metric)}

    def widths(self, metric: str | None = None, delta: float | None = None) -> np.ndarray:
        """``[R]``: the distance at which a metric (None: the first) has risen by ``delta`` above that of the network.

        Interpolated linearly between points. inf where it has not within the largest distance; NaN where the metric
        is NaN before it has.
        """
        delta = check_number("Rays.widths", "delta", self.delta if delta is None else delta, positive=True)
        values = self.values[self.metric("widths", metric)]
        return np.array([_first_crossing(self.distances, ray, ray[0] + delta) for ray in values])

    def width(self, metric: str | None = None, delta: float | None = None) -> float:
        """The median of :meth:`widths`; inf where fewer than half of the rays reach ``delta``."""
        return float(np.median(self.widths(metric, delta)))

    def mean_width(self, metric: str | None = None, delta: float | None = None) -> float:
        """The mean of :meth:`widths`; inf where a single ray does not reach ``delta``."""
        return float(np.mean(self.widths(metric, delta)))

    def plot(
        self,
        path: str | os.PathLike | None = None,
        metric: str | None = None,
        *,
        label: str = "w",
        others: Mapping[str, "Rays"] | None = None,
        log: bool = False,
    ):
        """Every ray and their median over the distance; returns the matplotlib figure.

        Args:
            path: where to save it (png, pdf, svg); None saves nothing.
            metric: one of ``values``; None for the first, a loss.
            label: of these rays in the legend.
            others: rays from other networks, by label, in the same picture.
            log: a logarithmic metric.
        """
        from losssurf_fast.surface.profiles import rays_figure

        return rays_figure({label: self, **(others or {})}, path, metric, log=log)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"distances": self.distances, "num_rays": np.array(self.num_rays), "delta": np.array(self.delta)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        return cls(arrays["distances"], int(arrays["num_rays"]), float(arrays["delta"]))


def _first_crossing(distances: np.ndarray, values: np.ndarray, threshold: float) -> float:
    for k in range(1, len(values)):
        if np.isnan(values[k]) or np.isnan(threshold):
            return np.nan
        if values[k] >= threshold:
            share = (threshold - values[k - 1]) / (values[k] - values[k - 1])  # 0 where the loss jumps to infinity
            return distances[k - 1] + share * (distances[k] - distances[k - 1])
    return np.inf


def rays(
    model: nn.Module,
    weights,
    loader: Iterable | Mapping[str, Iterable],
    *,
    max_distance: float | None = None,
    num_rays: int = 10,
    points: int = 21,
    seed: int = 0,
    normalization: str | None = None,
    orthogonal: bool = False,
    delta: float = 0.1,
    loss_fn: Metric = F.cross_entropy,
    metrics: Mapping[str, Metric] | None = None,
    bn_loader: Iterable | None = None,
    recalibrate: bool = True,
    subset: float | int | None = None,
    device: torch.device | str | int | None = None,
    process_group=None,
    path: str | os.PathLike | None = None,
    progress: bool = True,
) -> Rays:
    """Loss and other metrics along random unit rays from a network; one seed gives two networks the same rays.

    Args:
        model: any live model of the network's architecture; bit-equal afterwards, whatever happens.
        weights: a model, an average of one, or a mapping from names to tensors, as for :meth:`Plane.through`.
        max_distance: length of the rays, in weight space; None for |w|, at which a ray has drawn level with the weights
            themselves. Give the same number for networks whose rays are to be compared.
        num_rays: how many.
        points: on each ray, at least 2; the first is the network itself, measured once.
        seed: of the directions; ray r of a seed is the same on every device.
        normalization: None for directions uniform on the sphere; "filter" or "layer" for directions in proportion
            to the weights (as for :meth:`Plane.random`), which differ between networks.
        orthogonal: make the rays orthogonal to each other, for which all of them are held at once.
        delta: the rise of the loss that defines its width.
        loader, loss_fn and all others: as for :meth:`Plane.evaluate`.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is not as above, or the weights are of another
            architecture than the model.
    """
    (points,) = check_points("rays", points, 1)
    if max_distance is not None:
        max_distance = check_number("rays", "max_distance", max_distance, positive=True)
    delta = check_number("rays", "delta", delta, positive=True)
    for argument, value, least in (("num_rays", num_rays, 1), ("seed", seed, -(2**63))):
        check_int("rays", argument, value, least)
    check_normalization("rays", normalization)
    walk = Walk(
        "rays", model, loader, loss_fn=loss_fn, metrics=metrics, bn_loader=bn_loader, recalibrate=recalibrate,
        subset=subset, device=device, process_group=process_group, path=path, progress=progress,
    )  # fmt: skip
    (w,), _ = common_weights("rays", {"weights": weights}, model)
    w = walk.here(w)
    if max_distance is None and (max_distance := norm(w)) == 0:
        raise ValueError("rays: max_distance must be given for weights that are all 0")
    directions = unit_directions(w, num_rays, seed, normalization, orthogonal)
    distances = np.linspace(0.0, max_distance, points)
    result = Rays(distances, num_rays, delta)
    grid = {
        "points": points, "max_distance": max_distance, "num_rays": num_rays, "seed": seed,
        "normalization": normalization, "orthogonal": orthogonal,
    }  # fmt: skip
    result.identity = walk.identity([w], grid)
    start = (slice(None), 0)

    def weights_at(place):
        if place == start:
            return w
        r, k = place
        return combine([w, directions(r)], [1.0, distances[k].item()])

    walk.run(result, [start, *((r, k) for r in range(num_rays) for k in range(1, points))], weights_at)
    return result


def unit_directions(
    w: Weights, num_rays: int, seed: int, normalization: str | None, orthogonal: bool
) -> Callable[[int], Weights]:
    """A function that makes direction r, of unit length, and holds the last that it made."""
    raw = lambda r: random_direction("rays", w, seed, r, normalization)
    if orthogonal:
        held = [raw(r) for r in range(num_rays)]
        products = gram(held)
        factor, failed = torch.linalg.cholesky_ex(products)
        size = products.diagonal().sqrt()
        if failed or (factor.diagonal() < 1e-6 * size).any():
            raise ValueError(f"rays: num_rays must be at most the number of weights if orthogonal, got {num_rays}")
        mixing = torch.linalg.inv(factor)  # Gram-Schmidt
        make = lambda r: combine(held[: r + 1], mixing[r, : r + 1].tolist())
    else:
        make = lambda r: combine([d := raw(r)], [1 / norm(d)])
    last: dict[int, Weights] = {}

    def direction(r: int) -> Weights:
        if r not in last:
            last.clear()
            last[r] = make(r)
        return last[r]

    return direction
