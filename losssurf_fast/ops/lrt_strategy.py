"""How ``lrt_linear`` runs on a GPU: which strategy for which shape, and which tiles on which architecture.

* ``"two_gemms"``: x^2 and sigma^2 are written, two library GEMMs, one fused pass for alpha, bias, noise and square root.
  At large sizes everything but the GEMMs is under a fifth of the time, so nothing beats the library's GEMM rate.
* ``"dual"``: one Triton kernel with an accumulator for the mean and one for the variance, sigma^2 made on the fly. At
  few rows the time is that of reading the parameters, and it reads them once.

The borders come from a roofline model and the tiles from register and shared-memory counts of compiled code. **No GPU
has tuned either yet** (docs/gpu-status.md). Pure functions of numbers: nothing here touches a device.
"""

from dataclasses import dataclass

import torch

DUAL_MAX_ROWS = 128  # model: 2.4 times as fast at 64 rows, level between 256 and 512
DUAL_MAX_ROWS_FP32 = 64  # three TF32 products per dot, or one: the library's fp32 rate is nearer

# Shared memory of one block, bytes.
_SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448, (11, 0): 232448}
_SHARED_MEMORY_SMALL = 101376  # 8.6, 8.9, 12.0


@dataclass(frozen=True)
class Tile:
    """Block sizes of the dual-accumulator kernel and its launch options."""

    block_m: int
    block_n: int
    block_k: int
    subtiles: int  # parts in which the epilogue draws its noise: all at once would not fit the registers
    num_warps: int
    num_stages: int


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory one block may use on a GPU of compute capability ``capability``."""
    return _SHARED_MEMORY.get(capability, _SHARED_MEMORY_SMALL)


def linear_strategy(
    rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    parameterization: str,
    capability: tuple[int, int],
) -> str:
    """``"two_gemms"`` or ``"dual"`` for x ``[rows, in_features]`` of ``dtype``."""
    if capability < (8, 0) or in_features == 0:
        return "two_gemms"
    if parameterization == "variance" and dtype != torch.float32:
        limit = 2 * DUAL_MAX_ROWS  # half the arithmetic for the same bytes
    else:
        limit = DUAL_MAX_ROWS_FP32 if dtype == torch.float32 else DUAL_MAX_ROWS
    return "dual" if rows <= limit else "two_gemms"


def dual_tile(
    rows: int, dtype: torch.dtype, parameter_bytes: int, capability: tuple[int, int]
) -> Tile:
    """Tile of the dual kernel; ``parameter_bytes`` is what one weight takes, summed over weight and scale."""
    block_m = 16 if rows <= 16 else 64  # wgmma needs 64 rows
    block_n = 32 if rows <= 64 else 64
    block_k = 64 if dtype == torch.float32 or block_n == 64 else 128
    stage = block_k * (block_m * dtype.itemsize + block_n * parameter_bytes)
    stages = max(2, min(4, shared_memory(capability) // stage))
    return Tile(block_m, block_n, block_k, subtiles=1, num_warps=4, num_stages=stages)
