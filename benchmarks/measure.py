"""Measures the cases of some families in this process and prints one JSON row per line.

``benchmarks.run`` starts this module once per thread count, because the environment that pins OpenMP threads must be
set before torch is loaded. One thread is timed by its own CPU time, so that other processes do not count; several
threads by the wall clock. Providers take turns, round by round, so that drift of the machine hits them alike; ratios
are medians over rounds of ratios within a round.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import cases as catalogue
from benchmarks.cases import Case, Setup
from benchmarks.gemm import mm, onednn

MIN_SAMPLE = 5e-3  # seconds; shorter calls are repeated within a sample
MAX_GRAPHS = 16  # kept alive at once where only backward is timed
MIB = 2**20


@dataclass(frozen=True)
class Budget:
    seconds: float  # per case, after warming up
    min_rounds: int
    max_rounds: int


FULL, QUICK, DRY = Budget(8.0, 7, 300), Budget(2.5, 5, 100), Budget(0.0, 1, 1)
BUDGETS = {"full": FULL, "quick": QUICK, "dry": DRY}

# ---- statistics ----------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, ``q`` in [0, 1]."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of ``numerator / denominator`` within the round."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


# ---- providers -----------------------------------------------------------------------------------------------------


class Step:
    """One provider in one mode: ``forward`` without a graph, ``full`` with one, ``backward`` over ready graphs."""

    def __init__(self, function: Callable, inputs: tuple, mode: str):
        self.function, self.inputs, self.mode = function, inputs, mode
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        tensors = (t for t in (*tree_leaves(inputs), *parameters) if isinstance(t, torch.Tensor))
        self.wanted = [t for t in tensors if t.requires_grad]
        self.grad = None

    def output(self) -> torch.Tensor | Sequence[torch.Tensor]:
        return self.function(*self.inputs)

    def differentiate(self, output: torch.Tensor | Sequence[torch.Tensor]) -> None:
        if isinstance(output, torch.Tensor):
            torch.autograd.grad(output, self.wanted, self.grad, allow_unused=False)
        else:  # torch.autograd.grad looks at each gradient in Python first, which takes as long as a kernel
            roots, wanted = tuple(output), tuple(self.wanted)
            _engine_run_backward(roots, self.grad, False, False, wanted, allow_unreachable=False, accumulate_grad=False)

    def warm_up(self) -> None:
        """Compiles what has to be compiled and fixes the gradient that backward starts from."""
        if self.mode != "forward":
            output = self.output()
            single = isinstance(output, torch.Tensor)
            self.grad = torch.randn_like(output) if single else tuple(torch.randn_like(o) for o in output)
        for _ in range(2):
            self.sample(time.perf_counter, 1)

    def sample(self, clock: Callable[[], float], repeats: int) -> float:
        """Seconds per call, over ``repeats`` calls."""
        if self.mode == "forward":
            with torch.no_grad():
                start = clock()
                for _ in range(repeats):
                    self.output()
                return (clock() - start) / repeats
        if self.mode == "full":
            start = clock()
            for _ in range(repeats):
                self.differentiate(self.output())
            return (clock() - start) / repeats
        outputs = [self.output() for _ in range(repeats)]
        start = clock()
        for output in outputs:
            self.differentiate(output)
        return (clock() - start) / repeats

    def saved_mib(self) -> float:
        """MiB kept for backward, parameters excluded; views of one storage count once."""
        parameters = {t.untyped_storage().data_ptr() for t in self.wanted if isinstance(t, nn.Parameter)}
        kept = []

        def keep(tensor):
            kept.append(tensor.untyped_storage())  # alive, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.output()
        storages = {storage.data_ptr(): storage.nbytes() for storage in kept}
        return sum(size for place, size in storages.items() if place not in parameters) / MIB


def peak_mib(step: Step, device: torch.device) -> float:
    """Most memory that one call's tensors hold on ``device`` beyond what was held before it."""
    if device.type == "cpu":
        return _peak_on_cpu(lambda: step.sample(time.perf_counter, 1)) / MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.sample(time.perf_counter, 1)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """Bytes; the profiler sees every allocation and release of torch's allocator, in whatever kernel it is."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks to the terminal
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def make_step(name: str, setup: Setup, mode: str, backend: str) -> Step:
    if name == "floor":
        return Step(lambda: setup.floor(), (), "forward")
    function = setup.providers[name]
    if name == "compiled":
        function = torch.compile(function, dynamic=False, backend=backend)
    return Step(function, setup.inputs, mode)


# ---- timing --------------------------------------------------------------------------------------------------------


def time_cpu(steps: dict[str, Step], budget: Budget, threads: int) -> dict[str, list[float]]:
    """Seconds per call of every step, one value per round; steps take turns within a round."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, step in steps.items():
        quick = min(step.sample(time.perf_counter, 1) for _ in range(2 if budget.max_rounds > 1 else 1))
        limit = MAX_GRAPHS if step.mode == "backward" else 10_000
        repeats[name] = max(1, min(limit, round(MIN_SAMPLE / quick))) if budget.max_rounds > 1 else 1
    times = {name: [] for name in steps}
    end = time.perf_counter() + budget.seconds
    for done in range(budget.max_rounds):
        if done >= budget.min_rounds and time.perf_counter() > end:
            break
        for name, step in steps.items():
            if repeats[name] > 1:
                step.sample(clock, 1)  # what the step before left in the caches is not this one's business
            times[name].append(step.sample(clock, repeats[name]))
    return times


