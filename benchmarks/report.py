"""Results for the terminal, headlines in README.md, all of them in docs/performance.md with a picture per family.

Measures nothing.

For every device and family the newest run counts that measured a committed tree; full runs go before quick ones.
``speedup`` is over the strongest baseline of the row (eager, torch.compile, the library), ``target`` over eager, both
as medians of ratios within a round; ``floor`` is the share of the speed that the bare GEMMs or one pass over the bytes
reach, measured in the same rounds.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases as catalogue
from benchmarks.cases import BASELINES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADER = ("operator", "shape", "dtype", "mode", "eager", "compiled", "torch", "ours", "speedup", "target", "floor")
LEGEND = "speedup: over the fastest of eager, compiled, torch. target: over eager. floor: share of the floor's speed."
MODE = {"forward": "fwd", "backward": "bwd", "full": "fwd+bwd"}

PERFORMANCE_HEAD = """# Every measurement

Written by `python -m benchmarks.report --readme` from `benchmarks/results/`. Each row is one run on one machine, ours
and the baselines in turns; losing shapes stay. What no run has measured is not here: of GPUs see
[gpu-status.md](gpu-status.md). `make bench` measures your machine."""

# ---- choosing rows -------------------------------------------------------------------------------------------------
# The same in every picture.
COLORS = {"eager": "C0", "compiled": "C1", "torch": "C2", "ours": "C3", "floor": "black"}


def read(folder: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def newest(rows: Sequence[dict]) -> list[dict]:
    """Rows of the newest clean run of every device and family, full runs first."""
    rank = lambda row: (row["budget"] == "full", row["date"])
    best = {}
    clean = [row for row in rows if not row["dirty"] and row["budget"] != "dry"]
    for row in clean:
        key = row["device"], row["family"]
        best[key] = max(best.get(key, rank(row)), rank(row))
    return [row for row in clean if rank(row) == best[row["device"], row["family"]]]


def case_key(row: dict) -> tuple:
    return row["op"], row["variant"], tuple(row["shape"]), row["dtype"], row["mode"]


def grouped(rows: Sequence[dict], key) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def known_cases(families) -> dict[tuple, catalogue.Case]:
    return {case.key: case for family in catalogue.families() if family in families for case in catalogue.load(family)}


# ---- lines of a table ----------------------------------------------------------------------------------------------


def speedup(providers: dict[str, dict]) -> float | None:
    """Of ours over the strongest baseline."""
    ratios = [providers[name]["over_ours"] for name in BASELINES if name in providers]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


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
    for key, group in grouped(rows, case_key).items():
        case = known.get(key)
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


def machine_line(rows: Sequence[dict]) -> str:
    """What the machine itself reached in the run."""
    memory = [f"{row['provider']} {row['gbps']:.0f}" for row in rows if row["provider"] in ("copy", "read", "fill")]
    gemms = [
        f"{row['provider'].removeprefix('gemm ')} {row['dtype']} {row['gflops']:.0f}"
        for row in rows
        if row["provider"].startswith("gemm")
    ]
    return f"Memory {', '.join(memory)} GB/s; GEMM {', '.join(gemms)} GFLOP/s."


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
        known = known_cases({row["family"] for row in measured})
        timed = [row for row in measured if row["threads"] is not None]
        for threads, group in grouped(timed, lambda row: row["threads"]).items():
            clock = "1 thread, CPU time" if threads == 1 else f"{threads} pinned threads, wall time"
            machine = [row for row in of_device if row["family"] == "machine" and row["threads"] == threads]
            parts.append(f"**{clock}.** {machine_line(machine)}" if machine else f"**{clock}.**")
            for of_family in grouped(group, lambda row: row["family"]).values():
                lines = [line(key, rows, known.get(key)) for key, rows in grouped(of_family, case_key).items()]
                parts.append(table(HEADER, lines))
        if timed:
            parts.append(LEGEND)
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


def performance_page(rows: Sequence[dict]) -> str:
    """docs/performance.md: every row and the pictures."""
    images = [f"![{Path(file).stem}](../benchmarks/results/{file})" for file in drawable(rows)]
    return "\n\n".join([PERFORMANCE_HEAD, sections(rows, markdown_table), *images]) + "\n"


def headlines(rows: Sequence[dict]) -> str:
    """README.md: of each device the headline cases, on one thread where threads count."""
    known = known_cases({row["family"] for row in rows} - {"machine"})
    chosen = [
        row for row in rows if row["threads"] in (None, 1) and (row["family"] == "machine" or _is_headline(known, row))
    ]
    return sections(chosen, markdown_table)


def _is_headline(known: dict, row: dict) -> bool:
    case = known.get(case_key(row))
    return case is not None and case.headline


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


def pictures(rows: Sequence[dict], folder: Path) -> list[Path]:
    """One SVG per device and family: time against size at one thread (or on the GPU), with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for file, (device, series) in drawable(rows).items():
        # Text stays text, and the same rows give the same file.
        with matplotlib.rc_context({"svg.hashsalt": "losssurf_fast", "svg.fonttype": "none"}):
            figure, axes = pyplot.subplots(1, len(series), figsize=(4.2 * len(series), 3.6), squeeze=False)
            for axis, (key, members) in zip(axes[0], series.items(), strict=True):
                draw(axis, key, members)
            figure.suptitle(device, fontsize=9)
            figure.tight_layout()
            figure.savefig(folder / file, metadata={"Date": None})
            pyplot.close(figure)
        written.append(folder / file)
    return written


def drawable(rows: Sequence[dict]) -> dict[str, tuple[str, dict]]:
    """File name -> (device, series): what was measured at more than one size."""
    found = {}
    timed = [row for row in rows if row["threads"] == 1 and row["family"] != "machine" and not row["error"]]
    for (device, family), group in grouped(timed, lambda row: (row["device"], row["family"])).items():
        series = grouped(group, lambda row: (row["op"], row["variant"], row["dtype"], row["mode"]))
        series = {key: rows for key, rows in series.items() if len({tuple(row["shape"]) for row in rows}) > 1}
        if series:
            found[f"{slug(device)}-{family}.svg"] = device, series
    return found


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def draw(axis, key: tuple, rows: Sequence[dict]) -> None:
    for provider, points in grouped(rows, lambda row: row["provider"]).items():
        points = sorted((math.prod(row["shape"]), row["median_ms"]) for row in points)
        style = {"linestyle": ":"} if provider == "floor" else {"marker": "o"}
        axis.loglog(*zip(*points, strict=True), label=provider, color=COLORS[provider], **style)
    axis.set(title=" ".join(filter(None, (*key[:3], MODE[key[3]]))), xlabel="product of sizes", ylabel="ms")
    axis.legend(fontsize=8)


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
