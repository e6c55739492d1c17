"""Stochastic rounding to block floating point, against the published formula."""

import functools

import torch

from benchmarks.cases import Case, Setup
from losssurf_fast.ops import block_float

WORD_LENGTH = 8
SHAPE, GPU_SHAPE = (1024, 1024), (8192, 8192)


def eager_block_float(x, per_row: bool = False):
    """As the SWALP code has it, with the power of two kept on the device."""
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().max()
    step = torch.exp2(torch.floor(torch.log2(largest)) - (WORD_LENGTH - 2))
    mantissa = torch.floor(x / step + torch.rand_like(x))
    return mantissa.clamp(-(2 ** (WORD_LENGTH - 1)), 2 ** (WORD_LENGTH - 1) - 1) * step


def _setup(shape, block):
    def setup(device: torch.device) -> Setup:
        x = torch.randn(shape, device=device)
        eager = functools.partial(eager_block_float, per_row=block == "row")
        ours = functools.partial(block_float, word_length=WORD_LENGTH, seed=0, block=block)
        out = torch.empty_like(x)
        return Setup((x,), {"eager": eager, "compiled": eager, "ours": ours}, lambda: out.copy_(x))

    return setup


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    shape = (3, 5) if tiny else GPU_SHAPE if device_type == "cuda" else SHAPE
    return [
        Case(
            op="block_float",
            variant=f"{WORD_LENGTH} bits, by {block}",
            shape=shape,
            mode="forward",
            setup=_setup(shape, block),
            bytes=8 * shape[0] * shape[1],
            flops=0,
            headline=block == "tensor",
        )
        for block in ("tensor", "row")
    ]
