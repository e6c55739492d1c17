"""Cases of the kernel that makes float8 operands, ``ops/lrt_operand_triton.py``, on architectures that have float8."""

from aot import Case
from losssurf_fast.ops import lrt_operand_triton


def cases(arch: int) -> list[Case]:
    if arch < 89:
        return []
    tile = {"PARAMETERIZATION": "weight", "BLOCK": lrt_operand_triton.ROW_ELEMENTS}
    return [
        Case(f"float8_rows {t}", lrt_operand_triton._float8_rows_kernel,
             {"weight_ptr": t, "scale_ptr": t, "out_ptr": "fp8e4nv", "row_scale_ptr": "fp32"}, tile, {}, 40,
             per_element=48)
        for t in ("bf16", "fp32")
    ]  # fmt: skip
