"""Cases of ``ops/noise_triton.py``."""

from aot import Case
from losssurf_fast.ops import noise_triton
from losssurf_fast.ops.noise_triton import EXACT

TILE = {"SHIFT": 0, "BLOCK_M": 8, "BLOCK_N": 128}


def cases(arch: int) -> list[Case]:
    return [
        Case(f"philox_normal {t}", noise_triton._philox_normal_kernel, {"out_ptr": t, "seed_ptr": "i64"}, TILE, EXACT,
             40, per_element=53) for t in ("bf16", "fp32")
    ]  # fmt: skip
