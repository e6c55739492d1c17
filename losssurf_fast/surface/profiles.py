"""Pictures of lines and rays: metrics over the distance in weight space."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from losssurf_fast.figures import finish, new_figure, note_without_values
from losssurf_fast.surface.contours import shown
from losssurf_fast.surface.line import Line
from losssurf_fast.surface.rays import Rays

_COLOURS = ("#2166ac", "#d7301f", "#1a9850", "#762a83", "#252525")


def line_figure(line: Line, path: str | os.PathLike | None, metrics: Sequence[str] | None, *, log: bool):
    panels: dict[str, list[str]] = {}
    for metric in line.values if metrics is None else metrics:
        line.metric("plot", metric)
        panels.setdefault(metric.rpartition("_")[2], []).append(metric)
    figure = new_figure(4.4 * len(panels), 3.4)
    for axes, group in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.values(), strict=True):
        for metric, colour in zip(group, _COLOURS, strict=False):
            values, name = shown(line, metric)
            loader = metric.rpartition("_")[0].replace("_", " ")
            axes.plot(line.distances, values, color=colour, lw=1.8, label=loader)
        note_without_values(axes, [line.values[metric] for metric in group])
        _ends(axes, line)
        _frame(axes, name if len(group) == 1 else name.removeprefix(loader).strip(), log)
        if len(group) > 1:
            axes.legend(fontsize=8, frameon=False)
    return finish(figure, path)


def _ends(axes, line: Line) -> None:
    for label, at in zip(line.labels, (0.0, line.length), strict=True):
        axes.axvline(at, color="#888888", lw=0.9, ls="--", zorder=1)
        axes.annotate(
            label, (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center",
            fontsize=9, fontweight="bold",
        )  # fmt: skip


def rays_figure(named: Mapping[str, Rays], path: str | os.PathLike | None, metric: str | None, *, log: bool):
    figure = new_figure(5.2, 3.6)
    axes, drawn = figure.add_subplot(), []
    for (label, rays), colour in zip(named.items(), _COLOURS, strict=False):
        values, name = shown(rays, metric)
        drawn.append(values)
        if name.endswith("loss"):
            label = f"{label}: {rays.rise(rays.metric('plot', metric))}"
        axes.plot(rays.distances, values.T, color=colour, lw=0.7, alpha=0.35)
        axes.plot(rays.distances, np.median(values, axis=0), color=colour, lw=2.2, label=label)
    note_without_values(axes, np.concatenate(drawn, axis=None))
    _frame(axes, name, log)
    axes.set_xlim(left=0)
    axes.legend(fontsize=9, frameon=False, title="median of the rays", title_fontsize=8)
    return finish(figure, path)


def _frame(axes, name: str, log: bool) -> None:
    axes.set_xlabel("distance in weight space")
    axes.set_ylabel(name)
    if log:
        axes.set_yscale("log")
