"""Cases of ``ops/curve_linear_triton.py``."""

import itertools

import torch

from aot import TYPES, Case, mma_of, sizes_one
from losssurf_fast.ops import curve_linear_triton
from losssurf_fast.ops.lrt_strategy import Tile
from losssurf_fast.ops.noise_triton import EXACT


def curve_case(tile: Tile, x_type, bend_type, bends, per_row=False, biases=None, **constants) -> Case:
    """The kernel of curve_linear; ``x_type`` is the dtype of activations, ``bend_type`` that of bends."""
    x, bend = TYPES[x_type], TYPES[bend_type]
    pointers = {"x_ptr": x, "y_ptr": x, "coefficients_ptr": "fp32", "bias_ptr": bend}
    pointers |= {f"bend{j}_ptr": bend for j in range(bends)}
    choices = {
        "K": bends, "BIASES": bends if biases is None else biases, "PER_ROW": per_row, "PRECISION": "tf32x3",
        "EVEN_K": True, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **EXACT}
    name = f"curve_linear {x}/{bend} {bends} bends{' per row' if per_row else ''} "
    name += f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    budget = 240 if x_type == torch.float32 else 192
    kernel = curve_linear_triton._curve_linear_kernel
    dots = bends if per_row else 1
    mma, drains = mma_of(x_type, x_type, tile.block_k, dots), 3 * dots if x_type == torch.float32 else dots
    return Case(name, kernel, pointers, choices | constants, options, budget, mma=mma, drains=drains,
                wide_copies=x_type == torch.bfloat16)  # fmt: skip


def cases(arch: int) -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    tile = lambda rows, *mix: curve_linear_triton.curve_tile(rows, *mix, divmod(arch, 10))
    found = []
    for rows, mix in itertools.product((16, 64, 128), [(bf16, bf16), (bf16, fp32), (fp16, fp32), (fp32, fp32)]):
        if curve_linear_triton.fused(rows, mix[0], 3, divmod(arch, 10)):
            found += [curve_case(tile(rows, *mix, 3), *mix, 3, per_row) for per_row in (False, True)]
    found += [curve_case(tile(64, bf16, bf16, bends), bf16, bf16, bends) for bends in (5, 8)]
    odd = curve_case(tile(64, bf16, bf16, 3), bf16, bf16, 3, EVEN_K=False)
    odd.name += ", odd I"
    ones = [sizes_one(curve_case(tile(1, bf16, bf16, 3), bf16, bf16, 3, row), M=1, O=1, I=1) for row in (False, True)]
    return [*found, odd, *ones]
