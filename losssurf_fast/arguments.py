"""Checks of numbers and groups among the arguments of what evaluates networks."""

import math

import torch.distributed as dist


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


def check_group(caller: str, process_group) -> None:
    """Refuse what is no process group, None (all ranks) or False (this one alone).

    Raises:
        TypeError: it is none.
    """
    if process_group is None or process_group is False:
        return
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        got = type(process_group).__name__
        raise TypeError(f"{caller}: process_group must be a ProcessGroup, None or False, got {got}")
