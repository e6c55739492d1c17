"""Everything that only a GPU can say, in one command of at most nine minutes.

``python benchmarks/gpu_check.py`` builds the package from source, runs the tests that need a GPU, measures the machine
and every operator beside its baselines, and looks for the borders between strategies. Each section has processes of its
own and a limit of its own: one that fails or hangs costs only itself. Measurements go to ``benchmarks/results/``, line
by line, the record of the check itself to ``benchmarks/results/checks/``, and there, too, measurements of families with
a red test; the table of all of them is printed last. ``--dry`` runs the same sections on the CPU at tiny sizes, with
the cases of a GPU; it writes nothing to the repository.

How nine minutes are shared on 16 cores: the build takes four at most (nvcc, file by file in parallel), the tests three
(dealt out to a process for each core), the borders two. The operators have what the build and the tests leave, and
leave the borders a good minute: headline cases first, the most important families first among them, then the others. A
headline case is some seconds of torch.compile and half a second of measuring; lists of hundreds of tensors are not
compiled by torch.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

if not __package__:  # called by its path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import cases, records, report, run

ROOT = records.ROOT
CHECKS = records.RESULTS / "checks"
LAST_LINES = 12  # of a process's output, kept in the record
FAILED_LINES = 400  # of one that failed, printed when its section ends
LAST_WORDS = 3.0  # seconds that a process over its limit has to end
LAST_CASE = 0.75  # minutes that the case or sweep begun last may take

# ---- sections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    name: str
    commands: Callable[[float], Sequence[Sequence[str]]]  # of the minutes that it has; they run side by side
    minutes: float  # the most it may take
    least: float = 0.0  # what the sections before it leave to it


@dataclass
class Outcome:
    name: str
    status: str  # "ok", "failed", "too long" or "interrupted"
    seconds: float
    said: list[str]  # the last lines of its output, or of what failed in it
    red: list[str] = field(default_factory=list)  # test files in which it saw something fail; "" for no file


def gpu_tests() -> list[str]:
    """Test files that have tests for a GPU, by their text: the mark, or a device chosen by what torch sees."""
    signs = ("mark.gpu", "ON_GPU", "cuda.is_available()")
    files = sorted(ROOT.glob("tests/test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if any(sign in f.read_text() for sign in signs)]


def dealt(files: Sequence[str], hands: int) -> list[list[str]]:
    """The tests of ``files`` in so many heaps, neighbours in different ones; files of which none is listed stay whole.

    Triton compiles about a thousand variants of its kernels for them, each for a second or more of one core.
    """
    listing = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files)
    said = ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        said = subprocess.run(listing, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120).stdout
    tests = [line for line in said.splitlines() if line.partition("::")[0] in files]
    listed = {test.partition("::")[0] for test in tests}
    tests += [file for file in files if file not in listed]
    return [tests[first::hands] for first in range(min(hands, len(tests)))]


def sections(dry: bool, folder: Path, device: str, commit: str | None) -> list[Section]:
    """``folder`` receives the measurements; what is no measurement of a case goes to its folder of checks.

    Nothing here imports the package, which is yet to be built.
    """
    out, strategies = folder / f"{device}.jsonl", folder / CHECKS.name / f"{device}-borders.jsonl"
    python, cores = sys.executable, len(os.sched_getaffinity(0))
    pytest = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *(["--collect-only"] if dry else []))
    build = (python, "-c", "import losssurf_fast")
    if not dry:
        build = ("env", "LOSSSURF_CUDA=1", python, "setup.py", "-q", "build_ext", "--inplace")
    bench = ("-m", "benchmarks.run", "--no-gate", "--cases", "cuda", "--out", str(out))
    how = ("--dry", "--threads", "1") if dry else ("--quick", "--device", "cuda")
    same = ("--commit", commit) if commit else ()

    def tests(_):
        one = ("env", "OMP_NUM_THREADS=1", "TORCHINDUCTOR_COMPILE_THREADS=1")
        return [(*one, python, *pytest, *tests) for tests in dealt(gpu_tests(), cores)]

    def until(minutes):  # for what begins nothing that it could not end
        return "--minutes", f"{max(minutes - LAST_CASE, 0.1):.2f}"

    def operators(minutes):
        return [(python, *bench, *how, *same, *until(minutes))]

    def borders(minutes):
        how = ["--dry"] if dry else until(minutes)
        return [(python, "-m", "benchmarks.borders", "--out", str(strategies), *how, *same)]

    return [
        Section("build", lambda _: [build], 4),
        Section("tests", tests, 3),
        Section("operators", operators, 7, least=2),
        Section("borders", borders, 2, least=1.25),
    ]


def carry_out(section: Section, deadline: float, later: float = 0.0) -> Outcome:
    """Run one section until its own limit or the deadline of all, less ``later`` seconds, whichever comes first."""
    start = time.monotonic()
    limit = min(60 * section.minutes, deadline - later - start)
    if limit <= 0:
        return Outcome(section.name, "too long", 0.0, ["the sections before it took all the time"])
    said = {"ok": [], "failed": [], "too long": []}
    red = set()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background, and the children's then, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as logs:
        children = []
        try:
            for number, command in enumerate(section.commands(limit / 60)):
                log = (Path(logs) / str(number)).open("w+")
                children.append((log, subprocess.Popen(
                    command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )))  # fmt: skip
            stopped = stop_late([child for _, child in children], start + limit)
        except BaseException:  # Ctrl-C: they are in groups of their own, and would go on
            stop_late([child for _, child in children], start)
            raise
        for log, child in children:
            status = "too long" if child in stopped else "failed" if child.returncode else "ok"
            with log:
                log.seek(0)
                text = log.read().replace(str(ROOT), ".").replace(str(Path.home()), "~")
            lines = [line.rstrip() for line in text.splitlines() if line.strip()]
            said[status].append(lines[-LAST_LINES:])
            if status != "ok":
                files = red_files(lines)
                red |= files or ({""} if status == "failed" else set())
                print("\n".join(lines[-FAILED_LINES:]), file=sys.stderr, flush=True)
    status = next(name for name in ("failed", "too long", "ok") if said[name])
    last = [line for log in said["too long"] + said["failed"] or said["ok"] for line in log]
    return Outcome(section.name, status, time.monotonic() - start, last, sorted(red))


def red_files(lines: Sequence[str]) -> set[str]:
    """Those of pytest's summary."""
    return {line.split()[1].partition("::")[0] for line in lines if line.startswith(("FAILED tests/", "ERROR tests/"))}


