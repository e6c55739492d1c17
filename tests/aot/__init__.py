"""Every Triton kernel compiled ahead of time for one GPU architecture, and what came out.

    python tests/aot 90

prints one JSON line per case. It needs no GPU, but a process of its own per architecture (Triton's lowering remembers
the first one) and no interpreter. ``test_triton_aot.py`` checks the lines.

A family is one file here with ``cases(arch: int) -> list[Case]``; it is found by itself.
"""

import importlib
import math
import pkgutil
from dataclasses import dataclass, field, replace

import torch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Case:
    """One kernel in one configuration; arguments are pointers (``*_ptr``), constants or sizes."""

    name: str
    kernel: object
    pointers: dict[str, str]  # those left out are None
    constants: dict[str, object]
    options: dict[str, object] = field(default_factory=dict)
    budget: int = 255  # registers
    mma: int = 0  # at least so many tensor-core instructions; none at all where it is 0
    drains: int = 0  # at most so many waits for all of wgmma in a loop
    per_element: float = math.inf  # at most so many instructions for an element of the tile
    wide_copies: bool = False  # every copy to shared memory is asynchronous and of 16 bytes
    wide_accesses: tuple[int, int] = (0, 0)  # at least so many loads and stores of global memory are of 16 bytes


def mma_of(x_type: torch.dtype, operand: torch.dtype, block_k: int, dots: int) -> int:
    """Tensor-core instructions for ``dots`` of operands with ``block_k`` in a row, at least: each takes 32 bytes of it.

    Where inputs are fp32 there are three products in TF32.
    """
    return dots * (3 if x_type == torch.float32 else 1) * block_k * operand.itemsize // 32


def sizes_one(case: Case, **constants) -> Case:
    """``case`` where sizes are 1: Triton makes those constants, and a constant is not a tensor."""
    return replace(
        case,
        name=f"{case.name}, sizes 1",
        constants=case.constants | constants,
        per_element=math.inf,
        wide_copies=False,
        wide_accesses=(0, 0),
    )


def all_cases(arch: int) -> list[Case]:
    """Cases of every family for compute capability ``arch``, 90 for 9.0; one for each name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [case for module in modules if hasattr(module, "cases") for case in module.cases(arch)]
    return list({case.name: case for case in found}.values())  # several numbers of rows may share a tile
