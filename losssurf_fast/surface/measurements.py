"""What a walk through weight space has measured, in memory and in a file that is whole after every point."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from losssurf_fast.files import load_arrays, save_arrays

_VALUES = "values."
_KINDS = ("Surface", "Line", "Rays")


def reading(metric: str) -> tuple[str, int]:
    """A metric's name as a person reads it, and the factor of its values: errors are in percent."""
    name = metric.replace("_", " ")
    return (f"{name} (%)", 100) if name.endswith("error") else (name, 1)


@dataclass(eq=False)
class Measurements:
    """Metrics at the points of a grid; a subclass says in its other fields, all of them arrays, where those lie.

    Attributes:
        values: arrays of the grid's shape by the metric's name, float64; NaN where not ``done``. One loader's metrics
            are called "loss", "error" and as ``metrics`` calls them; those of loaders by name, such as "train", have
            it before: "train_loss". Errors are fractions here, percent in print and in pictures.
        done: which points have been measured.
        identity: what was measured, by key: a run that differs in one of them is another run.
    """

    kind: ClassVar[str]

    values: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    done: np.ndarray = field(default=None, kw_only=True)
    identity: dict[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if self.done is None:
            self.done = np.zeros(self.shape, dtype=bool)

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """The subclass's own fields for the file."""
        raise NotImplementedError

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of :meth:`arrays`, which may read ``arrays`` that it does not know."""
        raise NotImplementedError

    def extra_arrays(self) -> dict[str, np.ndarray]:
        """Fields of the file for other readers, which are not read back."""
        return {}

    def heading(self) -> str:
        """What and where was measured, in a line."""
        raise NotImplementedError

    def summary(self, metric: str) -> dict[str, float]:
        """Numbers that a metric comes down to, in its unit, by name."""
        values = self.values[metric]
        return {"min": float(np.min(values)), "max": float(np.max(values))}

    def __str__(self) -> str:
        """A table of all metrics, errors in percent."""
        rows = {metric: self.summary(metric) for metric in self.values}
        columns = [*next(iter(rows.values()), ())]
        lines = [self.heading(), f"{'':22s}" + "".join(f"{column[:11]:>12s}" for column in columns)]
        for metric, found in rows.items():
            name, factor = reading(metric)
            lines.append(f"{name:22s}" + "".join(f"{factor * value:12.4g}" for value in found.values()))
        return "\n".join(lines)

    def metric(self, caller: str, name: str | None) -> str:
        """The name of a metric that there is; None is the first."""
        if name is not None and name not in self.values:
            raise ValueError(f"{self.kind}.{caller}: metric must be one of {', '.join(self.values)}, got {name!r}")
        return next(iter(self.values)) if name is None else name

    def add(self, caller: str, place: tuple, found: Mapping[str, float]) -> None:
        """Take in what was found at a point, or at several points that are one."""
        if not self.done.any():
            self.values = {name: np.full(self.shape, np.nan) for name in found}
        if found.keys() != self.values.keys():
            raise ValueError(
                f"{caller}: every point must have the metrics {', '.join(self.values)}, got {', '.join(found)}"
            )
        for name, value in found.items():
            self.values[name][place] = value
        self.done[place] = True

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz file of numbers and strings, atomically; :meth:`load` reads it."""
        save_arrays(
            {
                "kind": np.array(self.kind),
                "identity": np.array(json.dumps(self.identity)),
                "done": self.done,
                **self.arrays(),
                **{_VALUES + name: values for name, values in self.values.items()},
                **self.extra_arrays(),
            },
            path,
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """What :meth:`save` wrote, or a run with ``path=`` that has come to its end.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another kind, or of a run that has not come to its end.
        """
        caller = f"{cls.kind}.load"
        found = cls._read(caller, path)
        if not found.done.all():
            raise ValueError(
                f"{caller}: {path} holds {found.done.sum()} of {found.done.size} points; make the same call with "
                "path= again, and it measures the others"
            )
        return found

    @classmethod
    def _read(cls, caller: str, path: str | os.PathLike) -> Self:
        arrays = load_arrays(caller, path)
        kind = str(arrays["kind"]) if "kind" in arrays else None
        if kind != cls.kind:
            held = f"a {kind}" if kind in _KINDS else "none"
            raise ValueError(f"{caller}: {path} must hold a {cls.kind}, it holds {held}")
        try:
            values = {n.removeprefix(_VALUES): a for n, a in arrays.items() if n.startswith(_VALUES)}
            found = cls.from_arrays(arrays)
            found.done, found.values, found.identity = arrays["done"], values, json.loads(str(arrays["identity"]))
        except (KeyError, ValueError, TypeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{caller}: {path} is damaged: {what}") from error
        for name, a in {"done": found.done, **values}.items():
            if a.shape != found.shape:
                raise ValueError(f"{caller}: {path} is damaged: {name} has shape {a.shape}, not {found.shape}")
        return found

    def resume(self, caller: str, path: str | os.PathLike) -> None:
        """Take over what an interrupted run of the same identity left in ``path``, or begin that file.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        if not os.path.exists(path):
            self.save(path)  # a place that cannot be written to fails here, not after hours
            return
        before = self._read(caller, path)
        if self.identity and not before.identity:
            raise ValueError(
                f"{caller}: path {path} holds what save() wrote of a call without path, which does not say what it "
                "was of; give another path, or remove the file"
            )
        differing = [k for k in self.identity if before.identity.get(k) != self.identity[k]]
        if differing:
            raise ValueError(
                f"{caller}: path {path} holds another run, which differs in {', '.join(differing)}; "
                "give another path, or remove the file"
            )
        if before.shape != self.shape:
            raise ValueError(f"{caller}: {path} is damaged: it has shape {before.shape}, not {self.shape}")
        self.values, self.done = before.values, before.done
        self.save(path)  # labels and trajectories may be others
