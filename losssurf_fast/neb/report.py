"""What an AutoNEB run found: the loss along the path, and how it came down."""

import os
from dataclasses import asdict, dataclass, field, replace

from losssurf_fast.curve import Curve
from losssurf_fast.files import load_state, save_state

_FORMAT = "NEBReport 1"


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

    Raises:
        RuntimeError: by what asks for losses, before the first cycle.
    """

    points: dict[str, list[float]] = field(default_factory=dict)
    subsample: int = 0
    lengths: list[float] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)

    @property
    def saddle(self) -> float:
        """The highest loss on the path."""
        return max(self._losses)

    @property
    def saddle_t(self) -> float:
        """Where on the curve it is."""
        i = self._losses.index(self.saddle)
        return self.points["t"][i]

    @property
    def length(self) -> float:
        return sum(self.lengths)

    @property
    def pivot_losses(self) -> list[float]:
        return self._losses[:: self.subsample + 1]

    @property
    def _losses(self) -> list[float]:
        if not self.points:
            raise RuntimeError("NEBReport: no losses are known before the first cycle")
        return self.points["loss"]

    def reversed(self) -> "NEBReport":
        """Of the same path from its end to its start."""
        points = {name: values[::-1] for name, values in self.points.items()}
        points["t"] = [1 - t for t in points["t"]]
        places = [1 - place for place in self.places[::-1]]
        return replace(self, points=points, lengths=self.lengths[::-1], places=places)

    def state(self) -> dict:
        """What files hold of it."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_state(cls, caller: str, state, where: str) -> "NEBReport":
        """A report from its :meth:`state`, which was read at ``where``.

        Raises:
            ValueError: it is none.
        """
        if not _is_state(state):
            raise ValueError(f"{caller}: {where} holds no NEBReport")
        return cls(**{name: value for name, value in state.items() if name != "format"})

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, atomically."""
        save_state(self.state(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "NEBReport":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged or holds something else.
        """
        return cls.from_state("NEBReport.load", load_state("NEBReport.load", path), str(path))

    def plot(self, path: str | os.PathLike | None = None):
        """The loss along the path, with its pivots, and the saddle after each cycle; a figure, saved to ``path``."""
        from losssurf_fast.neb.plots import along_and_cycles

        return along_and_cycles(self, path)


def _is_state(state) -> bool:
    numbers = lambda values: isinstance(values, list) and all(isinstance(n, int | float) for n in values)
    match state:
        case {
            "format": str(kind), "points": dict(points), "subsample": int(subsample), "lengths": lengths,
            "places": places, "history": list(history), **others,
        }:  # fmt: skip
            sizes = {len(values) for values in points.values() if numbers(values)}
            measured = {"t", "loss"} <= points.keys() and len(sizes) == 1 and 0 not in sizes
            return (
                kind == _FORMAT
                and not others
                and subsample >= 0
                and all(map(numbers, (*points.values(), lengths, places)))
                and all(isinstance(entry, dict) and isinstance(entry.get("cycle"), dict) for entry in history)
                and (measured or not (points or history))
            )
    return False


def report_of(caller: str, argument: str, curve: Curve) -> NEBReport:
    """What :func:`losssurf_fast.auto_neb` found about its curve.

    Raises:
        TypeError: it is no such curve.
    """
    if not isinstance(curve, Curve):
        raise TypeError(f"{caller}: {argument} must be a curve from auto_neb, got {type(curve).__name__}")
    report = getattr(curve, "report", None)
    if not isinstance(report, NEBReport):
        raise TypeError(f"{caller}: {argument} must be a curve from auto_neb, got one without its report")
    return report
