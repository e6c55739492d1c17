"""Compile every Triton kernel ahead of time for one GPU architecture; print what came out, one JSON line per kernel.

    python tests/aot.py 90

needs no GPU, but a process of its own per architecture (Triton's lowering remembers the first one) and no interpreter.
``test_triton_aot.py`` checks the lines. Numbers come from ptxas and from the disassembled code.
"""

import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from losssurf_fast.ops import (
    curve_linear_triton,
    kl_triton,
    lrt_linear_backward_triton,
    lrt_linear_triton,
    lrt_operand_triton,
    lrt_sample_triton,
    noise_triton,
)
from losssurf_fast.ops.lrt_operand import operand_dtype
from losssurf_fast.ops.lrt_strategy import Tile, dual_tile, parameter_tile
from losssurf_fast.ops.noise_triton import EXACT, PLACE_ARGUMENTS

# Tensor-core instructions of Ampere to Ada, Hopper, Blackwell.
MMA = re.compile(r"\b(?:HMMA|QMMA|IMMA|HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA)\b")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOAT_ARGUMENTS = ("count", "precision", "log_variance")


@dataclass
class Case:
    """One kernel in one configuration; arguments are pointers (``*_ptr``), constants or sizes."""

    name: str
    kernel: object
    pointers: dict[str, str]  # those left out are None
    constants: dict[str, object]
    options: dict[str, object] = field(default_factory=dict)
    budget: int = 255  # registers
    dot: bool = False
    wide_copies: bool = False  # every copy to shared memory is asynchronous and of 16 bytes
    wide_accesses: tuple[int, int] = (0, 0)  # at least so many loads and stores of global memory are of 16 bytes


