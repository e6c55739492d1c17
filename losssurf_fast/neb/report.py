"""What an AutoNEB run found: the loss along the path, and how it came down."""

import os
from dataclasses import asdict, dataclass, field, replace

from losssurf_fast.files import load_state, save_state


@dataclass
class NEBReport:
    """
    Attributes:
        points: the last cycle's measurements along the path, lists under "t" (place on the curve), "loss" and the names
            of the other metrics.
        subsample: points measured inside each segment: every ``subsample + 1``-th of ``points`` is a pivot.
        lengths: of the segments between pivots, over the trainable parameters.
        places: where the pivots should lie, as shares of the path's length.
        history: for each cycle its settings, the numbers of pivots, the saddle and the path's length.
    """

    points: dict[str, list[float]] = field(default_factory=dict)
    subsample: int = 0
    lengths: list[float] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)

    @property
    def saddle(self) -> float:
        """The highest loss on the path."""
        return max(self.points["loss"])

    @property
    def saddle_t(self) -> float:
        """Where on the curve it is."""
        return self.points["t"][self.points["loss"].index(self.saddle)]

    @property
    def length(self) -> float:
        return sum(self.lengths)

    @property
    def pivot_losses(self) -> list[float]:
        return self.points["loss"][:: self.subsample + 1]

    def reversed(self) -> "NEBReport":
        """Of the same path from its end to its start."""
        points = {name: values[::-1] for name, values in self.points.items()}
        points["t"] = [1 - t for t in points["t"]]
        places = [1 - place for place in self.places[::-1]]
        return replace(self, points=points, lengths=self.lengths[::-1], places=places)

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, atomically."""
        save_state({"format": "NEBReport 1", **asdict(self)}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "NEBReport":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged or holds something else.
        """
        return cls.from_state("NEBReport.load", load_state("NEBReport.load", path), path)

    @classmethod
    def from_state(cls, caller: str, state, path) -> "NEBReport":
        if not isinstance(state, dict) or state.pop("format", None) != "NEBReport 1":
            raise ValueError(f"{caller}: {path} holds no NEBReport")
        try:
            return cls(**state)
        except TypeError as error:
            raise ValueError(f"{caller}: {path} holds no NEBReport: {error}") from None

    def plot(self, path: str | os.PathLike | None = None):
        """The loss along the path, with its pivots, and the saddle after each cycle; a figure, saved to ``path``."""
        from losssurf_fast.neb.plots import along_and_cycles

        return along_and_cycles(self, path)
