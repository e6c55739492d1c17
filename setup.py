"""Builds losssurf_fast._C: C++ kernels always, CUDA kernels where torch has CUDA and nvcc is there.

LOSSSURF_CUDA=0 leaves CUDA out; LOSSSURF_CUDA=1 insists on it.
"""

import glob
import os

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

has_cuda = torch.version.cuda is not None and CUDA_HOME is not None  # a build host needs no GPU
use_cuda = {"0": False, "1": True}.get(os.environ.get("LOSSSURF_CUDA", ""), has_cuda)
if use_cuda and not has_cuda:
    raise SystemExit(f"LOSSSURF_CUDA=1 needs a CUDA build of torch (this one is {torch.__version__}) and nvcc")

sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp"))
# No fma where the source does not say fma: every instruction set must return the same bits.
cxx_flags = [
    "-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-Wall", "-Wno-maybe-uninitialized",
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
