"""Cases of ``ops/kl_triton.py``."""

import itertools

from aot import Case
from losssurf_fast.ops import kl_triton
from losssurf_fast.ops.noise_triton import EXACT


def cases(arch: int) -> list[Case]:
    found = []
    for t in ("bf16", "fp32"):
        alpha = {"param_ptr": t, "slope_ptr": t, "partial_ptr": "fp64"}
        both = alpha | {"weight_ptr": t, "slope_weight_ptr": t}
        constants = {"LIMIT": 3.4e38, "WEIGHT_LIMIT": 3.4e38, "BLOCK": kl_triton.ELEMENTS}
        for divergence, pointers in itertools.product(("exact", "approximate", "ard", "normal"), (alpha, both)):
            name = f"kl {divergence} {t} {len(pointers)} pointers"
            choices = constants | {"DIVERGENCE": divergence}
            found += [Case(name, kl_triton._kl_kernel, pointers, choices, EXACT, 64, per_element=200)]
        found += [
            Case(f"kl_scale {t}", kl_triton._kl_scale_kernel, {"slope_ptr": t, "grad_ptr": "fp32", "out_ptr": t},
                 {"BLOCK": kl_triton.ELEMENTS}, {}, 24, per_element=16),
        ]  # fmt: skip
    return found
