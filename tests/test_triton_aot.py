"""Every Triton kernel compiles for three GPU architectures within its budget; no GPU is needed (tests/aot)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from losssurf_fast.ops.lrt_strategy import shared_memory

ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Lines of tests/aot per architecture; the processes run side by side."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = {}
    for arch in ARCHITECTURES:
        # A new cache: a kernel that comes from a cache has no ptxas log.
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"sm_{arch}"))
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
    limit = shared_memory(divmod(arch, 10))
    for kernel in kernels:
        assert kernel["stack"] == kernel["spill_stores"] == kernel["spill_loads"] == 0, kernel
        assert kernel["serialised"] == [], kernel
        assert kernel["registers"] <= kernel["budget"], kernel
        assert kernel["shared"] <= limit, kernel
        assert (kernel["mma"] > 0) == kernel["dot"], kernel
        if kernel["wide_copies"]:  # no: the compiler lost sight of what is contiguous, and does not pipeline
            assert kernel["copies"] > 0 and kernel["narrow_copies"] == 0, kernel
        loads, stores = kernel["wide_accesses"]
        assert kernel["loads"] >= loads and kernel["stores"] >= stores, kernel
        assert kernel["instructions"] > 32, kernel  # not a stub, which has 16; scaling has 40
    # The check for serialised wgmma sees one where there is one.
    assert bool(control["serialised"]) == (arch == 90), control
