"""How ``lrt_linear`` and its backward run on a GPU: which strategy for which shape, which tiles on which architecture.

* ``"two_gemms"``: x^2 and sigma^2 are written, two library GEMMs, one fused pass for alpha, bias, noise and root. At
  large sizes everything but the GEMMs is under a fifth of the time, so nothing beats the library's GEMM rate.
* ``"dual"``: one Triton kernel with an accumulator for the mean and one for the variance, sigma^2 made on the fly. At
  few rows the time is that of reading the parameters, and it reads them once.

The borders come from a roofline model and the tiles from register and shared-memory counts of compiled code. **No GPU
has tuned either yet** (docs/gpu-status.md). Pure functions of numbers: nothing here touches a device.
"""

from dataclasses import dataclass

import torch

DUAL_MAX_ROWS = 128  # model: 2.4 times as fast at 64 rows, level between 256 and 512
DUAL_MAX_ROWS_VARIANCE = 256  # "variance" has half the arithmetic for the same bytes
DUAL_MAX_ROWS_FP32 = 64  # each dot is three TF32 products

# Bytes of shared memory that one block may use, where they are more than on every GPU since 8.0.
_SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
_SHARED_MEMORY_OF_ALL = 101376


@dataclass(frozen=True)
class Tile:
    """Block sizes of the dual-accumulator kernel and its launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one block may use on a GPU of compute capability ``capability``."""
    return _SHARED_MEMORY.get(capability, _SHARED_MEMORY_OF_ALL)


def linear_strategy(
    rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    parameterization: str,
    capability: tuple[int, int],
) -> str:
    """``"two_gemms"`` or ``"dual"`` for x ``[rows, in_features]`` of ``dtype`` and y ``[rows, out_features]``."""
    if capability < (8, 0) or 0 in (rows, out_features, in_features):
        return "two_gemms"
    if dtype == torch.float16:  # library GEMMs would run in fp32, at a fraction of the TF32 rate
        return "dual"
    if dtype == torch.float32:
        limit = DUAL_MAX_ROWS_FP32
    else:
        limit = DUAL_MAX_ROWS_VARIANCE if parameterization == "variance" else DUAL_MAX_ROWS
    return "dual" if rows <= limit else "two_gemms"


def dual_tile(rows: int, dtype: torch.dtype, parameter_dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """Tile of the dual kernel for ``rows`` of x in ``dtype``; ``parameter_dtype`` is the widest of the parameters."""
    warpgroup_mma = capability[0] in (9, 10)  # 64 rows at least; elsewhere 64 rows spill registers
    all_bf16 = dtype == parameter_dtype == torch.bfloat16
    num_warps = 4
    if rows <= 16:
        block_m, block_n, block_k = 16, 32, 128 if dtype == torch.bfloat16 else 64
    elif not warpgroup_mma:
        block_m, block_n, block_k = 32, 64, 32 if dtype == torch.float32 else 64
    elif rows <= 64:
        block_m, block_n, block_k = 64, 32, 128 if all_bf16 else 32 if dtype == torch.float32 else 64
    else:
        block_m, block_n, block_k, num_warps = 64, 64, 32 if dtype == torch.float32 else 64, 8
    stage = block_k * (block_m * dtype.itemsize + 2 * block_n * parameter_dtype.itemsize)
    num_stages = max(2, min(4, shared_memory(capability) // stage + 1))  # one fewer buffers than stages
    return Tile(block_m, block_n, block_k, num_warps, num_stages)


def parameter_tile(rows: int, dtype: torch.dtype) -> Tile:
    """Tile ``[block_m of O, block_n of I]`` of the dual kernel for parameter gradients; its loop is over ``rows``."""
    block_k = 32 if rows > 16 and dtype == torch.bfloat16 else 16
    return Tile(64, 64, block_k, num_warps=8, num_stages=3)
