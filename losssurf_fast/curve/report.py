"""What was measured along a curve: numbers, a table, a picture, and dnn-mode-connectivity's file."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_SHORT = {"train": "tr", "test": "te"}


@dataclass(frozen=True)
class Profile:
    """One quantity along a curve.

    Attributes:
        values: ``[T]``, one for each point.
        dl: ``[T]``, the points' distances from the one before.
    """

    values: np.ndarray
    dl: np.ndarray

    @property
    def min(self) -> float:
        return float(np.min(self.values))

    @property
    def max(self) -> float:
        return float(np.max(self.values))

    @property
    def mean(self) -> float:
        """Over the points."""
        return float(np.mean(self.values))

    @property
    def integral(self) -> float:
        """The mean over the arc length, by trapezoids: sum (f_i + f_{i-1}) / 2 dl_i / sum dl_i."""
        middles = (self.values[:-1] + self.values[1:]) / 2
        return float(np.sum(middles * self.dl[1:]) / np.sum(self.dl[1:]))

    @property
    def barrier(self) -> float:
        """How far the path rises above the higher one of its ends (the first and last point); at least 0."""
        return self.max - max(float(self.values[0]), float(self.values[-1]))


@dataclass(frozen=True)
class CurveReport:
    """What :func:`losssurf_fast.evaluate_curve` found.

    ``report["test"]["error"]`` is a :class:`Profile`, with ``.values``, ``.min``, ``.max``, ``.mean``, ``.integral``
    and ``.barrier``. Errors are fractions here, percent in print, in pictures and in files.

    Attributes:
        ts: ``[T]`` places on the curve.
        dl: ``[T]`` distances between a point and the one before, over parameters; ``dl[0]`` is 0.
        norms: ``[T]`` lengths of the vectors w(t); NaN where a file does not say.
        values: by loader and metric ``[T]``: "loss" with the L2 term, "nll" without, "error" where targets were class
            labels, and the extra metrics.
        weight_decay: that of the L2 term; NaN where a file does not say.
    """

    ts: np.ndarray
    dl: np.ndarray
    norms: np.ndarray
    values: Mapping[str, Mapping[str, np.ndarray]]
    weight_decay: float

    @property
    def length(self) -> float:
        """The sum of ``dl``: that of the straight lines between the points."""
        return float(np.sum(self.dl))

    def __getitem__(self, loader: str) -> dict[str, Profile]:
        return {metric: Profile(values, self.dl) for metric, values in self.values[loader].items()}
