"""Results for the terminal, headlines in README.md, all of them in docs/performance.md with a picture per family.

Measures nothing.

For every device and case the newest run counts that measured a committed tree; full runs go before quick ones.
``speedup`` is over the strongest baseline of the row (eager, torch.compile, the library), ``target`` over eager, both
as medians of ratios within a round; ``floor`` is the share of the speed that the bare GEMMs or one pass over the bytes
reach, measured in the same rounds. Of a GPU's cases, whose targets are of several kinds, the ratios to every baseline
are shown, the share of what the machine copies, and memory. A case of a GPU without a row is "not measured".
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases as catalogue
from benchmarks.cases import BASELINES
from benchmarks.pictures import MODE, drawable, pictures
from benchmarks.records import (
    RESULTS,
    ROOT,
    case_key,
    copy_rate,
    device_type,
    grouped,
    known_case,
    known_cases,
    newest,
    rate_unit,
    read,
    speedup,
)

README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADER = ("operator", "shape", "dtype", "mode", "eager", "compiled", "torch", "ours", "speedup", "target", "floor")
LEGEND = "speedup: over the fastest of eager, compiled, torch. target: over eager. floor: share of the floor's speed."
GPU_HEADER = (
    "operator", "shape", "dtype", "mode", "ms", "/eager", "/compiled", "/torch", "floor", "copy", "MiB", "of eager's",
    "targets",
)  # fmt: skip
GPU_LEGEND = (
    "/eager, /compiled, /torch: their times over ours. floor: share of the floor's speed. copy: bytes a second, as a "
    "share of the machine's copy. MiB: the most that a call holds, and as a share of eager's."
)

PERFORMANCE_HEAD = """# Every measurement

Written by `python -m benchmarks.report --readme` from `benchmarks/results/`. Each row is one run on one machine, ours
and the baselines in turns; losing shapes stay. What no run has measured is called so; no number here is a model's.
`make bench` measures your machine, `python benchmarks/gpu_check.py` a GPU."""

ROOFLINES = """## Time against size

A picture for each device and family. The grey lines are ceilings that the machine itself measured: the case's bytes
at the speed of a copy, its operations at the rate of the library's fastest GEMM. A call can be below the first where
caches hold its data, or where it writes to what it has read: a copy on a CPU also fetches what it overwrites. The
dotted line is the floor: the bare GEMMs, or one pass over the bytes, measured in the same rounds. A ring marks a case
where a baseline is faster than ours."""

# ---- lines of a table ----------------------------------------------------------------------------------------------


def milliseconds(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["error"]:
        return "failed"
    value = row["median_ms"]
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def line(key: tuple, rows: Sequence[dict], case: catalogue.Case | None) -> tuple[str, ...]:
    op, variant, shape, dtype, mode = key
    providers = {row["provider"]: row for row in rows}
    ratio, target = speedup(providers), case.targets.get(rows[0]["threads"]) if case else None
    over_eager = providers["eager"]["over_ours"] if "eager" in providers else None
    missed = target is not None and (over_eager is None or over_eager < target)
    percent = providers["ours"]["floor_percent"] if "ours" in providers else None
    return (
        " ".join(filter(None, (op, variant))),
        "x".join(map(str, shape)),
        dtype,
        MODE[mode],
        *(milliseconds(providers.get(name)) for name in (*BASELINES, "ours")),
        "-" if ratio is None else f"{ratio:.2f}x",
        "-" if target is None else f"{target:g}x" + (" missed" if missed else ""),
        "-" if percent is None else f"{percent:.0f}%",
    )


def saved_lines(rows: Sequence[dict], known: dict) -> list[tuple[str, ...]]:
    """Memory kept for backward, where a case has a target for it."""
    lines = []
    for group in grouped(rows, case_key).values():
        case = known_case(known, group[0])
        saved = {row["provider"]: row["saved_mib"] for row in group}
        if case is None or case.saved_target is None or not (saved.get("eager") and saved.get("ours")):
            continue
        share = saved["ours"] / saved["eager"]
        target = f"{case.saved_target:.0%}" + (" missed" if share > case.saved_target else "")
        numbers = (f"{saved['eager']:.1f}", f"{saved['ours']:.1f}", f"{share:.0%}", target)
        lines.append(
            (" ".join(filter(None, (case.op, case.variant))), "x".join(map(str, case.shape)), case.dtype, *numbers)
        )
    return lines


def targets(case: catalogue.Case | None, providers: dict[str, dict], copied: float | None) -> list[tuple[str, bool]]:
    """A GPU case's targets in words, each with whether it was met; what was not measured does not meet any."""
    if case is None:
        return []
    ours, eager = providers.get("ours", {}), providers.get("eager", {})
    share = of_copy(ours, copied)
    reached = [
        ("eager", case.targets.get(1), eager.get("over_ours"), "x"),
        ("compiled", case.compiled_target, providers.get("compiled", {}).get("over_ours"), "x"),
        ("copy", case.copy_target, share, "%"),
    ]
    words = lambda target, unit: f"{target:g}x" if unit == "x" else f"{target:.0%}"
    met = [
        (f"{name} {words(target, unit)}", value is not None and value >= target)
        for name, target, value, unit in reached
        if target is not None
    ]
    if case.peak_target is not None:
        peak = peak_share(ours, eager)
        met.append((f"memory {case.peak_target:.0%}", peak is not None and peak <= case.peak_target))
    return met


