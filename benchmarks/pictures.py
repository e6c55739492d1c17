"""Rooflines: time against size, one picture per device and family, with what the machine itself reached.

Two ceilings bound every point from below: its bytes at the measured bandwidth of a copy, and its operations at the
measured rate of the library's GEMM in its dtype. Both come from the rows; nothing here is a model of the machine.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import case_key, copy_rate, gemm_rate, grouped, rate_unit, slug, speedup

COLORS = {"eager": "C0", "compiled": "C1", "torch": "C2", "ours": "C3", "floor": "black"}  # the same in every picture
CEILINGS = {"copy": {"color": "0.45", "linestyle": "--"}, "gemm": {"color": "0.45", "linestyle": "-."}}
LOSING = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": "C3", "linestyle": "none"}
LOST = "ours, slower than a baseline"
COLUMNS, WIDTH, HEIGHT, LINE = 3, 4.2, 3.2, 0.3  # of the grid; inches
MODE = {"forward": "fwd", "backward": "bwd", "full": "fwd+bwd"}


def drawable(rows: Sequence[dict]) -> dict[str, tuple[str, list[dict], list[dict]]]:
    """File name -> (device, its machine's rows, the family's rows) on one thread or a GPU."""
    timed = [row for row in rows if row["threads"] == 1 and not row["error"]]
    machines = grouped([row for row in timed if row["family"] == "machine"], lambda row: row["device"])
    families = grouped([row for row in timed if row["family"] != "machine"], lambda row: (row["device"], row["family"]))
    return {
        f"{slug(device)}-{family}.svg": (device, machines.get(device, []), group)
        for (device, family), group in families.items()
    }


def size(row: dict) -> int:
    return math.prod(row["shape"])


def series_and_singles(rows: Sequence[dict]) -> tuple[dict[tuple, list[dict]], list[dict]]:
    """What was measured at several sizes, and the rows of what was measured at one.

    A series is a curve of time against the product of the shape. Where shapes of one product need unlike traffic, as
    few rows of a large layer and many of a small one, it is split by all sizes but the first. A convolution's shape,
    with its padding, has no meaningful product.
    """
    several, singles = {}, []
    for key, group in grouped(rows, lambda row: (row["op"], row["variant"], row["dtype"], row["mode"])).items():
        sizes = len({tuple(row["shape"]) for row in group})
        layers = grouped(group, lambda row: tuple(row["shape"][1:]))
        parts = {(*key, layer): part for layer, part in layers.items()} if len({*map(size, group)}) < sizes else None
        for name, part in (parts or {(*key, ()): group}).items():
            if len({tuple(row["shape"]) for row in part}) > 1 and len(part[0]["shape"]) <= 3:
                several[name] = part
            else:
                singles += part
    return several, singles


def pictures(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Write every picture; the same rows give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for file, (device, machine, group) in drawable(rows).items():
        with matplotlib.rc_context({"svg.hashsalt": "losssurf_fast", "svg.fonttype": "none"}):  # text stays text
            figure = picture(device, machine, group)
            figure.savefig(folder / file, metadata={"Date": None})
            matplotlib.pyplot.close(figure)
        written.append(folder / file)
    return written


def picture(device: str, machine: Sequence[dict], rows: Sequence[dict]):
    from matplotlib import pyplot

    several, singles = series_and_singles(rows)
    cases = grouped(singles, case_key)
    columns = min(COLUMNS, max(len(several), 2))
    lines = math.ceil(len(several) / columns)
    heights = [HEIGHT] * lines + ([LINE * (len(cases) + 3)] if cases else [])
    # Constrained layout keeps the legend, which is the figure's, off the panels.
    figure = pyplot.figure(figsize=(WIDTH * columns, sum(heights) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for place, (key, group) in enumerate(several.items()):
        draw_series(figure.add_subplot(grid[divmod(place, columns)]), key, group, machine)
    if cases:
        draw_cases(figure.add_subplot(grid[-1, :]), cases, machine)
    entries = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.suptitle(device, fontsize=9)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(4, len(entries)), fontsize=8)
    return figure


def ceilings(row: dict, machine: Sequence[dict]) -> dict[str, float]:
    """Least ms of the row's case: "copy" by its bytes, "gemm" by its operations; only what both sides have."""
    found, bandwidth, rate = {}, copy_rate(machine), gemm_rate(machine, row["dtype"])
    if bandwidth and row["gbps"]:
        found["copy"] = row["gbps"] / bandwidth * row["median_ms"]
    if rate and row["gflops"]:
        found["gemm"] = row["gflops"] / rate * row["median_ms"]
    return found


