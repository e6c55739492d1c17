"""Checks of numbers among the arguments of what evaluates networks."""

import math


def check_int(caller: str, argument: str, value, least: int) -> int:
    """``value`` if it is an int of at least ``least``.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {argument} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{caller}: {argument} must be at least {least}, got {value}")
    return value


def check_number(caller: str, argument: str, value, *, positive: bool = False, least: float = -math.inf) -> float:
    """``value`` as a float if it is finite, and positive or at least ``least``.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: {argument} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < least or (positive and value <= 0):
        range_ = "positive and finite" if positive else "finite" if least == -math.inf else f"finite, at least {least}"
        raise ValueError(f"{caller}: {argument} must be {range_}, got {value}")
    return float(value)