def stop_late(children: Sequence[subprocess.Popen], deadline: float) -> list[subprocess.Popen]:
    """Wait for ``children`` until the deadline; end those still there then, with what they started, and return them.

    pytest gets a moment to say which tests had failed.
    """
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    late = [child for child in children if child.poll() is None]
    try:
        for child in late:
            _signal(child, signal.SIGINT)
        last = time.monotonic() + LAST_WORDS
        for child in late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, last - time.monotonic()))
    finally:
        for child in late:
            _signal(child, signal.SIGKILL)
            child.wait()
    return late


def _signal(child: subprocess.Popen, number: int) -> None:
    """To the whole group, of which something may be left when the child itself is not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def environment() -> dict[str, str]:
    return run.with_path() | {"MAX_JOBS": str(len(os.sched_getaffinity(0)))}


# ---- the check -----------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    header = ("section", "status", "seconds", "last line")
    last = lambda said: textwrap.shorten(said[-1], 60, placeholder=" ...") if said else ""
    lines = [(o.name, o.status, f"{o.seconds:.0f}", last(o.said)) for o in outcomes]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *lines)
    )


def lines_of(file: Path, start: int) -> list[dict]:
    """What was appended to ``file`` since it had ``start`` bytes."""
    if not file.exists():
        return []
    with file.open() as text:
        text.seek(start)
        return [json.loads(line) for line in text if line.endswith("\n")]


def red_families(outcomes: Sequence[Outcome]) -> set[str]:
    """Families with a red test among their files; all of them where a red test is of none."""
    red = [file for outcome in outcomes for file in outcome.red if outcome.name == "tests"]
    found = [{family for family in cases.families() if file in run.test_files(family)} for file in red]
    return set().union(*found) if all(found) else set(cases.families())


def settle(results: Path, start: int, families: set[str], beside: Path) -> list[dict]:
    """The rows that were appended to ``results`` since it had ``start`` bytes; these families' are taken over to
    ``beside``, and a line that was cut off is dropped.
    """
    rows = lines_of(results, start)
    as_text = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    if results.exists():
        with results.open("r+") as file:
            file.truncate(start)
            file.seek(start)
            file.write(as_text(row for row in rows if row["family"] not in families))
    if withdrawn := [row for row in rows if row["family"] in families]:
        with beside.open("a") as file:
            file.write(as_text(withdrawn))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU at tiny sizes; writes to --out alone, if given")
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that all sections may take (default 9)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go (default benchmarks/results)")
    parser.add_argument("--commit", help=run.COMMIT_HELP)
    arguments = parser.parse_args(argv)
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry runs the same sections on the CPU")
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    device = "cpu" if arguments.dry else "cuda"
    shared = run.origin(device, "dry" if arguments.dry else "quick", arguments.commit)
    if shared["commit"] is None and not arguments.dry:
        parser.error("git is not here, so results need the commit that this is: --commit SHA")
    notes = []
    if shared["dirty"] and not arguments.dry:
        notes.append("The tree has uncommitted changes, so reports leave these figures out.")
        print(f"gpu_check: {notes[-1]}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.out or (Path(scratch) if arguments.dry else records.RESULTS)).resolve()
        try:
            (folder / CHECKS.name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {folder} cannot be written to: {error.strerror}")
        name = records.slug(shared["device"])
        out = folder / f"{name}.jsonl"
        before = out.stat().st_size if out.exists() else 0
        listed, outcomes = sections(arguments.dry, folder, name, arguments.commit), []
        for number, section in enumerate(listed):
            print(f"gpu_check: {section.name} ...", file=sys.stderr, flush=True)
            later = 60 * sum(other.least for other in listed[number + 1 :])
            try:
                outcomes.append(carry_out(section, deadline, later))
            except KeyboardInterrupt:
                outcomes.append(Outcome(section.name, "interrupted", 0.0, []))
                break
        with (folder / CHECKS.name / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(shared | {"sections": [asdict(outcome) for outcome in outcomes]}) + "\n")
        red = red_families(outcomes) if lines_of(out, before) else set()  # else the package may not be there to ask
        measured = settle(out, before, red, folder / CHECKS.name / f"{name}-unconfirmed.jsonl")
    borders = [line for outcome in outcomes if outcome.name == "borders" for line in outcome.said]
    if arguments.dry:
        notes.append("A dry run: its figures say nothing of any machine.")
    elif measured:
        missing = report.unmeasured(measured, shared["device"])
        notes.append(f"{len(missing)} cases of a GPU were not measured." if missing else "Every case was measured.")
    if red:
        notes.append(f"Tests are red, so figures of {', '.join(sorted(red))} are kept beside the results.")
    if any(outcome.name == "tests" and outcome.status == "too long" for outcome in outcomes):
        notes.append("Not all tests were run.")
    print("\n\n".join(filter(None, (table(outcomes), "\n".join(borders), report.terminal(measured), *notes))))
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