def ceiling_label(kind: str, machine: Sequence[dict]) -> str:
    return f"bytes / copy ({copy_rate(machine):.0f} GB/s)" if kind == "copy" else "operations / GEMM rate"


def loses(rows: Sequence[dict]) -> bool:
    """Whether a baseline of this case is faster than ours."""
    ratio = speedup({row["provider"]: row for row in rows})
    return ratio is not None and ratio < 1


def draw_series(axis, key: tuple, rows: Sequence[dict], machine: Sequence[dict]) -> None:
    op, variant, dtype, mode, layer = key
    for provider, points in grouped(rows, lambda row: row["provider"]).items():
        points = sorted((size(row), row["median_ms"]) for row in points)
        style = {"linestyle": ":"} if provider == "floor" else {"marker": "o", "markersize": 4}
        axis.loglog(*zip(*points, strict=True), label=provider, color=COLORS[provider], **style)
    bounds = [(size(group[0]), ceilings(group[0], machine)) for group in grouped(rows, case_key).values()]
    for kind, style in CEILINGS.items():
        points = sorted((x, found[kind]) for x, found in bounds if kind in found)
        if points and worth_drawing(kind, [found for _, found in bounds]):
            axis.loglog(*zip(*points, strict=True), label=ceiling_label(kind, machine), **style)
    lost = [row for group in grouped(rows, case_key).values() if loses(group) for row in group]
    lost = [row for row in lost if row["provider"] == "ours"]
    if lost:
        axis.loglog([size(row) for row in lost], [row["median_ms"] for row in lost], label=LOST, **LOSING)
    rate = gemm_rate(machine, dtype)
    below = ""
    if rate and any(row["gflops"] for row in rows):
        divisor, unit = rate_unit([rate])
        below = f"\nGEMM {dtype} {rate / divisor:.0f} {unit}"
    title = " ".join(filter(None, (op, variant, dtype, MODE[mode])))
    axis.set_title(title + below, fontsize=9)
    shapes = {size(row): row["shape"] for row in rows}
    labels = ["x".join(map(str, shape[:1] if layer else shape)) for shape in shapes.values()]
    axis.set_xticks(list(shapes), labels, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_xlabel(" x ".join(("rows", *map(str, layer))) if layer else "shape, at its product", fontsize=8)
    axis.set_ylabel("ms", fontsize=8)
    plain_ticks(axis.yaxis)
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.3)


def plain_ticks(side) -> None:
    """1, 2, 5, 10: a range of less than a decade has numbers too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def worth_drawing(kind: str, bounds: Sequence[dict[str, float]]) -> bool:
    """A ceiling far below the other everywhere would only stretch the axis."""
    return any(found[kind] > 0.05 * max(found.values()) for found in bounds if kind in found)


def draw_cases(axis, cases: dict[tuple, list[dict]], machine: Sequence[dict]) -> None:
    """One line for each case that has no other size."""
    lost = []
    for place, rows in enumerate(cases.values()):
        for row in rows:
            marker = "|" if row["provider"] == "floor" else "o"
            axis.semilogx(
                row["median_ms"], place, label=row["provider"], color=COLORS[row["provider"]], marker=marker,
                markersize=10 if marker == "|" else 5, linestyle="none",
            )  # fmt: skip
        bounds = ceilings(rows[0], machine)
        for kind, value in bounds.items():
            if worth_drawing(kind, [bounds]):
                style = {**CEILINGS[kind], "label": ceiling_label(kind, machine)}
                axis.semilogx([value, value], [place - 0.3, place + 0.3], **style)
        lost += [(row["median_ms"], place) for row in rows if row["provider"] == "ours" and loses(rows)]
    if lost:
        axis.semilogx(*zip(*lost, strict=True), label=LOST, **LOSING)
    axis.set_yticks(range(len(cases)), [case_label(key) for key in cases], fontsize=8)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel("ms", fontsize=8)
    plain_ticks(axis.xaxis)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def case_label(key: tuple) -> str:
    op, variant, shape, dtype, mode = key
    return " ".join(filter(None, (op, variant, "x".join(map(str, shape)), dtype, MODE[mode])))
