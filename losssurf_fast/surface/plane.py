"""A plane in weight space: through three networks, along random directions, or closest to a trajectory.

Sources: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", NeurIPS 2018, appendix (planes
through three points); Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018 (random planes with
filter normalization, planes of principal components). With the plane's vectors u and v at its origin w0::

    x_hat = u / |u|        y_hat = (v - <v, x_hat> x_hat) / |.|        w(x, y) = w0 + x x_hat + y y_hat

Weights are held in fp32 (fp64 for fp64), u and v as they come; that x_hat and y_hat are orthonormal is the business of
two coefficients for each point, from inner products in fp64.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.arguments import check_int, check_number
from losssurf_fast.averaging import tensors
from losssurf_fast.curve import Curve
from losssurf_fast.curve.geometry import even_points
from losssurf_fast.evaluation import Metric
from losssurf_fast.surface.directions import random_direction
from losssurf_fast.surface.grid import axis, check_labels, check_margin, check_points
from losssurf_fast.surface.surface import Projection, Surface
from losssurf_fast.surface.walk import Walk
from losssurf_fast.surface.weights import (
    Weights,
    combine,
    common_weights,
    copy_of,
    difference,
    gram,
    norm,
    weights_of,
)


class Plane:
    """A plane with orthonormal coordinates (x, y) in units of distance in weight space, over parameters alone.

    Made by :meth:`through`, :meth:`random`, :meth:`along` or :meth:`pca`.

    Attributes:
        marks: coordinates of the points that made it, by label.
        box: ((x_low, x_high), (y_low, y_high)), what a grid without margins covers.
        trajectories: what :meth:`evaluate` records besides, by label.
        explained_variance: of a plane of principal components, the shares of the networks' variance along x and y.
    """

    def __init__(self, caller: str, origin: Weights, u: Weights, v: Weights, *, blur: float, problem: str):
        self._origin, self._u, self._v = copy_of(origin), u, v  # the model may be trained on
        products = gram([u, v])
        length, other = products.diagonal().sqrt().tolist()
        along = products[0, 1].item() / length if length else 0.0  # <v, x_hat>
        height = math.sqrt(max(products[1, 1].item() - along**2, 0.0))
        blur = max(blur, torch.finfo(torch.float32).eps * other)  # what rounding does to u and v
        if length <= blur or height <= blur:
            raise ValueError(f"{caller}: {problem}")
        self._length, self._along, self._height = length, along, height
        self.marks: dict[str, tuple[float, float]] = {}
        self.trajectories: dict[str, Projection] = {}
        self.box = ((0.0, 0.0), (0.0, 0.0))
        self.explained_variance: tuple[float, float] | None = None

    @classmethod
    def through(cls, w1, w2, w3, *, labels: Sequence[str] = ("w1", "w2", "w3"), model: nn.Module | None = None) -> Self:
        """The plane through three networks: w1 at (0, 0), w2 at (distance, 0), w3 above the x axis.

        Args:
            w1, w2, w3: models, averages of models (AveragedModel, SWAG), or mappings from names to tensors:
                state_dicts, ``curve.weights(t)``. Buffers are no coordinates.
            labels: of the three, for pictures.
            model: tells the parameters of state_dicts from other entries, where none of the three is a model. Needed
                only where a model has buffers besides BatchNorm's.

        Raises:
            TypeError, ValueError, NotImplementedError: weights are not as above, their names or shapes differ, they
                are not finite, or lie on one line.
        """
        caller = "Plane.through"
        labels = check_labels(caller, labels, 3)
        (first, second, third), eps = common_weights(caller, {"w1": w1, "w2": w2, "w3": w3}, model)
        u, v = difference(second, first), difference(third, first)
        plane = cls(
            caller, first, u, v, blur=eps * norm(first),
            problem="w1, w2 and w3 must span a plane, they lie on one line",
        )  # fmt: skip
        corners = ((0.0, 0.0), (plane._length, 0.0), (plane._along, plane._height))
        plane.marks = dict(zip(labels, corners, strict=True))
        plane._cover(corners)
        return plane

    @classmethod
    def random(
        cls, center, *, seed: int = 0, normalization: str | None = "filter", extent: float = 1.0, label: str = "w",
        model: nn.Module | None = None,
    ) -> Self:  # fmt: skip
        """A plane through one network along two random directions, which ``seed`` replays.

        Args:
            center: as the points of :meth:`through`.
            seed: a number for each plane; it gives the same directions on every device.
            normalization: "filter" gives every filter of the directions (what one index of a tensor's first dimension
                selects) the norm of that filter of the weights (Li et al.); "layer" does so with whole tensors. Both
                leave out tensors of fewer than two dimensions. None is normal noise.
            extent: half the side of the box, as a multiple of the direction's norm, which "filter" and "layer" make
                that of the weights; without normalization a multiple of the weights' norm. (Li et al.: 1.)
            label: of the network, for pictures.
            model: as for :meth:`through`.

        Raises:
            TypeError, ValueError, NotImplementedError: as for :meth:`through`, and where normalization leaves nothing.
        """
        caller = "Plane.random"
        check_int(caller, "seed", seed, -(2**63))
        extent = check_number(caller, "extent", extent, positive=True)
        (w,), _ = common_weights(caller, {"center": center}, model)
        u, v = (random_direction(caller, w, seed, number, normalization) for number in (0, 1))
        plane = cls(caller, w, u, v, blur=0.0, problem="center must have two coordinates to vary, it has one")
        sizes = (plane._length, plane._height) if normalization else (norm(w),) * 2
        plane.marks = {label: (0.0, 0.0)}
        plane._cover([(sign * extent * sizes[0], sign * extent * sizes[1]) for sign in (-1, 1)])
        return plane

    @classmethod
    def along(
        cls, center, first, second, *, extent: float = 1.0, label: str = "w", model: nn.Module | None = None
    ) -> Self:
        """The plane through one network along two directions of one's own, such as eigenvectors of the Hessian.

        Args:
            center: as the points of :meth:`through`.
            first, second: mappings from its names to the directions' tensors; of any length, not parallel.
            extent: half the side of the box, as a multiple of the directions' lengths.
            label: of the network, for pictures.
            model: as for :meth:`through`.

        Raises:
            TypeError, ValueError, NotImplementedError: as for :meth:`through`.
        """
        caller = "Plane.along"
        extent = check_number(caller, "extent", extent, positive=True)
        (w, u, v), _ = common_weights(caller, {"center": center, "first": first, "second": second}, model)
        u, v = copy_of(u), copy_of(v)
        plane = cls(caller, w, u, v, blur=0.0, problem="first and second must span a plane, they are parallel or zero")
        plane.marks = {label: (0.0, 0.0)}
        plane._cover([(sign * extent * plane._length, sign * extent * plane._height) for sign in (-1, 1)])
        return plane

    @classmethod
    def pca(cls, trajectory: Iterable, *, label: str = "trajectory", model: nn.Module | None = None) -> Self:
        """The plane closest to a list of networks: through their mean along the two principal components.

        The components are combinations of the networks, found from their matrix of inner products; nothing of the
        size [parameters, parameters] is ever made.

        Args:
            trajectory: networks, each as the points of :meth:`through`; the order is that of the path in pictures.
            label: of the path, for pictures.
            model: as for :meth:`through`.

        Raises:
            TypeError, ValueError, NotImplementedError: as for :meth:`through`, or there are fewer than three networks.
        """
        caller = "Plane.pca"
        points = {f"trajectory[{k}]": w for k, w in enumerate(trajectory)}
        if len(points) < 3:
            raise ValueError(f"{caller}: trajectory must hold at least 3 networks, got {len(points)}")
        weights, eps = common_weights(caller, points, model)
        mean = combine(weights, [1 / len(weights)] * len(weights))
        deviations = [difference(w, mean) for w in weights]
        values, vectors = torch.linalg.eigh(gram(deviations))
        u, v = (combine(deviations, vectors[:, -k].tolist()) for k in (1, 2))
        plane = cls(
            caller, mean, u, v, blur=eps * norm(mean),
            problem="the networks of trajectory must span a plane, they lie on one line",
        )  # fmt: skip
        plane.explained_variance = tuple((values[[-1, -2]] / values.sum()).tolist())
        path = np.array([plane.project(w) for w in weights])
        plane.trajectories = {label: Projection(path, path[:0])}
        plane._cover(path[:, :2].tolist())
        return plane

    def _cover(self, points: Iterable[Sequence[float]]) -> None:
        xs, ys = zip(*points, strict=True)
        self.box = ((min(xs), max(xs)), (min(ys), max(ys)))

    def weights(self, x: float, y: float) -> Weights:
        """The network at (x, y), by parameter name, in one pass over the weights."""
        b = y / self._height
        return combine([self._origin, self._u, self._v], [1.0, (x - b * self._along) / self._length, b])

    def project(self, weights, model: nn.Module | None = None) -> tuple[float, float, float]:
        """(x, y, distance off the plane) of a network, given as for :meth:`through`."""
        caller = "Plane.project"
        offset = difference(self._same_space(caller, weights, model), self._origin)
        products = gram([self._u, self._v, offset])
        x = products[0, 2].item() / self._length
        b = (products[1, 2].item() - self._along * x) / self._height**2
        a = (x - b * self._along) / self._length
        return x, b * self._height, norm(combine([offset, self._u, self._v], [1.0, -a, -b]))

    def trajectory(
        self, points: Curve | Iterable, *, num_points: int = 61, model: nn.Module | None = None
    ) -> Projection:
        """A list of networks, or a Curve at ``num_points`` equally spaced t and its bends, seen by this plane.

        Args:
            points: the Curve, or networks, each as for :meth:`through`.
            model: as for :meth:`through`.
        """
        if isinstance(points, Curve):
            ts = even_points("Plane.trajectory", num_points).tolist()
            with torch.no_grad():
                path = [self.project(points.weights(t), model) for t in ts]
                knots = [self.project(dict(bend.named_parameters()), model) for bend in points.bends]
        else:
            path, knots = [self.project(w, model) for w in points], []
        if not path:
            raise ValueError("Plane.trajectory: points must hold at least one network, got none")
        return Projection(np.array(path), np.array(knots).reshape(-1, 3))

    def _same_space(self, caller: str, weights, model: nn.Module | None) -> Weights:
        found = weights_of(caller, "weights", weights, model)
        tensors.match(caller, self._origin, found, "the plane", "weights")
        return {name: found[name].to(t.device, t.dtype) for name, t in self._origin.items()}

    def evaluate(
        self,
        model: nn.Module,
        loader: Iterable | Mapping[str, Iterable],
        *,
        points: int | tuple[int, int] = 21,
        margin: float | Sequence[float] = 0.2,
        trajectories: Mapping[str, Curve | Iterable] | None = None,
        loss_fn: Metric = F.cross_entropy,
        metrics: Mapping[str, Metric] | None = None,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        process_group=None,
        path: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> Surface:
        """Loss and other metrics on a grid over the plane's box.

        Args:
            model: any live model of the plane's architecture; bit-equal afterwards, whatever happens.
            loader: one loader, or loaders by name: then the metrics are called "train_loss", "test_error" ... Batches
                are ``(inputs, targets)``, or dicts with the targets under "labels", "targets", "target" or "label" and
                the model's keyword arguments besides. Read once per point each, so iterators are refused.
            points: of the grid along x and y.
            margin: how far the grid goes beyond the box, as a fraction of its sides: one for all, or (left, right,
                bottom, top).
            trajectories: Curves or lists of networks to draw into the picture, by label.
            loss_fn, metrics: ``loss_fn(outputs, targets)`` gives the mean over a batch as a scalar tensor, and so do
                ``metrics``, by name. One named "error" replaces the fraction of wrong classes. Batches weigh by their
                samples, the first size of the targets. Outputs that are no tensor but have ``logits``, as attribute or
                key, are measured by these: "error", and torch's cross entropy, also with options; other functions get
                the outputs themselves (which have no loss, as the model gets no targets).
            bn_loader: training data for the BatchNorm statistics of every point; None for the loader named "train".
            recalibrate: False keeps the model's statistics instead, which belong to other weights.
            subset: how much of ``bn_loader`` to read, as in :func:`losssurf_fast.update_bn`.
            device: where to move a batch's tensors; None leaves them.
            process_group: where torch.distributed is initialised each rank reads its share of the data, and all get the
                same metrics: None for all ranks, False for this one alone.
            path: an npz file that is whole after every point. The same call goes on from what an interrupted one left
                there; a call for other weights, points, metrics (functions by their names), loaders' lengths or buffers
                is refused. Of several ranks the first reads and writes it.
            progress: show a bar, on the first rank.

        At every point torch's generators start from the same state, so a loader that shuffles or augments by them
        yields the same batches everywhere, and a run that was interrupted gives the same bits as one that was not.

        Raises:
            TypeError, ValueError, NotImplementedError: an argument is not as above, the model has other parameters
                than the plane, a loader is empty, or a loss is no scalar. What loaders, losses and the model raise
                comes through.
        """
        caller = "Plane.evaluate"
        shape = check_points(caller, points, 2)
        left, right, bottom, top = check_margin(caller, margin, 4)
        arguments = {
            "loss_fn": loss_fn, "metrics": metrics, "bn_loader": bn_loader, "recalibrate": recalibrate,
            "subset": subset, "device": device, "process_group": process_group, "path": path, "progress": progress,
        }  # fmt: skip
        walk = Walk(caller, model, loader, **arguments)
        here = self._on(walk)
        if not isinstance(trajectories, Mapping | None):
            wanted = "a mapping from labels to Curves or lists of networks"
            raise TypeError(f"{caller}: trajectories must be {wanted}, got {type(trajectories).__name__}")
        seen = {label: self.trajectory(t, model=model) for label, t in (trajectories or {}).items()}
        xs, ys = axis(*self.box[0], shape[0], (left, right)), axis(*self.box[1], shape[1], (bottom, top))
        grid = {"points": shape, "margin": (left, right, bottom, top)}
        surface = Surface(xs, ys, dict(self.marks), self.trajectories | seen)
        surface.identity = walk.identity([self._origin, self._u, self._v], grid)
        places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]
        walk.run(surface, places, lambda place: here.weights(xs[place[0]].item(), ys[place[1]].item()))
        return surface

    def _on(self, walk: Walk) -> Self:
        """This plane on the devices of a walk's model."""
        here = object.__new__(type(self))
        here.__dict__ |= self.__dict__
        here._origin, here._u, here._v = walk.here(self._origin), walk.here(self._u), walk.here(self._v)
        return here