def of_copy(ours: dict, copied: float | None) -> float | None:
    return ours["gbps"] / copied if ours.get("gbps") and copied else None


def peak_share(ours: dict, eager: dict) -> float | None:
    return ours["peak_mib"] / eager["peak_mib"] if ours.get("peak_mib") is not None and eager.get("peak_mib") else None


def gpu_line(key: tuple, rows: Sequence[dict], case: catalogue.Case | None, copied: float | None) -> tuple[str, ...]:
    op, variant, shape, dtype, mode = key
    providers = {row["provider"]: row for row in rows}
    ours, eager = providers.get("ours", {}), providers.get("eager", {})
    number = lambda value, form: "-" if value is None else form.format(value)
    return (
        " ".join(filter(None, (op, variant))),
        "x".join(map(str, shape)),
        dtype,
        MODE[mode],
        milliseconds(ours or None),
        *(number(providers.get(name, {}).get("over_ours"), "{:.2f}x") for name in BASELINES),
        number(ours.get("floor_percent"), "{:.0f}%"),
        number(of_copy(ours, copied), "{:.0%}"),
        number(ours.get("peak_mib"), "{:.0f}"),
        number(peak_share(ours, eager), "{:.0%}"),
        ", ".join(text + ("" if met else " missed") for text, met in targets(case, providers, copied)) or "-",
    )


def machine_line(rows: Sequence[dict]) -> str:
    """What the machine itself reached in the run."""
    rows = [row for row in rows if not row["error"]]
    memory = [f"{row['provider']} {row['gbps']:.0f}" for row in rows if row["provider"] in ("copy", "read", "fill")]
    products = [row for row in rows if row["provider"].startswith("gemm")]
    divisor, unit = rate_unit([row["gflops"] for row in products])
    gemms = [f"{r['provider'].removeprefix('gemm ')} {r['dtype']} {r['gflops'] / divisor:.0f}" for r in products]
    return f"Memory {', '.join(memory)} GB/s; GEMM {', '.join(gemms)} {unit}."


# ---- documents -----------------------------------------------------------------------------------------------------


