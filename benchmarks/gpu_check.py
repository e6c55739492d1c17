"""Everything that only a GPU can say, in one command of at most nine minutes: ``python -m benchmarks.gpu_check``.

It builds the package from source, runs the tests that need a GPU, measures every operator beside its baselines and
looks for the borders between strategies. Each section is a process of its own with a limit of its own: one that fails
or hangs costs only itself. Measurements go to ``benchmarks/results/``, the record of the check itself to
``benchmarks/results/checks/``, and a table of the sections is printed last. ``--dry`` runs the same sections on the CPU
at tiny sizes; it writes nothing to the repository.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import report, run

ROOT = run.ROOT
CHECKS = report.RESULTS / "checks"
LAST_LINES = 12  # of a section's output, kept in the record
FAILED_LINES = 400  # of a section that failed, printed when it ends

# ---- sections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    name: str
    command: tuple[str, ...]
    minutes: float  # the most it may take


@dataclass
class Outcome:
    name: str
    status: str  # "ok", "failed" or "too long"
    seconds: float
    said: list[str]  # the last lines of its output


def gpu_tests() -> list[str]:
    """Test files that have tests for a GPU, by their text: the mark, or a device chosen by what torch sees."""
    signs = ("mark.gpu", "needs_gpu", "cuda.is_available()", "ON_GPU")
    files = sorted(ROOT.glob("tests/test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if any(sign in f.read_text() for sign in signs)]


def sections(dry: bool, folder: Path, device: str) -> list[Section]:
    """``folder`` receives the measurements; what is no measurement of a case goes to its folder of checks."""
    out, strategies = folder / f"{device}.jsonl", folder / CHECKS.name / f"{device}-borders.jsonl"
    python = sys.executable
    # Triton compiles about a thousand variants of its kernels for these tests, each for a second or more of one core.
    workers = ("-n", str(cores()), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *workers, *gpu_tests())
    bench = (python, "-m", "benchmarks.run", "--no-gate", "--out", str(out))
    borders = (python, "-m", "benchmarks.borders", "--out", str(strategies))
    if dry:
        return [
            Section("build", (python, "-c", "import losssurf_fast"), 1),
            Section("tests", (*pytest, "--collect-only"), 2),
            Section("operators", (*bench, "--dry", "--threads", "1", "--only", "noise,lrt"), 5),
            Section("borders", (*borders, "--dry"), 2),
        ]
    return [
        Section("build", (python, "setup.py", "-q", "build_ext", "--inplace"), 4),
        Section("tests", pytest, 3),
        Section("operators", (*bench, "--quick", "--device", "cuda"), 4),
        Section("borders", borders, 1.5),
    ]


def carry_out(section: Section, deadline: float) -> Outcome:
    """Run one section until its own limit or the deadline of all, whichever comes first."""
    start = time.monotonic()
    limit = min(60 * section.minutes, deadline - start)
    if limit <= 0:
        return Outcome(section.name, "too long", 0.0, ["the sections before it took all the time"])
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            section.command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if child.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)  # the compilers and measuring processes that it started, too
            child.wait()
            status = "too long"
        log.seek(0)
        lines = [line.rstrip() for line in log.read().splitlines() if line.strip()]
    if status != "ok":
        print("\n".join(lines[-FAILED_LINES:]), file=sys.stderr, flush=True)
    return Outcome(section.name, status, time.monotonic() - start, lines[-LAST_LINES:])


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "MAX_JOBS": str(cores())}


def cores() -> int:
    return len(os.sched_getaffinity(0))


# ---- the check -----------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    header = ("section", "status", "seconds", "last line")
    lines = [(o.name, o.status, f"{o.seconds:.0f}", o.said[-1][:60] if o.said else "") for o in outcomes]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *lines)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="the same sections on the CPU at tiny sizes; writes nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that all sections may take (default 9)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry runs the same sections on the CPU")
    device = "cpu" if arguments.dry else "cuda"
    shared = run.origin(device, "dry" if arguments.dry else "quick")
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or (Path(scratch) if arguments.dry else report.RESULTS)
        (folder / CHECKS.name).mkdir(parents=True, exist_ok=True)
        name = report.slug(shared["device"])
        outcomes = []
        for section in sections(arguments.dry, folder, name):
            print(f"gpu_check: {section.name} ...", file=sys.stderr, flush=True)
            outcomes.append(carry_out(section, deadline))
        with (folder / CHECKS.name / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(shared | {"sections": [asdict(outcome) for outcome in outcomes]}) + "\n")
    print(table(outcomes))
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
