"""Builds losssurf_fast._C: C++ kernels always, CUDA kernels where torch has CUDA and nvcc is there.

LOSSSURF_CUDA=0 leaves CUDA out; LOSSSURF_CUDA=1 insists on it.
"""

import glob
import os

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

# torch takes the folder above that of the nvcc on the path, which may be a script outside the toolkit.
usual, header = "/usr/local/cuda", "include/cuda_runtime_api.h"
if not os.path.exists(os.path.join(cpp_extension.CUDA_HOME or "", header)) and os.path.exists(f"{usual}/{header}"):
    cpp_extension.CUDA_HOME = usual

has_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None  # a build host needs no GPU
use_cuda = {"0": False, "1": True}.get(os.environ.get("LOSSSURF_CUDA", ""), has_cuda)
if use_cuda and not has_cuda:
    raise SystemExit(f"LOSSSURF_CUDA=1 needs a CUDA build of torch (this one is {torch.__version__}) and nvcc")

sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp"))
# No fma where the source does not say fma: every instruction set must return the same bits.
cxx_flags = [
    "-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-Wall", "-Wno-maybe-uninitialized",
    "-g0",  # Python's flags ask for debug information, which is more than half of the time of a build
]  # fmt: skip
nvcc_flags = ["-std=c++20", "-O3", "-fmad=false", "--threads=2"]

if use_cuda:
    extension = CUDAExtension(
        "losssurf_fast._C",
        sources + sorted(glob.glob("csrc/cuda/*.cpp") + glob.glob("csrc/cuda/*.cu")),
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
    )
else:
    extension = CppExtension("losssurf_fast._C", sources, extra_compile_args={"cxx": cxx_flags})

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
