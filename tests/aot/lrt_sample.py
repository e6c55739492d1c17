"""Cases of ``ops/lrt_sample_triton.py``, the epilogue of linear layers and convolutions, and its backward."""

from dataclasses import replace

from aot import Case, sizes_one
from aot.noise import TILE
from losssurf_fast.ops import lrt_sample_triton
from losssurf_fast.ops.noise_triton import EXACT

# Instructions for an element, forward and backward. By a model of an H200, 41 would take as long as the 6 bytes of an
# element in bf16.
PER_ELEMENT = {"linear": (42, 50), "contiguous": (48, 56), "channels_last": (53, 61)}
FORMATS = {"linear": TILE, "contiguous": TILE, "channels_last": {"SHIFT": 0, "BLOCK_M": 128, "BLOCK_N": 8}}


def cases(arch: int) -> list[Case]:
    found = []
    for t in ("bf16", "fp32"):
        streams = {"mean_ptr": t, "var_ptr": t, "scale_ptr": "fp32", "bias_ptr": t, "seed_ptr": "i64", "y_ptr": t}
        grads = {"grad_ptr": t, "var_ptr": t, "scale_ptr": "fp32", "seed_ptr": "i64", "grad_var_ptr": t}
        sums = {"sum_grad_ptr": "fp32", "sum_alpha_ptr": "fp32"}
        for memory_format, tile in FORMATS.items():
            quads = 2 if t == "bf16" and memory_format != "channels_last" else 1
            choices = {**tile, "FORMAT": memory_format, "ALPHA": "neuron", "QUADS": quads}
            per_element = PER_ELEMENT[memory_format]
            wide = (2, 1) if t == "bf16" else (4, 2)  # all of the streams
            forward = Case(f"lrt_sample {memory_format} {t}", lrt_sample_triton._lrt_sample_kernel, streams, choices,
                           EXACT, 80, per_element=per_element[0], wide_accesses=wide)  # fmt: skip
            backward = Case(f"lrt_sample_backward {memory_format} {t}", lrt_sample_triton._lrt_sample_backward_kernel,
                            grads | sums, choices | {"LIMIT": 3.4e38}, EXACT | {"maxnreg": lrt_sample_triton.REGISTERS},
                            lrt_sample_triton.REGISTERS, per_element=per_element[1], wide_accesses=wide)  # fmt: skip
            ones = {"batch": 1, "rows": 1, "cols": 1, "BLOCK_M": 1, "BLOCK_N": 4, "QUADS": 1}
            found += [forward, backward, sizes_one(forward, **ones), sizes_one(backward, **ones)]
            if memory_format == "linear":
                found += others(forward) + others(backward)
    return found


def others(case: Case) -> list[Case]:
    """``case`` with one alpha for all, where means are zero, and with columns that begin inside a quad."""
    streams = ("var_ptr", "seed_ptr", "y_ptr", "grad_ptr", "grad_var_ptr")
    return [
        replace(case, name=f"{case.name}, layer", constants=case.constants | {"ALPHA": "layer"}),
        replace(
            case,
            name=f"{case.name}, variance",
            pointers={name: case.pointers[name] for name in streams if name in case.pointers},
            constants=case.constants | {"ALPHA": "none"},
            per_element=case.per_element - 3,
            wide_accesses=(case.wide_accesses[0] // 2, case.wide_accesses[1]),
        ),
        replace(
            case,
            name=f"{case.name}, shifted",
            constants=case.constants | {"SHIFT": 2, "QUADS": 1},
            per_element=case.per_element + 7,
            wide_accesses=(0, 0),
        ),
    ]
