"""What is measured: one :class:`Case` per operator, variant, shape, dtype and mode.

A family is one file of this package, named after the module it measures, with a function ``cases(tiny)``; nothing
else has to know of it. ``tiny`` asks for the same cases at sizes of a few elements, for the dry run.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import nn

MODES = ("forward", "backward", "full")  # full = forward and backward
BASELINES = ("eager", "compiled", "torch")
PROVIDERS = (*BASELINES, "ours", "floor")


@dataclass
class Setup:
    """The live half of a case, made anew in the process that measures it.

    Attributes:
        inputs: what every provider is called with; those that require grad are differentiated, together with the
            parameters of a provider that is a module. Parameters are ``nn.Parameter``, activations are not.
        providers: "eager" is what a user writes, "compiled" what ``torch.compile`` is given, "torch" the strongest
            thing the library has where that is neither, "ours" the operator.
        floor: the least work any implementation must do on this machine: the bare GEMMs, or one pass over the bytes.
    """

    inputs: tuple
    providers: dict[str, Callable | nn.Module]
    floor: Callable[[], object]


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    mode: str
    setup: Callable[[torch.device], Setup] = field(compare=False)
    bytes: int  # least memory traffic
    flops: int
    variant: str = ""
    dtype: str = "fp32"
    targets: dict[int, float] = field(default_factory=dict, compare=False)  # threads -> speedup over eager
    saved_target: float | None = None  # bytes saved for backward, as a share of eager's
    headline: bool = False  # --quick measures only these

    @property
    def key(self) -> tuple:
        return (self.op, self.variant, tuple(self.shape), self.dtype, self.mode)

    def __str__(self) -> str:
        return title(self.key)


def title(key: tuple) -> str:
    op, variant, shape, dtype, mode = key
    return " ".join(filter(None, (op, variant, "x".join(map(str, shape)), dtype, mode)))


def families(only: Sequence[str] | None = None) -> list[str]:
    """Families whose module is part of the package, in alphabetical order.

    Raises:
        ValueError: ``only`` names a family that has no cases, or whose module does not exist.
    """
    written = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [name for name in written if _is_module(f"losssurf_fast.{name}") or _is_module(f"losssurf_fast.ops.{name}")]
    for name in only or ():
        if name not in found:
            raise ValueError(f"benchmarks: families are {', '.join(found)}, got {name!r}")
    return [name for name in found if not only or name in only]


def _is_module(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder without files has no origin


def load(family: str, tiny: bool = False) -> list[Case]:
    return importlib.import_module(f"{__name__}.{family}").cases(tiny)


def dtype_of(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
