"""What was measured along a curve: numbers, a table, a picture, and dnn-mode-connectivity's file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from losssurf_fast import peer_fields
from losssurf_fast.figures import finish, new_figure, note_without_values
from losssurf_fast.files import load_arrays, save_arrays

_STATISTICS = {"min": "min", "max": "max", "avg": "mean", "int": "integral"}
_PEERS = {
    "loaders": np.array(["train", "test"]),
    "metrics": np.array(["loss", "nll", "error"]),
    "weight_decay": np.array(np.nan),
}
_OWN = ("ts", "dl", "norms", "weight_decay", "loaders", "metrics")


@dataclass(frozen=True, eq=False)  # arrays have no one answer
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
        """How far the path rises above the higher one of its ends (the first and last point); at least 0.

        (Not above the straight line between the ends' values, from which some papers measure it.)
        """
        return self.max - max(float(self.values[0]), float(self.values[-1]))


@dataclass(frozen=True, eq=False)
class CurveReport:
    """What :func:`losssurf_fast.evaluate_curve` found.

    ``report["test"]["error"]`` is a :class:`Profile`, with ``.values``, ``.min``, ``.max``, ``.mean``, ``.integral``
    and ``.barrier``. Errors are fractions here, percent in print, in pictures and in files.

    Attributes:
        ts: ``[T]`` places on the curve.
        dl: ``[T]`` distances between a point and the one before, over parameters; ``dl[0]`` is 0.
        norms: ``[T]`` lengths of the vectors w(t); NaN where a file does not say.
        values: by loader and metric ``[T]``: "loss" with the L2 term; "nll" (dnn-mode-connectivity's word) without,
            whatever ``loss_fn`` is; "error" where targets were class labels; and the extra metrics.
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

    def __str__(self) -> str:
        """A table of all profiles, errors in percent; without L2 term nll is the loss and not shown."""
        line = "{:22s}{:>10s}{:>10s}{:>10s}{:>10s}{:>10s}{:>10s}{:>10s}".format
        rows = [line("", "start", "end", "min", "max", "mean", "integral", "barrier")]
        for loader in self.values:
            for metric, profile in self[loader].items():
                if metric == "nll" and self.weight_decay == 0:
                    continue
                unit, factor = (" (%)", 100) if metric == "error" else ("", 1)
                ends = profile.values[0], profile.values[-1]
                found = *ends, profile.min, profile.max, profile.mean, profile.integral, profile.barrier
                rows.append(line(f"{loader} {metric}{unit}", *(f"{factor * value:.4g}" for value in found)))
        norms = "" if np.isnan(self.norms).all() else f", |w| from {self.norms.min():.4g} to {self.norms.max():.4g}"
        return "\n".join([f"{len(self.ts)} points on a path of length {self.length:.4g}{norms}", *rows])

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz file, atomically, with the names of dnn-mode-connectivity's curve.npz.

        ``ts``, ``dl``, and with the prefix ``tr_`` for the loader "train", ``te_`` for "test" and the own name for any
        other: ``loss``, ``nll``, ``err`` and ``acc`` (in percent) and the extra metrics under their names, each but
        ``acc`` with ``_min``, ``_max``, ``_avg`` and ``_int``, the integral; an extra metric "acc" stands in its own
        unit in place of that of the error. Besides: ``norms``, ``weight_decay``, and the names ``loaders`` and
        ``metrics``.
        """
        arrays = {"ts": self.ts, "dl": self.dl, "norms": self.norms, "weight_decay": np.array(self.weight_decay)}
        metrics = list(dict.fromkeys(metric for found in self.values.values() for metric in found))
        arrays |= {"loaders": np.array(list(self.values), str), "metrics": np.array(metrics, str)}
        for loader in self.values:
            for metric, profile in self[loader].items():
                field, found = peer_fields.field(loader, metric), peer_fields.fields(loader, metric, profile.values)
                profile = Profile(found[field], self.dl)
                arrays = found | arrays | {field: profile.values}
                arrays |= {f"{field}_{s}": np.array(getattr(profile, name)) for s, name in _STATISTICS.items()}
        save_arrays(arrays, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CurveReport":
        """Read a file of :meth:`save`, or a curve.npz of dnn-mode-connectivity.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        arrays = own = load_arrays("CurveReport.load", path)
        points = np.shape(arrays.get("ts"))
        arrays = {**_PEERS, "norms": np.full(points, np.nan), **arrays}  # what the peer's file does not say
        names = {"loaders": ("U", 1), "metrics": ("U", 1), "weight_decay": ("f", 0)}
        for field, (kind, dim) in names.items():
            if arrays[field].dtype.kind != kind or arrays[field].ndim != dim:
                raise ValueError(f"CurveReport.load: {path} is no file of a CurveReport: its {field} is none")
        loaders, metrics = arrays["loaders"].tolist(), arrays["metrics"].tolist()
        fields = {loader: {metric: peer_fields.field(loader, metric) for metric in metrics} for loader in loaders}
        used = [field for found in fields.values() for field in found.values() if field in arrays]
        for field in ("ts", "dl", "norms", *used):
            found = arrays.get(field)
            if found is None or found.ndim != 1 or found.shape != points or found.dtype.kind != "f":
                raise ValueError(f"CurveReport.load: {path} is no file of a CurveReport: its {field} is not [T] floats")
        values = {
            loader: {m: arrays[f] / 100 if m == "error" else arrays[f] for m, f in found.items() if f in arrays}
            for loader, found in fields.items()
        }
        values = {loader: found for loader, found in values.items() if found}
        for loader in values if "norms" not in own else loaders:
            for metric in ("loss", "nll"):
                if metric not in values.get(loader, {}):
                    lacks = f"lacks {peer_fields.field(loader, metric)}"
                    raise ValueError(f"CurveReport.load: {path} is no file of a CurveReport: it {lacks}")
        return cls(arrays["ts"], arrays["dl"], arrays["norms"], values, float(arrays["weight_decay"]))

    def plot(self, path: str | os.PathLike | None = None, *, along: str = "t", metrics: Sequence[str] | None = None):
        """A picture of the profiles, with their lowest and highest points; a matplotlib figure.

        Args:
            path: where to save it, in the format of its suffix.
            along: "t" or "length", the distance from the start.
            metrics: a panel for each; None for the loss (that with the L2 term) and the error.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        if along not in ("t", "length"):
            raise ValueError(f"CurveReport.plot: along must be 't' or 'length', got {along!r}")
        known = list(dict.fromkeys(metric for found in self.values.values() for metric in found))
        metrics = [m for m in ("loss", "error") if m in known] if metrics is None else metrics
        if isinstance(metrics, str) or not metrics or not set(metrics) <= set(known):
            raise ValueError(f"CurveReport.plot: metrics must be a list of some of {known}, got {metrics!r}")
        x = self.ts if along == "t" else np.cumsum(self.dl)
        figure = new_figure(3.6 * len(metrics) + 0.4, 3.3)
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            self._panel(axes, x, metric)
            axes.set_xlabel("t" if along == "t" else "distance from the start along the path")
        handles = {h.get_label(): h for axes in panels for h in axes.get_lines() if not h.get_label().startswith("_")}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
        )
        return finish(figure, path)

    def _panel(self, axes, x: np.ndarray, metric: str) -> None:
        factor = 100 if metric == "error" else 1
        shown = [found[metric] for found in self.values.values() if metric in found]
        note_without_values(axes, shown)
        for number, loader in enumerate(self.values):
            if metric not in self.values[loader]:
                continue
            values, colour = factor * self.values[loader][metric], f"C{number}"
            axes.plot(x, values, color=colour, lw=1.8, label=loader)
            finite = np.where(np.isfinite(values), values, np.nan)
            if np.isfinite(values).any():
                for marker, i, above in (("v", np.nanargmin(finite), -1), ("^", np.nanargmax(finite), 1)):
                    axes.plot(x[i], values[i], marker, color=colour, ms=6, clip_on=False)
                    place = (x[i] - x[0]) / (x[-1] - x[0])  # near an end a centred label would lie on the axis
                    side, beside = ("left", 4) if place < 0.08 else ("right", -4) if place > 0.92 else ("center", 0)
                    axes.annotate(
                        f"{values[i]:.3g}", (x[i], values[i]), (beside, 6 * above), textcoords="offset points", ha=side,
                        va="bottom" if above > 0 else "top", color=colour, fontsize=8,
                    )  # fmt: skip
        title = "loss with the L2 term" if metric == "loss" and self.weight_decay > 0 else metric
        axes.set_title("error (%)" if metric == "error" else title, fontsize=11)
        axes.set_xlim(x[0], x[-1])
        axes.margins(y=0.15)


def check_names(caller: str, loaders: Iterable[str], metrics: Iterable[str]) -> None:
    """Refuse names of which two would be one field of a file.

    Raises:
        TypeError, ValueError: they are no strings, or collide.
    """
    seen = set(_OWN)
    for loader in loaders:
        for metric in ("loss", "nll", "error", *(m for m in metrics if m != "error")):
            if not isinstance(loader, str) or not isinstance(metric, str):
                raise TypeError(f"{caller}: loaders and metrics must have strings as names, got {loader!r}, {metric!r}")
            field = peer_fields.field(loader, metric)
            fields = {field, *(f"{field}_{s}" for s in _STATISTICS)}
            if seen & fields:
                raise ValueError(f"{caller}: two results would be called {min(seen & fields)!r}; rename {metric!r}")
            seen |= fields
