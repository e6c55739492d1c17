"""Runs the benchmarks and appends their rows to ``benchmarks/results/<machine>.jsonl``.

Each thread count is measured by a process of its own, ``benchmarks.measure``, with OpenMP threads pinned to cores: on
virtual machines unpinned threads may share one core. A family is measured only after its tests have passed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import cases, report
from benchmarks.records import RESULTS, ROOT, slug
from benchmarks.timing import empty_figures

# A run writes these itself, they do not make its figures unclean.
WRITTEN_BY_BENCHMARKS = ("benchmarks/results", "README.md", "docs/performance.md")

COMMIT_HELP = "the commit that this tree is a clean copy of, where there is no git to ask"

# ---- what a row says about its origin ------------------------------------------------------------------------------


def cpu_model() -> str:
    """The processor's name without trademarks and clock."""
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", name, flags=re.IGNORECASE).split())


def describe_device(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    from losssurf_fast import _C

    cores = len(os.sched_getaffinity(0))
    return f"{cpu_model()}, {_C.instruction_set()}, {cores} core{'s' if cores > 1 else ''}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(device: str, budget: str, commit: str | None = None) -> dict:
    """The fields that all rows of a run share; ``commit`` counts where git does not know."""
    changes = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN_BY_BENCHMARKS))
    head = _git("rev-parse", "HEAD")
    if head is None and commit is not None:
        head, changes = commit, ""
    return {
        "device": describe_device(device),
        "torch": _version("torch"), "triton": _version("triton"), "numpy": _version("numpy"),
        "commit": head,
        "dirty": changes is None or changes != "",
        "budget": budget,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


# ---- the run -------------------------------------------------------------------------------------------------------


def with_path() -> dict[str, str]:
    """This process's environment, with the repository where Python looks for modules."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def environment(threads: int) -> dict[str, str]:
    """Environment of a measuring process: one pinned core per thread, set before torch is loaded."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return with_path() | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
        # The allocator keeps freed pages. Otherwise it depends on the heap's layout, that is on luck, which provider
        # pays page faults, and on virtual machines they cost more than the arithmetic.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }


def test_files(family: str) -> list[str]:
    """Of the family, and of those whose names begin with its: they share code."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/test_{family}*.py"))


def gate(family: str) -> str | None:
    """Why the family's tests are not green, or None; a kernel with a red test has no speed."""
    pattern, files = f"tests/test_{family}*.py", test_files(family)
    if not files:
        return f"there is no {pattern}"
    print(f"{' '.join(files)} ...", file=sys.stderr, flush=True)
    everything = environment(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    done = subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
    return f"{pattern} is not green: {last.strip('= ')}"


def gate_row(family: str, reason: str) -> dict:
    blank = {"op": family, "variant": "", "provider": "ours", "mode": "", "dtype": "", "shape": [], "threads": None}
    return {"family": family} | blank | empty_figures(reason)


def measure(families: Sequence[str], threads: int, budget: str, device: str, device_type: str, minutes: float | None):
    """Rows of ``benchmarks.measure`` in a process of its own; in another one after a case that broke its GPU.

    Raises:
        RuntimeError: that process failed as a whole.
    """
    command = [
        sys.executable, "-m", "benchmarks.measure", "--families", ",".join(families),
        "--threads", str(threads), "--budget", budget, "--device", device, "--cases", device_type,
    ]  # fmt: skip
    if minutes is not None:
        command += ["--until", str(time.time() + 60 * minutes)]
    # On a GPU nothing is pinned: the processes in which torch.compile compiles would share the one core.
    where = environment(threads) if device == "cpu" else with_path()
    first = 0
    while first is not None:
        started = [*command, "--first", str(first)]
        first = None
        with subprocess.Popen(started, cwd=ROOT, env=where, stdout=subprocess.PIPE, text=True) as child:
            for row in map(json.loads, child.stdout):
                if "next" in row:
                    first = row["next"]
                else:
                    yield row
        if child.returncode:
            raise RuntimeError(f"benchmarks: measuring with {threads} thread(s) ended with status {child.returncode}")


def _device(text: str) -> str:
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there, torch sees {torch.cuda.device_count()} CUDA devices")
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure the operators against what they replace.")
    parser.add_argument("--only", metavar="FAMILY,...", help="measure these families alone")
    parser.add_argument("--quick", action="store_true", help="the headline cases alone, about three minutes")
    parser.add_argument("--dry", action="store_true", help="every case at a tiny size, one round: checks, not figures")
    parser.add_argument("--threads", default="1,2", metavar="N,...", help="thread counts to measure (default 1,2)")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--cases", choices=cases.DEVICE_TYPES, help="those for this device type; by default the device's"
    )
    parser.add_argument("--minutes", type=float, help="all cases, headlines first, none begun after so many minutes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to append to; by default the machine's")
    parser.add_argument("--commit", help=COMMIT_HELP)
    parser.add_argument("--no-gate", action="store_true", help="do not run the family's tests first")
    arguments = parser.parse_args(argv)
    arguments.cases = arguments.cases or arguments.device.partition(":")[0]
    if arguments.cases == "cuda" and arguments.device == "cpu" and not arguments.dry:
        parser.error("--cases cuda needs --device cuda; on a CPU it is for --dry alone, whose rows are no figures")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    counts = arguments.threads.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in counts):
        parser.error(f"--threads must be positive whole numbers separated by commas, got {arguments.threads!r}")
    arguments.threads = [int(n) for n in counts]
    try:
        arguments.families = cases.families(arguments.only.split(",") if arguments.only else None)
    except ValueError as error:
        parser.error(str(error))
    if arguments.out:
        try:  # now, not when minutes of measuring are to be saved
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.open("a").close()
        except OSError as error:
            parser.error(f"--out {arguments.out} cannot be written to: {error.strerror}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    budget = "dry" if arguments.dry else "quick" if arguments.quick else "full"
    shared = origin(arguments.device, budget, arguments.commit) | {"cases": arguments.cases}
    out = arguments.out or (None if arguments.dry else RESULTS / f"{slug(shared['device'])}.jsonl")
    rows = []
    for row in measured_rows(arguments, budget):
        rows.append(row | shared)
        if out:  # at once: a run that is killed keeps what it has
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if out:
        print(f"{len(rows)} rows appended to {out}", file=sys.stderr)
        if shared["dirty"]:
            print("bench: the tree has uncommitted changes, so reports leave these rows out", file=sys.stderr)
    print(report.terminal(rows))
    return 1 if any(row["error"] for row in rows) else 0


def measured_rows(arguments: argparse.Namespace, budget: str):
    reasons = {} if arguments.no_gate or arguments.dry else {f: gate(f) for f in arguments.families}
    yield from (gate_row(family, reason) for family, reason in reasons.items() if reason)
    green = [family for family in arguments.families if not reasons.get(family)]
    cores = len(os.sched_getaffinity(0))
    for threads in arguments.threads if arguments.device == "cpu" else (1,):
        if threads > cores:
            print(f"bench: {threads} threads are not measured, {cores} core(s) are available", file=sys.stderr)
        elif green:
            yield from measure(green, threads, budget, arguments.device, arguments.cases, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
