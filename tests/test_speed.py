"""Guards against regressions of speed, for a quiet machine: ``pytest -m benchmark``.

pytest-benchmark keeps and compares the times of our operators (``--benchmark-autosave``, ``--benchmark-compare``); the
assertion holds each headline case to the speedup recorded for this machine in ``benchmarks/results``.
"""

import pytest
import torch

from benchmarks import cases, measure, report, run

SHARE = 0.85  # of the recorded speedup; the rest is left to the machine
HEADLINES = [case for family in cases.families() for case in cases.load(family) if case.headline]


@pytest.fixture(autouse=True)
def one_thread_and_plain_memory():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # it fills every new tensor with NaN
    yield
    torch.set_num_threads(threads)


def recorded_speedup(case: cases.Case) -> float:
    """On this machine; 1 where nothing is recorded, for no operator may lose to what it replaces."""
    device = run.describe_device("cpu")
    rows = [row for row in report.newest(report.read()) if row["device"] == device and row["threads"] == 1]
    found = {row["provider"]: row for row in rows if report.case_key(row) == case.key}
    return report.speedup(found) or 1.0


@pytest.mark.benchmark
@pytest.mark.parametrize("case", HEADLINES, ids=str)
def test_headline_case_keeps_its_speedup(case, benchmark):
    device = torch.device("cpu")
    step = measure.make_step("ours", case.setup(device), case.mode, "inductor")
    step.warm_up()
    benchmark(step.sample, lambda: 0.0, 1)
    rows = measure.measure(case, measure.QUICK, 1, device)
    ratio, wanted = report.speedup({row["provider"]: row for row in rows}), recorded_speedup(case)
    assert ratio is not None, [row["error"] for row in rows]
    assert ratio >= SHARE * wanted, f"{ratio:.2f}x of the strongest baseline, recorded {wanted:.2f}x"
