"""Pictures of a plane: contours at log-spaced levels, the networks and paths in it."""

import itertools
import os
import textwrap

import numpy as np

from losssurf_fast.figures import finish, new_figure
from losssurf_fast.surface.measurements import Measurements, reading
from losssurf_fast.surface.surface import Surface

_COLOURS = "viridis_r"
_PATHS = ("#d7301f", "#c51b8a", "#252525")
_BANDS = 10


def contour_figure(
    surface: Surface, path: str | os.PathLike | None, metric: str | None, *, log: bool, vmax: float | None
):
    width, height = np.ptp(surface.xs), np.ptp(surface.ys)
    figure = new_figure(*_size(height / width))
    draw_contours(figure, figure.add_subplot(), surface, metric, log=log, vmax=vmax)
    return finish(figure, path, framed=True)


def draw_contours(
    figure, axes, surface: Surface, metric: str | None = None, *, log: bool = True, vmax: float | None = None
) -> None:
    """The picture of :meth:`Surface.plot` in one panel of a figure."""
    values, name = shown(surface, metric)
    vmax = None if vmax is None else vmax * (100 if name.endswith("(%)") else 1)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ValueError(f"Surface.plot: {name} has no finite values to show")
    _fill(figure, axes, surface, values, contour_levels(finite, log=log, vmax=vmax), name)
    _draw_paths(axes, surface)
    _draw_marks(axes, surface)
    axes.set_aspect("equal")
    axes.set_xlim(surface.xs[0], surface.xs[-1])
    axes.set_ylim(surface.ys[0], surface.ys[-1])
    axes.set_xlabel("distance in weight space")
    axes.set_ylabel("distance in weight space")
    if surface.trajectories:
        axes.legend(loc="best", fontsize=8, framealpha=0.9)


def shown(measurements: Measurements, metric: str | None) -> tuple[np.ndarray, str]:
    """A metric's array and name as a person reads them: errors in percent."""
    metric = measurements.metric("plot", metric)
    name, factor = reading(metric)
    return factor * measurements.values[metric], name


def contour_levels(finite: np.ndarray, *, log: bool, vmax: float | None) -> np.ndarray:
    """Borders of the bands, growing, in round numbers; the first and the last cover all up to ``vmax``.

    The distances of log levels from the smallest value are in geometric progression; the first takes in about a
    twentieth of the plane.
    """
    low, high = finite.min(), finite.max()
    if vmax is not None and vmax > low:
        high = min(high, vmax)
    span = high - low
    if span <= 1e-12 * max(abs(low), abs(high)):
        return np.array([low, low + max(abs(low), 1.0) * 1e-3])
    if log:
        first = np.clip((np.quantile(finite, 0.05) - low) / span, 1e-3, 0.2)
        levels = low + span * np.geomspace(first, 1.0, _BANDS)
    else:
        levels = low + span * np.linspace(1 / _BANDS, 1.0, _BANDS)
    gaps = np.diff(levels, prepend=low)
    units = 10.0 ** (np.floor(np.log10(gaps)) - 1)  # two digits of the distance to the level below
    levels = np.round(levels / units) * units
    levels[-1] = np.ceil(high / units[-1] - 1e-6) * units[-1]
    return np.unique([np.floor(low / units[0] + 1e-6) * units[0], *levels])


def _size(ratio: float) -> tuple[float, float]:
    """Inches of a figure whose axes are as high as ``ratio`` times their width, without much empty space."""
    width = 6.4 if ratio < 0.45 else 5.0 if ratio <= 1 else max(5.0 / ratio, 2.0)
    return width + 1.6, max(width * ratio, 1.2) + 0.7


def _fill(figure, axes, surface: Surface, values: np.ndarray, levels: np.ndarray, name: str) -> None:
    import matplotlib
    from matplotlib.colors import BoundaryNorm

    colours = matplotlib.colormaps[_COLOURS]
    above = levels[-1] + 10 * (levels[-1] - levels[0])
    clipped = np.ma.masked_invalid(np.where(np.isposinf(values), above, np.minimum(values, above))).T
    extend = "max" if clipped.max() > levels[-1] else "neither"
    norm = BoundaryNorm(levels, colours.N, extend=extend)
    axes.set_facecolor("#d9d9d9")  # where there is no value
    bands = axes.contourf(surface.xs, surface.ys, clipped, levels, cmap=colours, norm=norm, extend=extend)
    axes.contour(surface.xs, surface.ys, clipped, levels[1:], colors="black", linewidths=0.35, alpha=0.5)
    bar = figure.colorbar(bands, ax=axes, spacing="uniform", ticks=levels, pad=0.02)
    bar.ax.set_yticklabels([f"{level:.8g}" for level in levels])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label(name)


def _draw_paths(axes, surface: Surface) -> None:
    for (label, t), colour in zip(surface.trajectories.items(), itertools.cycle(_PATHS), strict=False):
        axes.plot(*t.path[:, :2].T, color="white", lw=3.2, solid_capstyle="round", zorder=3)
        marker = "" if len(t.knots) else "."
        axes.plot(*t.path[:, :2].T, color=colour, lw=1.8, marker=marker, ms=4, label=label, zorder=4)
        if len(t.knots):
            axes.plot(*t.knots[1:-1, :2].T, "s", color=colour, mec="white", ms=5, zorder=5)


def _draw_marks(axes, surface: Surface) -> None:
    from matplotlib.patheffects import withStroke

    near = 0.02 * max(np.ptp(surface.xs), np.ptp(surface.ys))
    places: dict[tuple[float, float], list[str]] = {}
    for label, at in surface.marks.items():
        axes.plot(*at, "o", color="white", mec="black", mew=1.2, ms=7, zorder=6)
        place = next((other for other in places if np.hypot(at[0] - other[0], at[1] - other[1]) < near), at)
        places.setdefault(place, []).append(label)
    middle = (surface.xs[0] + surface.xs[-1]) / 2
    for (x, y), labels in places.items():
        side = -1 if x > middle else 1
        text = textwrap.fill(", ".join(labels), 18, break_long_words=False)  # two of them fit side by side
        axes.annotate(
            text, (x, y), xytext=(7 * side, 6), textcoords="offset points", ha="left" if side > 0 else "right",
            fontsize=10, fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=7,
        )  # fmt: skip
