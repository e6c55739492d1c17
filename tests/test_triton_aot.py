"""Every Triton kernel compiles for three GPU architectures within its budget; no GPU is needed (tests/aot)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from losssurf_fast.ops.lrt_strategy import shared_memory

ARCHITECTURES = (80, 90, 100)
OPS = Path(__file__).parent.parent / "losssurf_fast/ops"


@pytest.fixture(scope="module")
def compiled():
    """Lines of tests/aot per architecture; the processes run side by side."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = {}
    for arch in ARCHITECTURES:
        command = [sys.executable, str(Path(__file__).with_name("aot")), str(arch)]
        processes[arch] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    lines = {}
    for arch, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, f"sm_{arch}: {errors[-2000:]}"
        lines[arch] = [json.loads(line) for line in output.splitlines()]
    return lines


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_within_budget(compiled, arch):
    kernels = [kernel for kernel in compiled[arch] if not kernel["name"].startswith("control")]
    (control,) = [kernel for kernel in compiled[arch] if kernel["name"].startswith("control")]
    assert len(kernels) >= 20
    for kernel in kernels:
        limits = kernel["limits"]
        assert kernel["stack"] == kernel["spill_stores"] == kernel["spill_loads"] == 0, kernel
        assert kernel["serialised"] == [], kernel
        assert kernel["registers"] <= limits["budget"], kernel
        assert kernel["shared"] <= shared_memory(divmod(arch, 10)), kernel
        assert kernel["mma"] >= limits["mma"] and (kernel["mma"] > 0) == (limits["mma"] > 0), kernel
        assert kernel["drains"] <= limits["drains"], kernel
        assert kernel["per_element"] <= limits["per_element"], kernel
        if limits["wide_copies"]:  # no: the compiler lost sight of what is contiguous, and does not pipeline
            assert kernel["copies"] > 0 and kernel["narrow_copies"] == 0, kernel
        loads, stores = limits["wide_accesses"]
        assert kernel["loads"] >= loads and kernel["stores"] >= stores, kernel
        assert kernel["instructions"] > 28, kernel  # not a stub
    # The checks for serialised wgmma and for its waits see them where they are.
    assert bool(control["serialised"]) == (arch == 90), control
    assert (control["drains"] > 0) == (arch == 90), control


def test_every_kernel_is_compiled(compiled):
    """Functions that are launched over a grid have a case on every architecture that has their types."""
    launched = set()
    for path in OPS.glob("*_triton.py"):
        source = path.read_text()
        functions = re.findall(r"^@triton\.jit.*\ndef (\w+)\(", source, re.M)
        launched |= {name for name in functions if re.search(rf"\b{name}\[", source)}
    assert len(launched) >= 12
    for arch, lines in compiled.items():
        without_float8 = {"_float8_rows_kernel"} if arch < 89 else set()
        assert {kernel["kernel"] for kernel in lines} == (launched - without_float8) | {"_serialised_kernel"}, arch
