"""Compile every Triton kernel ahead of time for one GPU architecture and print what came out, one JSON line each.

    python tests/aot.py 90

needs no GPU. One process per architecture (Triton's lowering remembers the first one) and without the interpreter.
``test_triton_aot.py`` holds the lines against the budgets below.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from losssurf_fast.ops import lrt_linear_triton, lrt_sample_triton, noise_triton
from losssurf_fast.ops.lrt_strategy import dual_tile
from losssurf_fast.ops.noise_triton import EXACT

# Tensor-core instructions of Ampere to Ada, Hopper, Blackwell.
MMA = re.compile(r"\b(?:HMMA|QMMA|IMMA|HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA)\b")
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Case:
    """One kernel in one configuration; arguments are pointers (``*_ptr``), constants or sizes."""

    name: str
    kernel: object
    pointers: dict[str, str | None]
    constants: dict[str, object]
    options: dict[str, object] = field(default_factory=dict)


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
            signature[name] = "i64" if name in ("row_offset", "first_quad", "sample") else "i32"
            if name not in (*noise_triton.PLACE_ARGUMENTS, "steps"):
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
        "arch": arch,
        **found,
        "serialised": sorted(set(re.findall(r"C75\d\d", log))),
        "mma": len(MMA.findall(sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "local": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": compiled.metadata.shared,
    }
