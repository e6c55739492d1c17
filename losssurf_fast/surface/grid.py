"""Where the points of a walk lie along an axis."""

import math
from collections.abc import Sequence

import numpy as np


def check_points(caller: str, points, axes: int) -> tuple[int, ...]:
    """``points`` as one number for each axis, at least 2."""
    if isinstance(points, int):
        points = (points,) * axes
    if isinstance(points, str) or not isinstance(points, Sequence) or len(points) != axes:
        wanted = "an int" if axes == 1 else f"an int or {axes} of them"
        raise TypeError(f"{caller}: points must be {wanted}, got {points!r}")
    for number in points:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{caller}: points must be an int, got {type(number).__name__}")
        if number < 2:
            raise ValueError(f"{caller}: points must be at least 2, got {number}")
    return tuple(points)


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


def check_number(caller: str, argument: str, value, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: {argument} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{caller}: {argument} must be {'positive and ' if positive else ''}finite, got {value}")
    return float(value)


def check_seed(caller: str, seed) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{caller}: seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{caller}: seed must fit in 64 bits, got {seed}")


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
