"""What was measured of a model's predictions: numbers, a table, a file, and the reliability diagram."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from losssurf_fast.files import load_arrays, save_arrays

MEANS = ("nll", "brier", "predictive_entropy", "mutual_information")  # over samples
_PRINTED = (
    ("samples", "num_samples", 1),
    ("accuracy (%)", "accuracy", 100),
    ("NLL", "nll", 1),
    ("Brier score", "brier", 1),
    ("ECE (%)", "ece", 100),
    ("predictive entropy", "predictive_entropy", 1),
    ("mutual information", "mutual_information", 1),
)


@dataclass(frozen=True, eq=False)  # arrays have no one answer
class UncertaintyReport:
    """What :class:`losssurf_fast.UncertaintyMetrics` found; that module has the formulas.

    Accuracy and ECE are fractions here, percent in print.

    Attributes:
        num_samples: how many targets were counted.
        bin_counts: ``[B]`` samples whose confidence lies in the bin.
        bin_accuracy, bin_confidence: ``[B]`` their means; NaN in an empty bin.
    """

    num_samples: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    predictive_entropy: float
    mutual_information: float
    bin_counts: np.ndarray
    bin_accuracy: np.ndarray
    bin_confidence: np.ndarray

    @classmethod
    def of_sums(
        cls, caller: str, sums: Sequence[float], counts: np.ndarray, correct: np.ndarray, confidence: np.ndarray
    ) -> "UncertaintyReport":
        """From the sums of ``MEANS``, and ``[B]`` those of the samples, the right ones and confidences of each bin."""
        samples = counts.sum()
        if samples == 0:
            raise ValueError(f"{caller}: there must be at least one sample that is not ignored, got none")
        divided = lambda values: np.divide(values, counts, out=np.full_like(values, np.nan), where=counts > 0)
        return cls(
            num_samples=int(samples),
            accuracy=float(correct.sum() / samples),
            ece=float(np.abs(correct - confidence).sum() / samples),
            bin_counts=counts.astype(np.int64),
            bin_accuracy=divided(correct),
            bin_confidence=divided(confidence),
            **{name: total / samples for name, total in zip(MEANS, map(float, sums), strict=True)},
        )

    def __str__(self) -> str:
        values = ((title, factor * getattr(self, name)) for title, name, factor in _PRINTED)
        return "\n".join(f"{t:20s}{v:>12d}" if isinstance(v, int) else f"{t:20s}{v:>12.4g}" for t, v in values)

    def plot(self, path: str | os.PathLike | None = None):
        """The reliability diagram: accuracy over confidence, and the share of samples in each bin.

        Args:
            path: where to save it, in the format of its suffix.

        Returns:
            A ``matplotlib.figure.Figure``.
        """
        from losssurf_fast.uncertainty.reliability import reliability_figure

        return reliability_figure(self, path)

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz file of all attributes, atomically."""
        save_arrays({field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "UncertaintyReport":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is damaged or another's.
        """
        arrays = load_arrays("UncertaintyReport.load", path)
        names = {field.name for field in fields(cls)}
        if set(arrays) != names:
            raise ValueError(f"UncertaintyReport.load: {path} must have {sorted(names)}, got {sorted(arrays)}")
        for name, value in arrays.items():
            if value.dtype.kind not in "if":
                raise ValueError(f"UncertaintyReport.load: {name} in {path} must hold numbers, got {value.dtype}")
        return cls(**{name: value.item() if value.ndim == 0 else value for name, value in arrays.items()})
