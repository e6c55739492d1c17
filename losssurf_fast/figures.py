"""How pictures are made and saved: without a window, and whole or not at all."""

import os
from pathlib import Path

import numpy as np

from losssurf_fast.files import write_atomically


def new_figure(width: float, height: float):
    """An empty figure of that size in inches, which no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish(figure, path: str | os.PathLike | None = None, *, framed: bool = False):
    """The figure, saved to ``path`` if that is given; unless it is ``framed``, its panels have two sides."""
    for axes in () if framed else figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        save_figure(figure, path)
    return figure


def save_figure(figure, path: str | os.PathLike) -> None:
    """In the format of the path's suffix: png, pdf, svg ...

    Raises:
        ValueError: the path has no such suffix. Nothing is written.
    """
    formats = figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"plot: path must end in .{', .'.join(sorted(formats))}, got {os.fspath(path)!r}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def note_without_values(axes, values) -> None:
    """Say so in a panel that stays empty because none of ``values`` is finite."""
    if not np.isfinite(values).any():
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color="#888888")
