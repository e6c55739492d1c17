"""Rows of the results: reading them, which of them count, what they have in common."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases as catalogue
from benchmarks.cases import BASELINES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(folder: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def newest(rows: Sequence[dict]) -> list[dict]:
    """Rows of the newest clean run of every device and case, full runs first: a short run leaves others standing.

    That a family was not measured counts until it is.
    """
    rank = lambda row: (row["budget"] == "full" and row["threads"] is not None, row["date"])
    which = lambda row: (row["device"], row["family"], device_type(row), row["threads"], *case_key(row))
    best, measured = {}, {}
    clean = [row for row in rows if not row["dirty"] and row["budget"] != "dry"]
    for row in clean:
        best[which(row)] = max(best.get(which(row), rank(row)), rank(row))
        if row["threads"] is not None:
            family = row["device"], row["family"]
            measured[family] = max(measured.get(family, ""), row["date"])
    return [
        row
        for row in clean
        if rank(row) == best[which(row)]
        and (row["threads"] is not None or row["date"] > measured.get((row["device"], row["family"]), ""))
    ]


def case_key(row: dict) -> tuple:
    return row["op"], row["variant"], tuple(row["shape"]), row["dtype"], row["mode"]


def device_type(row: dict) -> str:
    """That of the row's case; the oldest rows are a CPU's and do not say so."""
    return row.get("cases", "cpu")


def grouped(rows: Sequence[dict], key) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def known_cases(rows: Sequence[dict]) -> dict[tuple, catalogue.Case]:
    """(device type, key of the case) -> the case, of all families that the rows have."""
    wanted = {(row["family"], device_type(row)) for row in rows}
    return {
        (kind, case.key): case
        for family in catalogue.families()
        for kind in catalogue.DEVICE_TYPES
        if (family, kind) in wanted
        for case in catalogue.load(family, device_type=kind)
    }


def known_case(known: dict, row: dict) -> catalogue.Case | None:
    return known.get((device_type(row), case_key(row)))


def speedup(providers: dict[str, dict]) -> float | None:
    """Of ours over the strongest baseline."""
    ratios = [providers[name]["over_ours"] for name in BASELINES if name in providers]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def copy_rate(machine: Sequence[dict]) -> float | None:
    """GB/s that the machine copied."""
    return max((row["gbps"] for row in machine if row["provider"] == "copy" and row["gbps"]), default=None)


def gemm_rate(machine: Sequence[dict], dtype: str) -> float | None:
    """GFLOP/s of the machine's fastest GEMM of ``dtype``."""
    rates = [row["gflops"] for row in machine if row["provider"].startswith("gemm") and row["dtype"] == dtype]
    return max(filter(None, rates), default=None)


def rate_unit(gflops: Sequence[float]) -> tuple[float, str]:
    """What to divide the rates by, and the unit then: a GPU's are six digits otherwise."""
    return (1e3, "TFLOP/s") if max(gflops, default=0) >= 1e4 else (1.0, "GFLOP/s")


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
