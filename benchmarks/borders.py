"""Where one strategy of ``lrt_linear`` overtakes the other on this GPU: the numbers for ``ops/lrt_strategy.py``.

Both strategies run at doubling row counts; the border printed for each dtype and parameterization is the largest number
of rows up to which the dual-accumulator kernel is the faster one throughout. ``--dry`` runs them in Triton's
interpreter at tiny sizes, which checks this file and measures nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import run
from benchmarks.timing import empty_figures, percentile

SIZES = (4096, 4096)  # O, I
ROWS = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = ("bf16", "fp32", "fp16")
PARAMETERIZATIONS = ("additive", "variance", "neuron")


def inputs(rows: int, sizes: tuple[int, int], dtype: torch.dtype, parameterization: str, device: str) -> tuple:
    outputs, features = sizes
    x = torch.randn(rows, features, device=device).to(dtype)
    weight = torch.randn(outputs, features, device=device) / features**0.5
    scale = torch.full((outputs,) if parameterization == "neuron" else sizes, -5.0, device=device)
    return x, None if parameterization == "variance" else weight, scale, torch.zeros(outputs, device=device)


def milliseconds(call, dry: bool) -> list[float]:
    if dry:
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="all")


def border(times: dict[int, dict[str, float]]) -> int:
    """The largest number of rows up to which "dual" is the faster one throughout; 0 where it never is."""
    best = 0
    for rows in sorted(times):
        if times[rows]["dual"] > times[rows]["two_gemms"]:
            break
        best = rows
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.borders", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    dry = arguments.dry
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from benchmarks.cases import dtype_of
    from losssurf_fast.ops.lrt_linear_triton import linear_dual, linear_two_gemms
    from losssurf_fast.ops.lrt_strategy import dual_tile

    device = "cpu" if dry else "cuda"
    capability = (9, 0) if dry else torch.cuda.get_device_capability()
    sizes, all_rows, dtypes = ((8, 8), (2, 4), ("fp32",)) if dry else (SIZES, ROWS, DTYPES)
    shared, rows_out = run.origin(device, "dry" if dry else "quick"), []
    for name in dtypes:
        dtype = torch.float16 if name == "fp16" else dtype_of(name)
        for parameterization in PARAMETERIZATIONS:
            times = {}
            for rows in all_rows:
                tensors = inputs(rows, sizes, dtype, parameterization, device)
                rest = (torch.zeros((), dtype=torch.int64, device=device), parameterization, 0, 0, 0)
                tile = dual_tile(rows, dtype, torch.float32, capability)
                calls = {
                    "dual": lambda tensors=tensors, rest=rest, tile=tile: linear_dual(*tensors, *rest, tile),
                    "two_gemms": lambda tensors=tensors, rest=rest: linear_two_gemms(*tensors, *rest),
                }
                measured = {strategy: milliseconds(call, dry) for strategy, call in calls.items()}
                times[rows] = {strategy: statistics.median(values) for strategy, values in measured.items()}
                rows_out += [
                    {
                        "family": "borders", "op": "lrt_linear", "variant": parameterization, "mode": "forward",
                        "dtype": name, "shape": [rows, *sizes], "threads": 1, "provider": strategy,
                    } | empty_figures(None) | shared | {
                        "rounds": len(values), "median_ms": statistics.median(values),
                        "p20_ms": percentile(values, 0.2), "p80_ms": percentile(values, 0.8),
                    }
                    for strategy, values in measured.items()
                ]  # fmt: skip
            print(f"lrt_linear {name} {parameterization}: dual up to {border(times)} rows of {sizes[0]}x{sizes[1]}")
    if arguments.out:
        with arguments.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
