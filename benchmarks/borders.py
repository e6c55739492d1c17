"""Where one strategy overtakes another on this GPU: the numbers for ``lrt_strategy.py`` and ``curve_linear_triton.py``.

All strategies of an operator run at doubling row counts. The border of each dtype and parameterization is the largest
number of rows up to which our kernel beats the library's GEMMs, whatever a strategy of no operator does, which is shown
beside them. The most important sweeps come first; none is begun after ``--minutes``. ``--dry`` runs them in Triton's
interpreter at tiny sizes, which checks this file and measures nothing.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import run
from benchmarks.cases import dtype_of
from benchmarks.timing import empty_figures, gpu_milliseconds, percentile

SIZES = (4096, 4096)  # O, I
ROWS = (16, 32, 64, 128, 256, 512, 1024)
TINY_SIZES, TINY_ROWS = (8, 8), (2, 4)
LIBRARY = ("two_gemms", "synthesised")  # strategies for many rows
READY = "operands, then dual"  # of which no operator makes use yet
REPETITIONS = 20  # milliseconds of each strategy

Calls = dict[str, Callable[[], object]]  # strategy -> a call of it


@dataclass(frozen=True)
class Sweep:
    op: str
    variant: str
    dtype: str
    mode: str
    constant: str  # where its border is written
    strategies: Callable[..., Calls]  # of (rows, sizes, dtype, device, capability)


# ---- strategies ----------------------------------------------------------------------------------------------------
# Their modules are imported late: whether Triton interprets its kernels is decided before.


def lrt_inputs(rows: int, sizes: tuple[int, int], dtype: torch.dtype, parameterization: str, device) -> tuple:
    """(x, weight, scale, bias) of that benchmark, whose kernels are called below autograd."""
    from benchmarks.cases.lrt import inputs

    drawn = inputs((rows, *sizes), dtype, parameterization, device)
    return tuple(None if t is None else t.detach() for t in drawn)


def linear_forward(parameterization: str, rows: int, sizes, dtype: torch.dtype, device, capability) -> Calls:
    from losssurf_fast.ops.lrt_linear_triton import linear_dual, linear_two_gemms
    from losssurf_fast.ops.lrt_operand import operand_dtype
    from losssurf_fast.ops.lrt_operand_triton import operands
    from losssurf_fast.ops.lrt_strategy import dual_tile

    x, weight, scale, bias = lrt_inputs(rows, sizes, dtype, parameterization, device)
    rest = (bias, torch.zeros((), dtype=torch.int64, device=device), parameterization, 0, 0, 0)
    wide, narrow = (dual_tile(rows, dtype, of, capability) for of in (torch.float32, operand_dtype(dtype)))

    def operands_then_dual():
        cast, sigma2 = operands(weight, scale, parameterization, operand_dtype(dtype))
        return linear_dual(x, cast, scale, *rest, narrow, sigma2)

    return {
        "dual": lambda: linear_dual(x, weight, scale, *rest, wide),
        READY: operands_then_dual,
        "two_gemms": lambda: linear_two_gemms(x, weight, scale, *rest),
    }


def linear_backward(parameterization: str, rows: int, sizes, dtype: torch.dtype, device, capability) -> Calls:
    from losssurf_fast.ops.lrt_linear_backward_triton import backward_passes
    from losssurf_fast.ops.lrt_linear_triton import linear_two_gemms
    from losssurf_fast.ops.lrt_strategy import dual_tile

    x, weight, scale, bias = lrt_inputs(rows, sizes, dtype, parameterization, device)
    seed, place = torch.zeros((), dtype=torch.int64, device=device), (0, 0, 0)
    y, var = linear_two_gemms(x, weight, scale, bias, seed, parameterization, *place)
    needed = [True, weight is not None, True, True]  # of x, weight, scale, bias
    call = functools.partial(
        backward_passes, torch.ones_like(y), x, weight, scale, True, var, seed, parameterization, needed, place
    )
    tile = dual_tile(rows, dtype, torch.float32, capability)
    return {"dual": lambda: call(tile), "two_gemms": lambda: call(None)}


def curve_forward(num_bends: int, rows: int, sizes, dtype: torch.dtype, device, capability) -> Calls:
    from losssurf_fast.ops import curve_coefficients
    from losssurf_fast.ops.curve_linear_triton import curve_tile, linear_fused, linear_synthesised

    x = torch.randn(rows, sizes[1], device=device).to(dtype)
    bends = [torch.randn(sizes, device=device).to(dtype) for _ in range(num_bends)]
    coefficients = curve_coefficients(torch.tensor(0.3, device=device), num_bends)
    tile = curve_tile(rows, dtype, dtype, num_bends, capability)
    return {
        "fused": lambda: linear_fused(x, bends, coefficients, [], tile),
        "synthesised": lambda: linear_synthesised(x, bends, coefficients, []),
    }


def sweeps() -> list[Sweep]:
    """The most important first. fp16 has no border: the library would multiply its operands in fp32."""
    dual, fused = "lrt_strategy.DUAL_MAX_ROWS", "curve_linear_triton.FUSED_MAX_ROWS"

    def linear(mode, dtype, parameterization, constant):
        of_mode = linear_forward if mode == "forward" else linear_backward
        strategies = functools.partial(of_mode, parameterization)
        return Sweep("lrt_linear", parameterization, dtype, mode, constant, strategies)

    def curve(dtype, num_bends, constant):
        strategies = functools.partial(curve_forward, num_bends)
        return Sweep("curve_linear", f"{num_bends} bends", dtype, "forward", constant, strategies)

    return [
        linear("forward", "bf16", "additive", dual),
        linear("backward", "bf16", "additive", dual),
        curve("bf16", 3, fused),
        linear("forward", "bf16", "variance", f"{dual}_VARIANCE"),
        linear("forward", "fp32", "additive", f"{dual}_FP32"),
        linear("forward", "bf16", "neuron", dual),
        linear("backward", "bf16", "variance", f"{dual}_VARIANCE"),
        linear("backward", "fp32", "additive", f"{dual}_FP32"),
        curve("fp32", 3, f"{fused}_FP32"),
        curve("bf16", 5, fused),
    ]


# ---- measuring -----------------------------------------------------------------------------------------------------


def fastest(times: dict[int, dict[str, float]]) -> dict[int, str]:
    """Number of rows -> the strategy that takes least there."""
    return {rows: min(measured, key=measured.get) for rows, measured in sorted(times.items())}


def border(times: dict[int, dict[str, float]]) -> int:
    """The largest number of rows up to which our kernel beats the library everywhere; 0 where it never does.

    Of the strategies that an operator chooses from; where one of them failed, nothing is known.
    """
    best = 0
    for rows, measured in sorted(times.items()):
        chosen_from = {strategy: ms for strategy, ms in measured.items() if strategy != READY}
        if len(chosen_from) < 2 or min(chosen_from, key=chosen_from.get) in LIBRARY:
            break
        best = rows
    return best


def measure(sweep: Sweep, device: torch.device, dry: bool) -> tuple[dict[int, dict[str, float]], list[dict]]:
    """(number of rows -> strategy -> median ms, rows of the results). A strategy that fails has a row with its reason.

    Without bf16 in the interpreter, the dry run takes fp32.
    """
    capability = (9, 0) if dry else torch.cuda.get_device_capability(device)
    sizes, counts = (TINY_SIZES, TINY_ROWS) if dry else (SIZES, ROWS)
    dtype = "fp32" if dry else sweep.dtype
    times, found = {}, []
    for rows in counts:
        head = {
            "family": "borders", "op": sweep.op, "variant": sweep.variant, "mode": sweep.mode, "dtype": dtype,
            "shape": [rows, *sizes], "threads": 1,
        }  # fmt: skip
        times[rows] = {}
        for strategy, call in sweep.strategies(rows, sizes, dtype_of(dtype), device, capability).items():
            row = head | {"provider": strategy}
            try:
                values = gpu_milliseconds(call, REPETITIONS, device)
            except Exception as error:
                found.append(row | empty_figures(f"{type(error).__name__}: {error}".splitlines()[0]))
                continue
            times[rows][strategy] = statistics.median(values)
            figures = {
                "rounds": len(values), "median_ms": times[rows][strategy],
                "p20_ms": percentile(values, 0.2), "p80_ms": percentile(values, 0.8),
            }  # fmt: skip
            found.append(row | empty_figures(None) | figures)
    return {rows: measured for rows, measured in times.items() if measured}, found


def current(constant: str) -> int:
    """The value that is in force."""
    import importlib

    module, _, name = constant.partition(".")
    return getattr(importlib.import_module(f"losssurf_fast.ops.{module}"), name)


def conclusions(borders: dict[Sweep, int]) -> list[str]:
    """One line for each constant: what every sweep that it decides would set it to."""
    lines = []
    for constant in dict.fromkeys(sweep.constant for sweep in borders):
        wanted = [f"{s.variant} {s.mode} {n}" for s, n in borders.items() if s.constant == constant]
        lines.append(f"ops/{constant} is {current(constant)}; measured: {', '.join(wanted)}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.borders", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--minutes", type=float, help="begin no sweep after so many minutes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to append to")
    parser.add_argument("--commit", help=run.COMMIT_HELP)
    arguments = parser.parse_args(argv)
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry runs the strategies in Triton's interpreter")
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    device = torch.device("cpu" if arguments.dry else "cuda")
    shared = run.origin(str(device), "dry" if arguments.dry else "quick", arguments.commit)
    until = time.monotonic() + 60 * (arguments.minutes or float("inf"))
    borders, failed = {}, 0
    for sweep in sweeps():
        if time.monotonic() > until:
            print(f"out of time before {sweep.op} {sweep.dtype} {sweep.variant} {sweep.mode}", file=sys.stderr)
            break
        times, rows = measure(sweep, device, arguments.dry)
        failed += sum(row["error"] is not None for row in rows)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.writelines(json.dumps(row | shared) + "\n" for row in rows)
        borders[sweep] = border(times)
        winners = ", ".join(f"{count} {strategy}" for count, strategy in fastest(times).items())
        print(f"{sweep.op} {sweep.dtype} {sweep.variant} {sweep.mode}: {winners}", flush=True)
    print("\n".join(conclusions(borders)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