def sections(rows: Sequence[dict], table) -> str:
    """All devices; ``table(header, lines)`` draws one table."""
    parts = []
    for device, of_device in grouped(rows, lambda row: row["device"]).items():
        measured = [row for row in of_device if row["family"] != "machine"]
        if not measured:
            continue
        commits = sorted({(row["commit"] or "unknown")[:9] + (" with changes" * row["dirty"]) for row in measured})
        latest = max(row["date"] for row in measured)[:10]
        parts.append(f"{device}; torch {measured[0]['torch']}; commit {', '.join(commits)}; {latest}. Times in ms.")
        for row in measured:
            if row["threads"] is None:
                parts.append(f"{row['family']}: not measured, {row['error']}.")
        known = known_cases(measured)
        timed = [row for row in measured if row["threads"] is not None]
        kinds = grouped(timed, lambda row: (device_type(row), row["threads"]))
        for (kind, threads), group in kinds.items():
            clock = "1 thread, CPU time" if threads == 1 else f"{threads} pinned threads, wall time"
            clock = "GPU time" if kind == "cuda" else clock
            machine = [row for row in of_device if row["family"] == "machine" and row["threads"] == threads]
            parts.append(f"**{clock}.** {machine_line(machine)}" if machine else f"**{clock}.**")
            for _, of_family in sorted(grouped(group, lambda row: row["family"]).items()):
                cases = [(key, rows, known_case(known, rows[0])) for key, rows in grouped(of_family, case_key).items()]
                if kind == "cuda":
                    copied = copy_rate(machine)
                    parts.append(table(GPU_HEADER, [gpu_line(*case, copied) for case in cases]))
                else:
                    parts.append(table(HEADER, [line(*case) for case in cases]))
        parts += [{"cpu": LEGEND, "cuda": GPU_LEGEND}[kind] for kind in sorted({kind for kind, _ in kinds})]
        failed = [row for row in timed if row["error"]]
        if failed:
            parts.append(
                "\n".join(
                    f"- failed: {catalogue.title(case_key(row))}, {row['provider']}: {row['error']}" for row in failed
                )
            )
        saved = saved_lines([row for row in timed if row["threads"] == timed[0]["threads"]], known) if timed else []
        if saved:
            parts.append("Saved for backward, parameters excluded, MiB:")
            parts.append(table(("operator", "shape", "dtype", "eager", "ours", "share", "target"), saved))
    return "\n\n".join(parts) if parts else "No results yet: `python -m benchmarks.run`."


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if index < 4 else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def plain_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        " ".join(
            c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (header, *lines)
    )


def unmeasured(rows: Sequence[dict], device: str | None) -> list[tuple[str, ...]]:
    """Lines of a GPU's cases that have no row of ``device``."""
    seen = {case_key(row) for row in rows if device_type(row) == "cuda" and row["device"] == device}
    return [
        (
            " ".join(filter(None, (case.op, case.variant))),
            "x".join(map(str, case.shape)),
            case.dtype,
            MODE[case.mode],
            ", ".join(text for text, _ in targets(case, {}, None)) or "-",
            "not measured",
        )
        for family in catalogue.families()
        for case in catalogue.load(family, device_type="cuda")
        if case.key not in seen
    ]


def unmeasured_section(rows: Sequence[dict]) -> str:
    """What no GPU has said yet, for every GPU that has said something, or for any."""
    gpus = list(dict.fromkeys(row["device"] for row in rows if device_type(row) == "cuda"))
    parts = ["## Not measured on a GPU"] if gpus else ["## Not measured on a GPU", "No GPU has been measured yet."]
    for device in gpus or [None]:
        lines = unmeasured(rows, device)
        if lines:
            parts += [f"{device}:"] if device else []
            parts.append(markdown_table(("operator", "shape", "dtype", "mode", "targets", "measured"), lines))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def performance_page(rows: Sequence[dict]) -> str:
    """docs/performance.md: every row, what has none, and the pictures."""
    images = [f"![{Path(file).stem}](../benchmarks/results/{file})" for file in drawable(rows)]
    parts = [PERFORMANCE_HEAD, sections(rows, markdown_table), unmeasured_section(rows), ROOFLINES, *images]
    return "\n\n".join(filter(None, parts)) + "\n"


def headlines(rows: Sequence[dict]) -> str:
    """README.md: of each device the headline cases, on one thread where threads count."""
    known = known_cases(rows)
    headline = lambda case: case is not None and case.headline
    chosen = [
        row
        for row in rows
        if row["threads"] in (None, 1) and (row["family"] == "machine" or headline(known_case(known, row)))
    ]
    return sections(chosen, markdown_table)


def terminal(rows: Sequence[dict]) -> str:
    return sections(rows, plain_table).replace("**", "")


def readme_section(text: str) -> str:
    """What lies between the markers of a README.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"benchmarks.report: README.md needs the lines {BEGIN} and {END}, once each")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def with_section(text: str, section: str) -> str:
    readme_section(text)  # checks the markers
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{section}\n" + text[text.index(END) :]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description="Show the newest results of every device.")
    parser.add_argument(
        "--readme", action="store_true", help="write README.md's table, docs/performance.md and the pictures"
    )
    arguments = parser.parse_args(argv)
    rows = newest(read())
    print(terminal(rows))
    if arguments.readme:
        README.write_text(with_section(README.read_text(), headlines(rows)))
        PERFORMANCE.write_text(performance_page(rows))
        for picture in pictures(rows, RESULTS):
            print(f"written: {picture.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
