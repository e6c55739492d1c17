"""``python -m losssurf_fast doctor``: what is installed, and which kernel serves which operator."""

import importlib.metadata
import platform
import shutil
import subprocess
import textwrap

import torch

import losssurf_fast
from losssurf_fast import _C
from losssurf_fast._library import OPERATORS, kernel_for

WIDTH = 60


def run() -> int:
    """Print the report; 0 if every operator has a kernel of its own on the CPU, else 1."""
    for name, value in facts().items():
        print(_hanging(f"{name:12s}{value}", 12))
    reasons: dict[str, int] = {}  # why a kernel is missing -> its footnote
    lacking = False
    print(f"\n{'operator':26s}{'cpu':18s}cuda")
    for op in OPERATORS:
        cells = []
        for device in ("cpu", "cuda"):
            kernel, _, reason = kernel_for(op, device).partition(": ")
            if reason:
                kernel = f"reference [{reasons.setdefault(reason, len(reasons) + 1)}]"
                lacking |= device == "cpu"
            cells.append(kernel)
        print(f"{op:26s}{cells[0]:18s}{cells[1]}")
    for reason, number in reasons.items():
        print(_hanging(f"[{number}] {reason}", 4))
    print("\nreference: plain PyTorch operations, correct and slower")
    return int(lacking)


def facts() -> dict[str, str]:
    threads = torch.get_num_threads()
    return {
        "package": f"losssurf_fast {losssurf_fast.__version__}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "compiler": _compiler(),
        "CPU": f"{_C.instruction_set()} kernels, {threads} thread{'s' * (threads != 1)}",
        "CUDA": _cuda(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    path = shutil.which("g++") or shutil.which("c++")
    if path is None:
        return "none found (needed to build, not to run)"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else f"{path} (does not tell its version)"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch is built with {torch.version.cuda}; no GPU is visible"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()} (sm_{major}{minor})"


def _hanging(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, drop_whitespace=True)
