"""Cases of the passes between parameters and GEMMs: ``ops/lrt_operand_triton.py``, the backward of ``lrt_linear``."""

from aot import Case
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
    return found
