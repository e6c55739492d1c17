"""Cases of the dual-accumulator kernels of ``ops/lrt_linear_triton.py`` and ``ops/lrt_linear_backward_triton.py``."""

from dataclasses import replace

import torch
import triton.language as tl

from aot import TYPES, Case, mma_of, sizes_one
from losssurf_fast.ops import lrt_linear_backward_triton, lrt_linear_triton
from losssurf_fast.ops.lrt_operand import operand_dtype
from losssurf_fast.ops.lrt_operand_triton import OUTPUT_ALPHA
from losssurf_fast.ops.lrt_strategy import Tile, dual_tile, parameter_tile
from losssurf_fast.ops.noise_triton import EXACT


def dual_case(kernel, tile: Tile, x_type, parameter_type, parameterization, **constants) -> Case:
    """A dual-accumulator kernel; ``x_type`` is the dtype of activations, ``parameter_type`` that of parameters."""
    x, parameter, operand = TYPES[x_type], TYPES[parameter_type], TYPES[operand_dtype(x_type)]
    pointers = {"seed_ptr": "i64", "var_ptr": operand, "grad_var_ptr": operand}
    pointers |= dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), x)
    pointers |= dict.fromkeys(("weight_ptr", "scale_ptr", "bias_ptr", "grad_weight_ptr", "grad_scale_ptr"), parameter)
    if parameterization == "variance":
        del pointers["weight_ptr"], pointers["grad_weight_ptr"]
    if parameterization == "neuron" and kernel is not lrt_linear_triton._lrt_linear_kernel:
        del pointers["scale_ptr"], pointers["grad_scale_ptr"]
    choices = {
        "PARAMETERIZATION": parameterization, "PRECISION": "tf32" if x_type == torch.float16 else "tf32x3",
        "OPERAND": getattr(tl, str(operand_dtype(x_type)).removeprefix("torch.")), "SHIFT": 0, "EVEN_K": True,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    constants = {key: value for key, value in choices.items() if key in kernel.arg_names} | constants
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **EXACT}
    name = f"{kernel.__name__} {parameterization} {x}/{parameter} {tile.block_m}x{tile.block_n}x{tile.block_k}"
    name += f" w{tile.num_warps} s{tile.num_stages}"
    budget = 192 if x_type == torch.bfloat16 else 240  # TF32 operands take twice the registers
    dots = 1 if parameterization == "variance" else 2
    mma = mma_of(x_type, operand_dtype(x_type), tile.block_k, dots)
    # What is made in registers as a second operand comes to wgmma by shared memory; TF32 operands in either place do.
    drains = 3 * dots if x_type == torch.float32 else dots
    if kernel is lrt_linear_backward_triton._grad_parameters_kernel and x_type != torch.float32:
        drains = 0 if x_type == torch.bfloat16 else 1
    return Case(name, kernel, pointers, constants, options, budget, mma=mma, drains=drains,
                wide_copies=x_type == torch.bfloat16)  # fmt: skip


def ready(case: Case) -> Case:
    """``case`` of the forward where sigma^2 is made ahead of time and loaded."""
    pointers = case.pointers | {"sigma2_ptr": case.pointers["var_ptr"]}
    if case.constants["PARAMETERIZATION"] not in OUTPUT_ALPHA:
        del pointers["scale_ptr"]
    # Where no operand but x^2 is made in registers, all that wgmma reads of the parameters is in shared memory already.
    drains = 0 if pointers["weight_ptr"] == pointers["x_ptr"] == "bf16" else case.drains
    return replace(case, name=f"{case.name}, sigma2 ready", pointers=pointers, drains=drains)


def cases(arch: int) -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    forward, grad_input = lrt_linear_triton._lrt_linear_kernel, lrt_linear_backward_triton._grad_input_kernel
    grad_parameters = lrt_linear_backward_triton._grad_parameters_kernel
    tile = lambda rows, x, parameter: dual_tile(rows, x, parameter, divmod(arch, 10))
    mixes = [(bf16, bf16, "weight"), (bf16, fp32, "weight"), (fp16, fp32, "weight"), (fp32, fp32, "weight")]
    found = []
    for rows in (16, 64, 128):
        for mix in mixes[: 4 if rows <= 64 else 3]:  # the library serves fp32 beyond 64 rows
            kernels = (forward, grad_input) if rows <= 64 else (forward,)
            found += [dual_case(kernel, tile(rows, *mix[:2]), *mix) for kernel in kernels]
    for kernel in (forward, grad_input):
        found += [dual_case(kernel, tile(64, bf16, bf16), bf16, bf16, "neuron")]
    found += [dual_case(grad_parameters, parameter_tile(64, mix[0]), *mix) for mix in mixes]
    found += [dual_case(forward, tile(64, bf16, bf16), bf16, bf16, p) for p in ("additive", "variance")]
    found += [ready(dual_case(forward, tile(rows, *mix[:2]), *mix)) for rows in (16, 64) for mix in mixes]
    found += [ready(dual_case(forward, tile(128, bf16, bf16), bf16, bf16, p)) for p in ("additive", "neuron")]
    odd = dual_case(forward, tile(64, bf16, bf16), bf16, bf16, "additive", EVEN_K=False)
    odd.name += ", odd I"
    ones = [
        sizes_one(dual_case(kernel, tile(1, bf16, bf16), bf16, bf16, "neuron"), M=1, O=1, I=1)
        for kernel in (forward, grad_input, grad_parameters)
    ]
    return [*found, odd, *ones]
