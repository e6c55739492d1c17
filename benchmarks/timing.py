"""How long a call takes and how much memory it holds, on a CPU and on a GPU.

One thread is timed by its own CPU time, so that other processes do not count; several threads by the wall clock. Calls
that are compared take turns, round by round, so that drift of the machine hits them alike; ratios are medians over
rounds of ratios within a round. A GPU is timed by its own events. On a CPU, for the dry run, the cases of a GPU are
called once, by the wall clock.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_leaves

MIN_SAMPLE = 5e-3  # seconds; shorter calls are repeated within a sample
GPU_SLICES = 3  # turns of each provider on a GPU, whose clock falls as it warms
MAX_GRAPHS = 16  # kept alive at once where only backward is timed
MIB = 2**20


@dataclass(frozen=True)
class Budget:
    seconds: float  # per case, after warming up
    min_rounds: int
    max_rounds: int
    gpu_seconds: float = 0.0  # the same, where a GPU is timed: its clock needs few rounds


FULL, QUICK, DRY = Budget(8.0, 7, 300, 3.0), Budget(2.5, 5, 100, 0.6), Budget(0.0, 1, 1)
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
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step.sample(time.perf_counter, 1)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """Bytes; the profiler sees every allocation and release of torch's allocator, in whatever kernel it is."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks to the terminal
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes), default=0)


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


def gpu_milliseconds(call: Callable[[], object], milliseconds: float, device: torch.device) -> list[float]:
    """Each of as many calls as fit in about ``milliseconds``, with a cold L2 cache; on a CPU one call, for dry runs."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]
    from triton.testing import do_bench

    return do_bench(call, warmup=min(25.0, milliseconds), rep=milliseconds, return_mode="all")


def time_gpu(steps: dict[str, Step], budget: Budget, device: torch.device) -> dict[str, list[float]]:
    """As :func:`time_cpu` by the GPU's clock; steps take turns by slices of many calls, as do_bench does them."""
    times, calls = {name: [] for name in steps}, {}
    for name, step in steps.items():
        if step.mode == "backward":
            output = step.output()
            call = lambda step=step, output=output: torch.autograd.grad(
                output, step.wanted, step.grad, retain_graph=True
            )
        else:
            call = lambda step=step: step.sample(time.perf_counter, 1)
        calls[name] = call
    slices = GPU_SLICES if device.type == "cuda" else 1
    for turn in range(slices):
        share = 1e3 * budget.gpu_seconds / len(steps) / slices
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        found = {name: gpu_milliseconds(calls[name], share, device) for name in order}
        rounds = min(map(len, found.values()))
        for name, values in found.items():
            times[name] += [ms / 1e3 for ms in values[:rounds]]
    return times


def time_steps(
    steps: dict[str, Step], budget: Budget, threads: int, device: torch.device, device_type: str
) -> dict[str, list[float]]:
    """Seconds per call, as cases for ``device_type`` are timed."""
    return time_gpu(steps, budget, device) if device_type == "cuda" else time_cpu(steps, budget, threads)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
