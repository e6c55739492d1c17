"""CUDA sources compile for every supported architecture, without a GPU and without a CUDA build of torch."""

import pathlib
import re
import shutil
import subprocess

import pytest
from torch.utils import cpp_extension

CUDA_SOURCES = pathlib.Path(__file__).parent.parent / "csrc/cuda"
# Registers of a thread: with 256 threads six blocks are on a multiprocessor at 40, five at 48, four at 64, three at 80
# and two at 128.
REGISTERS = {
    "noise.cu": {"philox_normal": 48},
    "averaging.cu": {"multi_tensor": 40},
    "swag.cu": {"multi_tensor": 40, "swag_sample": 128},
    "curve.cu": {"curve_weights": 80, "curve_gradients": 80, "curve_sum": 32},
    "gaussian_weights.cu": {"gaussian_draws": 64, "gaussian_gradients_of": 64, "gaussian_scale_sums": 64},
}
nvcc = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(nvcc is None, reason="no nvcc")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA_SOURCES.glob("*.cu")))
def test_kernels_compile(source, arch, tmp_path):
    flags = ["-std=c++20", "-O3", "-fmad=false", f"-arch={arch}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    flags += ["--keep", "--keep-dir", str(tmp_path)]
    # The host's half too: without it nvcc accepts calls from __host__ __device__ functions to __device__ ones.
    command = [nvcc, *flags, "-c", str(CUDA_SOURCES / source), "-o", str(tmp_path / "kernel.o")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    used = {}  # the largest number of every kernel, over its instances
    for symbol, registers in re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", run.stderr, re.S):
        (name,) = [name for name in REGISTERS[source] if re.search(rf"{len(name)}{name}[IE]", symbol)]
        used[name] = max(used.get(name, 0), int(registers))
    assert used.keys() == REGISTERS[source].keys()
    assert all(used[name] <= budget for name, budget in REGISTERS[source].items()), used
    spills = [int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", run.stderr)]
    assert spills and not any(spills), run.stderr
    for kernel in (tmp_path / source).with_suffix(".ptx").read_text().split(".entry ")[1:]:
        assert_vectors(kernel)


def assert_vectors(kernel):
    """Neighbours in memory are written together: in PTX not at [address], [address + 4], ..."""
    name = kernel.partition("(")[0]
    if "multi_tensor" in name or "curve_weights" in name or "curve_gradients" in name:
        assert re.search(r"st\.global\.(v[24]\.|u32)", kernel), name
        assert re.search(r"ld\.global\.v[24]\.", kernel), name
        alone = re.findall(r"st\.global\.[a-z]+\d+ +\t?\[%rd\d+\+([1-9]|1[0-5])\]", kernel)
        assert not alone, (name, alone)
    if "gaussian_gradients" in name:  # its products for the sums of shared scales; store_pack would miss shared memory
        assert re.search(r"st\.shared\.(v4\.)?(b32|f32)", kernel), name
    if "gaussian_draws" in name or "gaussian_gradients" in name:  # which write tails one by one
        assert "st.global.v4." in kernel and "ld.global.v4." in kernel, name


@pytest.mark.parametrize("glue", sorted(path.name for path in CUDA_SOURCES.glob("*_glue.cpp")))
def test_glue_compiles(glue, tmp_path):
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    # nvcc hands a .cpp to g++ with CUDA's headers; a CPU build of torch lacks the header that the macro replaces.
    command = [nvcc, "-std=c++20", "-Xcompiler", "-Wall,-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *includes]
    command += ["-c", str(CUDA_SOURCES / glue), "-o", str(tmp_path / "glue.o")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
