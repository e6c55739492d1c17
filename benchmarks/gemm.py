"""The library's matrix products, for the floor of operators that are made of them."""

import time
from collections.abc import Callable

import torch


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What ``a @ b`` runs: MKL for fp32 where torch is built with it, oneDNN for bf16."""
    return torch.mm(a, b)


def onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.t(), None, "none", [], "")


def fastest_products(operands: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """A closure that computes ``a @ b`` for every pair, each with the backend that is faster for it on this machine."""
    on_cpu = all(a.device.type == "cpu" for a, _ in operands)
    backends = (mm, onednn) if on_cpu and torch.backends.mkldnn.is_available() else (mm,)

    def fastest(a, b):
        return min(backends, key=lambda product: _best_time(product, a, b)) if len(backends) > 1 else mm

    chosen = [(fastest(a, b), a, b) for a, b in operands]

    def products():
        for backend, a, b in chosen:
            backend(a, b)

    return products


def _best_time(product, a: torch.Tensor, b: torch.Tensor, repeats: int = 7) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        product(a, b)
        best = min(best, clock() - start)
    return best
