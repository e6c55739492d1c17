"""Where the points of a walk lie along an axis."""

from collections.abc import Sequence

import numpy as np

from losssurf_fast.arguments import check_int, check_number


def check_points(caller: str, points, axes: int) -> tuple[int, ...]:
    """``points`` as one number for each axis, at least 2."""
    if isinstance(points, int):
        points = (points,) * axes
    if isinstance(points, str) or not isinstance(points, Sequence) or len(points) != axes:
        wanted = "an int" if axes == 1 else f"an int or {axes} of them"
        raise TypeError(f"{caller}: points must be {wanted}, got {points!r}")
    return tuple(check_int(caller, "points", number, 2) for number in points)


def check_margin(caller: str, margin, sides: int) -> tuple[float, ...]:
    """``margin`` as one fraction for each side, not negative."""
    if isinstance(margin, int | float):
        margin = (margin,) * sides
    if isinstance(margin, str) or not isinstance(margin, Sequence) or len(margin) != sides:
        raise TypeError(f"{caller}: margin must be a number or {sides} of them, got {margin!r}")
    for fraction in margin:
        check_number(caller, "margin", fraction)
        if fraction < 0:
            raise ValueError(f"{caller}: margin must not be negative, got {fraction}")
    return tuple(float(fraction) for fraction in margin)


def check_labels(caller: str, labels: Sequence[str], number: int) -> tuple[str, ...]:
    if isinstance(labels, str) or len(labels) != number or len(set(labels)) != number:
        raise ValueError(f"{caller}: labels must be {number} different names, got {labels!r}")
    return tuple(labels)


def axis(low: float, high: float, points: int, margins: tuple[float, float]) -> np.ndarray:
    """``points`` equally spaced from ``low`` to ``high``, and beyond by fractions of their distance."""
    extent = high - low
    return np.linspace(low - margins[0] * extent, high + margins[1] * extent, points)


def axis_through_ends(caller: str, points: int, margins: tuple[float, float]) -> np.ndarray:
    """Fractions of the way from 0 to 1 and beyond, 0 and 1 among them: the points next to those are moved there."""
    found = axis(0.0, 1.0, points, margins)
    first, last = np.abs(found).argmin(), np.abs(found - 1).argmin()
    if first == last:
        raise ValueError(f"{caller}: points must be more than {points} for the margin {max(margins)}")
    found[first], found[last] = 0.0, 1.0
    return found
