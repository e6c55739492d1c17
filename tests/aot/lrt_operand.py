"""Cases of the passes between parameters and GEMMs: ``ops/lrt_operand_triton.py``, the backward of ``lrt_linear``."""

from aot import Case, sizes_one
from losssurf_fast.ops import lrt_linear_backward_triton, lrt_operand_triton


def cases(arch: int) -> list[Case]:
    found = []
    for t in ("bf16", "fp32"):
        operands = {"weight_ptr": "fp32", "scale_ptr": "fp32", "cast_ptr": t, "sigma2_ptr": t}
        grads = {"grad_cast_ptr": t, "grad_sigma2_ptr": t, "grad_weight_ptr": "fp32", "grad_scale_ptr": "fp32"}
        found += [
            Case(f"operands {t}", lrt_operand_triton._operands_kernel, operands,
                 {"PARAMETERIZATION": "weight", "BLOCK": lrt_operand_triton.ELEMENTS}, {}, 40,
                 per_element=25),
            Case(f"operands_backward {t}", lrt_linear_backward_triton._operands_backward_kernel, operands | grads,
                 {"BLOCK": lrt_operand_triton.ELEMENTS}, {}, 48, per_element=38),
        ]  # fmt: skip
    return found + (float8_cases() if arch >= 89 else [])


def float8_cases() -> list[Case]:
    """Rows of a tile's part, of a whole tile and of several; sm_80 has no such numbers and is refused."""
    found = []
    for cols in (256, 4096, 16384, 32768):
        tile = lrt_operand_triton.row_tile(cols)
        warps, reads = {"num_warps": tile.pop("num_warps")}, 1 if tile["WHOLE"] else 2
        for kind, t, loads, per_element in (("layer", "bf16", 2, 12), ("weight", "fp32", 8, 12 * reads + 12)):
            pointers = {"weight_ptr": t, "out_ptr": "fp8e4nv", "row_scale_ptr": "fp32"}
            pointers |= {"scale_ptr": "fp32"} if kind == "weight" else {}
            found.append(
                Case(f"float8_rows {kind} {cols}", lrt_operand_triton._float8_rows_kernel, pointers,
                     {"PARAMETERIZATION": kind, **tile}, warps, 56, per_element=per_element,
                     wide_accesses=(reads * loads, 1))
            )  # fmt: skip
    return [*found, sizes_one(found[0], rows=1, cols=1, BLOCK_N=16, BLOCK_M=128)]