def compile_case(case: Case, arch: int) -> dict:
    """Registers, spills, shared memory, tensor-core instructions and ptxas warnings of ``case`` on ``arch``."""
    signature, constants, attributes = {}, dict(case.constants), {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = case.pointers.get(name)
            signature[name] = "constexpr" if kind is None else f"*{kind}"
            if kind is None:
                constants[name] = None
            else:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            kinds = dict.fromkeys((*PLACE_ARGUMENTS, "rows_total"), "i64") | dict.fromkeys(FLOAT_ARGUMENTS, "fp32")
            signature[name] = kinds.get(name, "i32")
            if name not in (*kinds, "steps", "first"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(case.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    log = log.getvalue()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    found = {key: int(re.search(pattern, log).group(1)) for key, pattern in numbers.items()}
    return {
        "name": case.name,
        "budget": case.budget,
        "dot": case.dot,
        "wide_copies": case.wide_copies,
        "wide_accesses": case.wide_accesses,
        "loads": len(re.findall(r"\bLDG\.\S*\b128\b", sass)),
        "stores": len(re.findall(r"\bSTG\.\S*\b128\b", sass)),
        **found,
        "serialised": sorted(set(re.findall(r"C75\d\d", log))),
        "copies": len(re.findall(r"\bLDGSTS\.", sass)),
        "narrow_copies": len(re.findall(r"\bLDGSTS\.(?!\S*\b128\b)", sass)),
        "mma": len(MMA.findall(sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "shared": compiled.metadata.shared,
    }


# ---- cases ---------------------------------------------------------------------------------------------------------

TILE = {"SHIFT": 0, "BLOCK_M": 8, "BLOCK_N": 128}
FORMATS = {"linear": TILE, "contiguous": TILE, "channels_last": {"SHIFT": 0, "BLOCK_M": 128, "BLOCK_N": 8}}


def elementwise_cases() -> list[Case]:
    cases = []
    for t in ("bf16", "fp32"):
        streams = {"mean_ptr": t, "var_ptr": t, "scale_ptr": "fp32", "bias_ptr": t, "seed_ptr": "i64", "y_ptr": t}
        grads = {"grad_ptr": t, "var_ptr": t, "scale_ptr": "fp32", "seed_ptr": "i64", "grad_var_ptr": t}
        sums = {"sum_grad_ptr": "fp32", "sum_alpha_ptr": "fp32"}
        operands = {"weight_ptr": "fp32", "scale_ptr": "fp32", "cast_ptr": t, "sigma2_ptr": t}
        operand_grads = {"grad_cast_ptr": t, "grad_sigma2_ptr": t, "grad_weight_ptr": "fp32", "grad_scale_ptr": "fp32"}
        cases += [
            Case(f"philox_normal {t}", noise_triton._philox_normal_kernel, {"out_ptr": t, "seed_ptr": "i64"}, TILE,
                 EXACT, 40),
            Case(f"operands {t}", lrt_operand_triton._operands_kernel, operands,
                 {"PARAMETERIZATION": "weight", "BLOCK": lrt_operand_triton.ELEMENTS}, {}, 40),
            Case(f"operands_backward {t}", lrt_linear_backward_triton._operands_backward_kernel,
                 operands | operand_grads, {"BLOCK": lrt_operand_triton.ELEMENTS}, {}, 48),
        ]  # fmt: skip
        for memory_format, tile in FORMATS.items():
            choices = {**tile, "FORMAT": memory_format, "ALPHA": "neuron"}
            wide = (2, 1) if t == "bf16" else (4, 2)  # all of the streams
            forward = Case(f"lrt_sample {memory_format} {t}", lrt_sample_triton._lrt_sample_kernel, streams, choices,
                           EXACT, 56, wide_accesses=wide)  # fmt: skip
            backward = Case(f"lrt_sample_backward {memory_format} {t}", lrt_sample_triton._lrt_sample_backward_kernel,
                            grads | sums, choices | {"LIMIT": 3.4e38}, EXACT, 104, wide_accesses=wide)  # fmt: skip
            cases += [forward, backward]
            # Triton makes a size of 1 a constant, and a constant is not a tensor.
            ones = {"rows": 1, "cols": 1, "BLOCK_M": 1, "BLOCK_N": 4}
            for case, sizes in ((forward, ones), (backward, ones | {"batch": 1})):
                cases.append(replace(case, name=f"{case.name}, sizes 1", constants=case.constants | sizes,
                                     wide_accesses=(0, 0)))  # fmt: skip
    return cases


def kl_cases() -> list[Case]:
    cases = []
    for t in ("bf16", "fp32"):
        alpha = {"param_ptr": t, "slope_ptr": t, "partial_ptr": "fp64"}
        both = alpha | {"weight_ptr": t, "slope_weight_ptr": t}
        constants = {"LIMIT": 3.4e38, "WEIGHT_LIMIT": 3.4e38, "BLOCK": kl_triton.ELEMENTS}
        for divergence, pointers in itertools.product(("exact", "approximate", "ard", "normal"), (alpha, both)):
            name = f"kl {divergence} {t} {len(pointers)} pointers"
            cases += [Case(name, kl_triton._kl_kernel, pointers, constants | {"DIVERGENCE": divergence}, EXACT, 64)]
        cases += [
            Case(f"kl_scale {t}", kl_triton._kl_scale_kernel, {"slope_ptr": t, "grad_ptr": "fp32", "out_ptr": t},
                 {"BLOCK": kl_triton.ELEMENTS}, {}, 24),
        ]  # fmt: skip
    return cases


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
    return Case(name, kernel, pointers, constants, options, budget, dot=True, wide_copies=x_type == torch.bfloat16)


def dual_cases(arch: int) -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    forward, grad_input = lrt_linear_triton._lrt_linear_kernel, lrt_linear_backward_triton._grad_input_kernel
    grad_parameters = lrt_linear_backward_triton._grad_parameters_kernel
    tile = lambda rows, x, parameter: dual_tile(rows, x, parameter, divmod(arch, 10))
    mixes = [(bf16, bf16, "weight"), (bf16, fp32, "weight"), (fp16, fp32, "weight"), (fp32, fp32, "weight")]
    cases = []
    for rows in (16, 64, 128):
        for mix in mixes[: 4 if rows <= 64 else 3]:  # the library serves fp32 beyond 64 rows
            kernels = (forward, grad_input) if rows <= 64 else (forward,)
            cases += [dual_case(kernel, tile(rows, *mix[:2]), *mix) for kernel in kernels]
    for kernel in (forward, grad_input):
        cases += [dual_case(kernel, tile(64, bf16, bf16), bf16, bf16, "neuron")]
    cases += [dual_case(grad_parameters, parameter_tile(64, mix[0]), *mix) for mix in mixes]
    cases += [dual_case(forward, tile(64, bf16, bf16), bf16, bf16, p) for p in ("additive", "variance")]
    odd = dual_case(forward, tile(64, bf16, bf16), bf16, bf16, "additive", EVEN_K=False)
    odd.name += ", odd I"
    # Triton makes a size of 1 a constant, and a constant is not a tensor.
    ones = [
        dual_case(kernel, tile(1, bf16, bf16), bf16, bf16, "neuron", M=1, O=1, I=1)
        for kernel in (forward, grad_input, grad_parameters)
    ]
    for case in ones:
        case.name += ", sizes 1"
        case.wide_copies = False
    return [*cases, odd, *ones]


def curve_case(tile: Tile, x_type, bend_type, bends, per_row=False, biases=None, **constants) -> Case:
    """The kernel of curve_linear; ``x_type`` is the dtype of activations, ``bend_type`` that of bends."""
    x, bend = TYPES[x_type], TYPES[bend_type]
    pointers = {"x_ptr": x, "y_ptr": x, "coefficients_ptr": "fp32", "bias_ptr": bend}
    pointers |= {f"bend{j}_ptr": bend for j in range(bends)}
    choices = {
        "K": bends, "BIASES": bends if biases is None else biases, "PER_ROW": per_row, "PRECISION": "tf32x3",
        "EVEN_K": True, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **EXACT}
    name = f"curve_linear {x}/{bend} {bends} bends{' per row' if per_row else ''} "
    name += f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    budget = 240 if x_type == torch.float32 else 192
    kernel = curve_linear_triton._curve_linear_kernel
    return Case(name, kernel, pointers, choices | constants, options, budget, True, x_type == torch.bfloat16)


def curve_cases(arch: int) -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    tile = lambda rows, *mix: curve_linear_triton.curve_tile(rows, *mix, divmod(arch, 10))
    cases = []
    for rows, mix in itertools.product((16, 64, 128), [(bf16, bf16), (bf16, fp32), (fp16, fp32), (fp32, fp32)]):
        if curve_linear_triton.fused(rows, mix[0], 3, divmod(arch, 10)):
            cases += [curve_case(tile(rows, *mix, 3), *mix, 3, per_row) for per_row in (False, True)]
    cases += [curve_case(tile(64, bf16, bf16, bends), bf16, bf16, bends) for bends in (5, 8)]
    odd = curve_case(tile(64, bf16, bf16, 3), bf16, bf16, 3, EVEN_K=False)
    odd.name += ", odd I"
    # Triton makes a size of 1 a constant, and a constant is not a tensor.
    ones = [curve_case(tile(1, bf16, bf16, 3), bf16, bf16, 3, per_row, M=1, O=1, I=1) for per_row in (False, True)]
    for case in ones:
        case.name += ", sizes 1"
        case.wide_copies = False
    return [*cases, odd, *ones]


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


def control_case() -> Case:
    pointers = {"x_ptr": "bf16", "w_ptr": "bf16", "y_ptr": "fp32"}
    return Case("control: serialised", _serialised_kernel, pointers, {"BLOCK": 64}, EXACT, dot=True)


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    cases = [*elementwise_cases(), *kl_cases(), *dual_cases(architecture), *curve_cases(architecture)]
    cases.append(control_case())
    for each in {case.name: case for case in cases}.values():  # several numbers of rows may share a tile
        print(json.dumps(compile_case(each, architecture)), flush=True)
