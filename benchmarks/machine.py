"""What this machine can do at most: bandwidth of its memory, rates of its library's GEMMs. Rows of family "machine"."""

import functools
from collections.abc import Callable
from contextlib import contextmanager

import torch

from benchmarks.cases import dtype_of
from benchmarks.gemm import mm, onednn
from benchmarks.timing import DRY, Budget, Step, empty_figures, first_line, speed, time_steps

# Elements of a copy, M, N, K of a GEMM. A GPU's copy is 1 GiB, which no cache holds.
SIZES = {"cpu": (2**24, (512, 4096, 1024)), "cuda": (2**28, (8192, 8192, 8192))}
TINY = (2**10, (16, 16, 16))
FP8 = torch.float8_e4m3fn


@contextmanager
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def passes(size: int, device: torch.device) -> dict[tuple, tuple]:
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    return {
        ("copy", "fp32"): (lambda: target.copy_(source), (size,), 8 * size, 0),
        ("read", "fp32"): (lambda: source.sum(), (size,), 4 * size, 0),
        ("fill", "fp32"): (lambda: target.fill_(1.0), (size,), 4 * size, 0),
    }


def gemms(sizes: tuple[int, int, int], device: torch.device, device_type: str) -> dict[tuple, tuple]:
    """On a CPU each of the library's backends; on a GPU also what its tensor cores do to fp32 and fp8."""
    m, n, k = sizes
    work = {}

    def add(provider: str, dtype: str, call: Callable, itemsize: int) -> None:
        work[provider, dtype] = (call, sizes, itemsize * (m * k + n * k + m * n), 2 * m * n * k)

    for dtype in ("fp32", "bf16"):
        a = torch.randn(m, k, device=device).to(dtype_of(dtype))
        b = torch.randn(n, k, device=device).to(a.dtype)
        for product in (mm, onednn) if device_type == "cpu" else (mm,):
            add(f"gemm {product.__name__}", dtype, functools.partial(product, a, b.t()), a.element_size())
    if device_type == "cuda":
        a, b = (torch.randn(s, k, device=device) for s in (m, n))
        add("gemm mm", "tf32", lambda a=a, b=b: tf32()(mm)(a, b.t()), 4)

        def rowwise():
            eights = a.to(FP8), b.to(FP8).t()
            scales = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
            return functools.partial(torch._scaled_mm, *eights, *scales, out_dtype=torch.bfloat16)

        prepared = functools.cache(rowwise)  # at the first call, so that hardware without fp8 fails in its own row
        add("gemm rowwise", "fp8", lambda: prepared()(), 1)
    return work


def measure_machine(budget: Budget, threads: int, device: torch.device, device_type: str) -> list[dict]:
    """One row for each pass over memory and each GEMM; one that fails costs its row alone."""
    size, sizes = TINY if budget is DRY else SIZES[device_type]
    work = passes(size, device) | gemms(sizes, device, device_type)
    heads = {
        key: {
            "family": "machine", "op": "machine", "variant": "", "mode": "forward", "dtype": key[1],
            "shape": list(shape), "threads": threads, "provider": key[0],
        }
        for key, (_, shape, _, _) in work.items()
    }  # fmt: skip
    steps, rows = {}, []
    for key, (call, *_) in work.items():
        step = Step(call, (), "forward")
        try:
            step.warm_up()
            steps[key] = step
        except Exception as error:
            rows.append(heads[key] | empty_figures(first_line(error)))
    times = time_steps(steps, budget, threads, device, device_type)
    for key, values in times.items():
        _, _, moved, flops = work[key]
        rows.append(heads[key] | empty_figures(None) | speed(values, moved, flops))
    return rows
