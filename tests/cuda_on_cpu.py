"""CUDA kernels without a GPU: their source as a plain C++ library, and tensors to call it with.

cuda_on_cpu/ stands in for CUDA's headers and runs a kernel's blocks and threads one after the other.
"""

import ctypes
import pathlib
import subprocess

import torch
from common import BF16, F16, F32, F64
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).parent.parent
TYPES = (F64, F32, BF16, F16)  # in the order of FloatType
SIZES = (1, 3, 4, 1000, 0, 1024, 8192, 8197, 20000)
POINTER, LONG = ctypes.c_void_p, ctypes.c_int64


def build(source, folder, *, with_torch=False):
    """Path of the library that a source becomes; ``source`` is a path from the repository's root."""
    path = folder / "library.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]  # a GPU would stop there, too
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_on_cpu'}"]
    libraries = []
    if with_torch:
        flags += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *flags, "-o", str(path), "-x", "c++", str(ROOT / source), *libraries], check=True)
    return str(path)


def draw(dtype, seed, sizes=SIZES, shift=0):
    """Tensors of these sizes, whose memory starts `shift` elements after an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n + shift, generator=generator, dtype=F64).to(dtype)[shift:] for n in sizes]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()
