"""The cycles of AutoNEB: how many pivots come where, and how the band is then trained."""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

RULES = ("equal", "highest", "none")
SPACINGS = ("equal", "inserted")


@dataclass(frozen=True)
class Cycle:
    """One cycle: pivots are inserted, the band is trained, and its loss is measured.

    Attributes:
        steps: of the optimizer, each with one batch for the whole band.
        lr, momentum: of SGD.
        insert: "equal" puts ``count`` pivots into every segment, equally spaced; "highest" puts one into each of the
            at most ``count`` segments (all of them if it is None) with the highest deviations, where the loss exceeds
            that interpolated between the segment's ends by most, and by more than ``threshold`` times the range of the
            pivots' losses; "none" inserts none. The first cycle's must be "equal", and the cycle before a "highest" one
            needs a ``subsample``.
        count, threshold: see ``insert``.
        spring: the springs' constant. inf puts the pivots where they belong after every step.
        spacing: "equal" wants equal distances between pivots; "inserted" leaves inserted ones where they came in, so
            that the band stays denser there.
        subsample: points inside each segment at which the loss is measured.
    """

    steps: int = 1000
    lr: float = 0.1
    momentum: float = 0.9
    insert: str = "equal"
    count: int | None = 3
    threshold: float = 0.1
    spring: float = math.inf
    spacing: str = "equal"
    subsample: int = 9

    def __post_init__(self):
        for name, least in (("steps", 0), ("subsample", 0), ("count", 1)):
            value = getattr(self, name)
            if name == "count" and value is None:
                if self.insert == "equal":
                    raise ValueError("Cycle: count must be given for insert='equal', got None")
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Cycle: {name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"Cycle: {name} must be at least {least}, got {value}")
        for name in ("lr", "momentum", "threshold", "spring"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Cycle: {name} must be a number, got {type(value).__name__}")
            if name == "momentum" and not 0 <= value < 1:
                raise ValueError(f"Cycle: momentum must lie in [0, 1), got {value}")
            if not value >= 0:
                raise ValueError(f"Cycle: {name} must be at least 0, got {value}")
            if value == math.inf and name != "spring":
                raise ValueError(f"Cycle: {name} must be finite, got {value}")
        for name, allowed in (("insert", RULES), ("spacing", SPACINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Cycle: {name} must be one of {allowed}, got {getattr(self, name)!r}")


# Those of Draxler et al. for a ResNet-20 on CIFAR-10
CYCLES = (
    {"steps": 1000, "lr": 0.1, "insert": "equal", "count": 3},
    {"insert": "highest", "count": 2},
    {},
    {},
    {"steps": 2000},
    {},
    {"steps": 1000, "lr": 0.01},
    {},
    {},
    {},
    {"lr": 0.001},
    {},
    {},
    {},
)


def read_cycles(caller: str, cycles: Sequence[Mapping | Cycle] | str | os.PathLike) -> list[Cycle]:
    """Cycles from a list of them, of dicts, each of which says what differs from the cycle before, or a JSON file.

    Raises:
        TypeError, ValueError: what is given is none of these, or a cycle's values are not as :class:`Cycle` wants.
        FileNotFoundError: there is no such file.
    """
    if isinstance(cycles, str | os.PathLike):
        with open(cycles) as file:
            try:
                cycles = json.load(file)
            except ValueError as error:
                raise ValueError(f"{caller}: cycles must be a JSON file, {file.name} is none: {error}") from None
    if isinstance(cycles, Mapping) or not isinstance(cycles, Sequence):
        raise TypeError(f"{caller}: cycles must be a list of dicts or Cycles, got {type(cycles).__name__}")
    if not cycles:
        raise ValueError(f"{caller}: cycles must be at least one, got none")
    known, cycle, result = [field.name for field in fields(Cycle)], Cycle(), []
    for i, given in enumerate(cycles):
        if not isinstance(given, Cycle | Mapping):
            raise TypeError(f"{caller}: cycles[{i}] must be a dict or a Cycle, got {type(given).__name__}")
        if isinstance(given, Mapping) and (unknown := [key for key in given if key not in known]):
            raise ValueError(f"{caller}: cycles[{i}] may have {', '.join(known)}; got {unknown[0]!r}")
        try:
            cycle = given if isinstance(given, Cycle) else replace(cycle, **given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{caller}: cycles[{i}]: {error}") from None
        result.append(cycle)
    if result[0].insert != "equal":
        raise ValueError(
            f"{caller}: cycles[0] must have insert='equal', as no loss is known yet; got {result[0].insert!r}"
        )
    for i, (before, cycle) in enumerate(itertools.pairwise(result)):
        if cycle.insert == "highest" and before.subsample == 0:
            raise ValueError(
                f"{caller}: cycles[{i}] must have a subsample of at least 1, as cycles[{i + 1}] inserts where the loss "
                "deviates between pivots; got 0"
            )
    return result


def places_to_insert(cycle: Cycle, pivots: int, losses: Sequence[float], subsample: int):
    """Where ``cycle`` inserts pivots: numbers of segments and shares along them, [n] each, in the order of the band.

    Args:
        pivots: N.
        losses: at the pivots and at ``subsample`` points k inside each segment, (N - 1) (k + 1) + 1 of them; not read
            by the rules that do not ask for them.
    """
    gaps = pivots - 1
    if cycle.insert == "equal":
        along = torch.arange(1, cycle.count + 1, dtype=torch.float64) / (cycle.count + 1)
        return torch.arange(gaps).repeat_interleave(cycle.count), along.repeat(gaps)
    if cycle.insert == "none":
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    losses = torch.tensor(losses, dtype=torch.float64)
    ends = losses[:: subsample + 1]
    along = torch.arange(1, subsample + 1, dtype=torch.float64) / (subsample + 1)
    inside = losses[:-1].view(gaps, subsample + 1)[:, 1:]
    deviation = inside - torch.lerp(ends[:-1, None], ends[1:, None], along)
    highest, at = deviation.max(1)
    relative = highest / (ends.max() - ends.min() + 1e-12)
    chosen = relative.argsort(descending=True, stable=True)[: cycle.count]
    chosen = chosen[relative[chosen] > cycle.threshold].sort().values
    return chosen, along[at[chosen]]
