"""Measures the cases of some families in this process and prints one JSON row per line.

``benchmarks.run`` starts this module once per thread count, because the environment that pins OpenMP threads must be
set before torch is loaded.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks import cases as catalogue
from benchmarks.cases import Case, Setup
from benchmarks.machine import measure_machine
from benchmarks.timing import (
    BUDGETS,
    DRY,
    QUICK,
    Budget,
    Step,
    empty_figures,
    first_line,
    paired_ratio,
    peak_mib,
    speed,
    time_steps,
)


def make_step(name: str, setup: Setup, mode: str, backend: str) -> Step:
    if name == "floor":
        return Step(lambda: setup.floor(), (), "forward")
    function = setup.providers[name]
    if name == "compiled":
        function = torch.compile(function, dynamic=False, backend=backend)
    return Step(function, setup.inputs, mode)


def measure(
    case: Case, budget: Budget, threads: int, device: torch.device, device_type: str | None = None
) -> list[dict]:
    """Rows of one case, one per provider; a provider that fails gives a row with its reason in ``error``.

    ``device_type`` is that of the case's catalogue, by default the device's. A case whose inputs cannot be made gives
    one row, of "ours".
    """
    device_type = device_type or device.type
    torch._dynamo.reset()  # else later shapes of one function hit the recompile limit and run uncompiled
    head = {
        "op": case.op, "variant": case.variant, "mode": case.mode, "dtype": case.dtype, "shape": list(case.shape),
        "threads": threads,
    }  # fmt: skip
    backend = "aot_eager" if budget is DRY else "inductor"
    try:
        setup = case.setup(device)
    except Exception as error:
        return [head | {"provider": "ours"} | empty_figures(first_line(error))]
    steps, errors, saved = {}, {}, {}
    for name in (*setup.providers, "floor"):
        if name == "compiled" and not case.compiles:
            continue
        try:
            step = make_step(name, setup, case.mode, backend)
            step.warm_up()
            if case.mode == "full" and name != "floor":
                saved[name] = step.saved_mib()
            steps[name] = step
        except Exception as error:
            errors[name] = first_line(error)
    try:
        peaks = {name: peak_mib(step, device) for name, step in steps.items()} if device_type == "cuda" else {}
        times = time_steps(steps, budget, threads, device, device_type)
    except Exception as error:  # a GPU's error may show here, whichever provider caused it
        errors |= dict.fromkeys(steps, first_line(error))
        peaks, times = {}, {}
    rows = [head | {"provider": name} | empty_figures(reason) for name, reason in errors.items()]
    for name, values in times.items():
        rows.append(head | {"provider": name} | empty_figures(None) | speed(values, case.bytes, case.flops) | {
            "over_ours": paired_ratio(values, times["ours"]) if "ours" in times else None,
            "floor_percent": 100 * paired_ratio(times["floor"], values) if "floor" in times else None,
            "saved_mib": saved.get(name),
            "peak_mib": peaks.get(name),
        })  # fmt: skip
    return rows


def chosen_cases(families: Sequence[str], budget: Budget, device_type: str, in_time: bool) -> list[tuple[str, Case]]:
    """What is measured, in order; headlines and important families first where the time may not be enough for all."""
    chosen = [(f, case) for f in families for case in catalogue.load(f, budget is DRY, device_type)]
    if in_time:
        place = dict(zip(catalogue.IMPORTANT, itertools.count()))
        return sorted(chosen, key=lambda pair: (not pair[1].headline, place.get(pair[0], len(place))))
    return [(f, case) for f, case in chosen if budget is not QUICK or case.headline]


def is_lost(device: torch.device) -> bool:
    """Whether an earlier error left a GPU useless to this process, as an illegal access does."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.measure", description=__doc__)
    parser.add_argument("--families", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--budget", choices=BUDGETS, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", choices=catalogue.DEVICE_TYPES, help="those for this device type; else the device's")
    parser.add_argument("--first", type=int, default=0, help="the number of the case to begin with")
    parser.add_argument("--until", type=float, help="begin no case after this time, in seconds since the epoch")
    arguments = parser.parse_args(argv)
    budget, device = BUDGETS[arguments.budget], torch.device(arguments.device)
    device_type = arguments.cases or device.type
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    def emit(rows):
        for row in rows:
            print(json.dumps(row), flush=True)

    if arguments.first == 0:
        emit(measure_machine(budget, arguments.threads, device, device_type))
    until = arguments.until
    chosen = chosen_cases(arguments.families.split(","), budget, device_type, in_time=until is not None)
    bar = tqdm(chosen[arguments.first :], desc=f"{arguments.threads} thread(s)", unit="case", file=sys.stderr)
    for number, (family, case) in enumerate(bar, arguments.first):
        if until is not None and time.time() > until:
            print(f"out of time: {len(chosen) - number} of {len(chosen)} cases are not measured", file=sys.stderr)
            break
        bar.set_postfix_str(str(case))
        emit({"family": family} | row for row in measure(case, budget, arguments.threads, device, device_type))
        if is_lost(device):
            emit([{"next": number + 1}])  # in a process that can use the GPU
            break
        if device.type == "cuda":
            gc.collect()  # what autograd and compiled functions hold in cycles would be the next case's memory
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
