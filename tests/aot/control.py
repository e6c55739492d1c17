"""A kernel that must break the limits: the checks of ``test_triton_aot.py`` have to see it."""

import triton
import triton.language as tl

from aot import Case
from losssurf_fast.ops.noise_triton import EXACT


@triton.jit
def _serialised_kernel(x_ptr, w_ptr, y_ptr, K, BLOCK: tl.constexpr):
    """Two accumulators in the order that ptxas serialises on sm_90: the check below must see it."""
    offs = tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK, BLOCK), tl.float32)
    second = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + offs[:, None] * K + k + offs[None, :])
        w = tl.load(w_ptr + offs[:, None] * K + k + offs[None, :])
        first = tl.dot(x * x, w.T, first)
        second = tl.dot(x, w.T, second)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], first + second)


def cases(arch: int) -> list[Case]:
    pointers = {"x_ptr": "bf16", "w_ptr": "bf16", "y_ptr": "fp32"}
    return [Case("control: serialised", _serialised_kernel, pointers, {"BLOCK": 64}, EXACT)]
