"""From a case to what its compiled kernel is made of; numbers come from ptxas and from the disassembled code."""

import contextlib
import io
import math
import re
import subprocess
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot import Case
from losssurf_fast.ops.noise_triton import PLACE_ARGUMENTS

# Tensor-core instructions of Ampere to Ada, Hopper, Blackwell.
MMA = re.compile(r"\b(?:HMMA|QMMA|IMMA|HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA)\b")
FULL_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP\b)(.*?) ?;")
FLOAT_ARGUMENTS = ("count", "inverse_std", "log_variance")
LIMITS = ("budget", "mma", "drains", "per_element", "wide_copies", "wide_accesses")
TILE = ("BLOCK", "BLOCK_M", "BLOCK_N")


def instructions(sass: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of innermost loops: up to a branch back to a label, with no other label between."""
    everything, loops, label, body = [], [], None, []
    for line in sass.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            label, body = found.group(1), []
        elif found := INSTRUCTION.match(line):
            everything.append(found.group(1))
            body.append(found.group(1))
            if label and len(body) > 1 and re.search(rf"\bBRA\S* (?:\S+, )?`\({re.escape(label)}\)", body[-1]):
                loops += body
    return everything, loops


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
    everything, loops = instructions(sass)
    threads = 32 * case.options.get("num_warps", 4)
    elements = math.prod(value for key, value in case.constants.items() if key in TILE)
    return {
        "name": case.name,
        "kernel": case.kernel.__name__,
        "limits": {key: getattr(case, key) for key in LIMITS},
        **found,
        "serialised": sorted(set(re.findall(r"C75\d\d", log))),
        "shared": compiled.metadata.shared,
        "loads": len(re.findall(r"\bLDG\.\S*\b128\b", sass)),
        "stores": len(re.findall(r"\bSTG\.\S*\b128\b", sass)),
        "copies": len(re.findall(r"\bLDGSTS\.", sass)),
        "narrow_copies": len(re.findall(r"\bLDGSTS\.(?!\S*\b128\b)", sass)),
        "mma": len(MMA.findall(sass)),
        "drains": sum(map(len, map(FULL_WAIT.findall, loops))),
        "instructions": len(everything),
        # A loop goes over tiles; what stands around it they share.
        "per_element": round(len(loops or everything) * threads / elements, 1),
    }