def time_gpu(steps: dict[str, Step], budget: Budget) -> dict[str, list[float]]:
    """As :func:`time_cpu` with CUDA events and a cold L2 cache; steps run one after the other, as do_bench does it."""
    from triton.testing import do_bench

    times = {}
    for name, step in steps.items():
        if step.mode == "backward":
            output = step.output()
            call = lambda step=step, output=output: torch.autograd.grad(
                output, step.wanted, step.grad, retain_graph=True
            )
        else:
            call = lambda step=step: step.sample(time.perf_counter, 1)
        times[name] = [ms / 1e3 for ms in do_bench(call, rep=1e3 * budget.seconds / len(steps), return_mode="all")]
    rounds = min(map(len, times.values()))
    return {name: values[:rounds] for name, values in times.items()}


def measure(case: Case, budget: Budget, threads: int, device: torch.device) -> list[dict]:
    """Rows of one case, one per provider; a provider that fails gives a row with its reason in ``error``."""
    torch._dynamo.reset()  # else later shapes of one function hit the recompile limit and run uncompiled
    head = {
        "op": case.op, "variant": case.variant, "mode": case.mode, "dtype": case.dtype, "shape": list(case.shape),
        "threads": threads,
    }  # fmt: skip
    backend = "aot_eager" if budget is DRY else "inductor"
    setup, steps, errors, saved = case.setup(device), {}, {}, {}
    for name in (*setup.providers, "floor"):
        try:
            step = make_step(name, setup, case.mode, backend)
            step.warm_up()
            if case.mode == "full" and name != "floor":
                saved[name] = step.saved_mib()
            steps[name] = step
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    peaks = {}
    if device.type == "cuda":
        peaks = {name: peak_mib(step, device) for name, step in steps.items()}
        times = time_gpu(steps, budget)
    else:
        times = time_cpu(steps, budget, threads)
    rows = [head | {"provider": name} | empty_figures(reason) for name, reason in errors.items()]
    for name, values in times.items():
        rows.append(head | {"provider": name} | empty_figures(None) | speed(values, case.bytes, case.flops) | {
            "over_ours": paired_ratio(values, times["ours"]) if "ours" in times else None,
            "floor_percent": 100 * paired_ratio(times["floor"], values) if "floor" in times else None,
            "saved_mib": saved.get(name),
            "peak_mib": peaks.get(name),
        })  # fmt: skip
    return rows


def speed(values: Sequence[float], moved: int, flops: int) -> dict:
    median = statistics.median(values)
    return {
        "rounds": len(values),
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * percentile(values, 0.2),
        "p80_ms": 1e3 * percentile(values, 0.8),
        "gbps": moved / median / 1e9,
        "gflops": flops / median / 1e9,
    }


FIGURES = (
    "rounds", "median_ms", "p20_ms", "p80_ms", "gbps", "gflops", "over_ours", "floor_percent", "saved_mib", "peak_mib",
)  # fmt: skip


def empty_figures(error: str | None) -> dict:
    return dict.fromkeys(FIGURES) | {"error": error}


# ---- the machine ---------------------------------------------------------------------------------------------------


def measure_machine(budget: Budget, threads: int, device: torch.device) -> list[dict]:
    """Rows of what this machine can do at most: bandwidth of memory, rates of the library's GEMMs."""
    tiny = budget is DRY
    size, (m, n, k) = (2**10, (4, 3, 5)) if tiny else (2**24, (512, 4096, 1024))
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    work = {
        ("copy", "fp32"): (lambda: target.copy_(source), (size,), 8 * size, 0),
        ("read", "fp32"): (lambda: source.sum(), (size,), 4 * size, 0),
        ("fill", "fp32"): (lambda: target.fill_(1.0), (size,), 4 * size, 0),
    }
    for dtype in ("fp32", "bf16"):
        a = torch.randn(m, k, device=device).to(catalogue.dtype_of(dtype))
        b = torch.randn(n, k, device=device).to(a.dtype)
        for product in (mm, onednn) if device.type == "cpu" else (mm,):
            call = lambda product=product, a=a, b=b: product(a, b.t())
            traffic = a.element_size() * (m * k + n * k + m * n)
            work[f"gemm {product.__name__}", dtype] = (call, (m, n, k), traffic, 2 * m * n * k)
    steps = {key: Step(call, (), "forward") for key, (call, *_) in work.items()}
    for step in steps.values():
        step.warm_up()
    times = time_gpu(steps, budget) if device.type == "cuda" else time_cpu(steps, budget, threads)
    rows = []
    for (provider, dtype), values in times.items():
        _, shape, moved, flops = work[provider, dtype]
        head = {
            "family": "machine", "op": "machine", "variant": "", "mode": "forward", "dtype": dtype,
            "shape": list(shape), "threads": threads, "provider": provider,
        }  # fmt: skip
        rows.append(head | empty_figures(None) | speed(values, moved, flops))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.measure", description=__doc__)
    parser.add_argument("--families", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--budget", choices=BUDGETS, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    budget, device = BUDGETS[arguments.budget], torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    def emit(rows):
        for row in rows:
            print(json.dumps(row), flush=True)

    emit(measure_machine(budget, arguments.threads, device))
    chosen = [
        (family, case)
        for family in arguments.families.split(",")
        for case in catalogue.load(family, tiny=budget is DRY)
        if budget is not QUICK or case.headline
    ]
    bar = tqdm(chosen, desc=f"{arguments.threads} thread(s)", unit="case", file=sys.stderr)
    for family, case in bar:
        bar.set_postfix_str(str(case))
        emit({"family": family} | row for row in measure(case, budget, arguments.threads, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
