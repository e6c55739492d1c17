"""How pictures are made and saved: without a window, and whole or not at all."""

import os
from pathlib import Path

from losssurf_fast.files import write_atomically


def new_figure(width: float, height: float):
    """An empty figure of that size in inches, which no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: str | os.PathLike) -> None:
    """In the format of the path's suffix: png, pdf, svg ...

    Raises:
        ValueError: the path has no such suffix. Nothing is written.
    """
    formats = figure.canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"plot: path must end in .{', .'.join(sorted(formats))}, got {os.fspath(path)!r}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
