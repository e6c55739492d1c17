"""The benchmark harness: its arithmetic, its rows, its report, and a dry run of every case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cases, measure, report, run
from benchmarks.cases import Case, Setup

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def test_percentile_interpolates():
    assert measure.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert measure.percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert measure.percentile([1.0, 2.0], 0.8) == pytest.approx(1.8)
    assert measure.percentile([7.0], 0.2) == 7.0


def test_peak_on_the_cpu_is_the_most_held_at_once():
    def step():
        first, second = torch.empty(2**21), torch.empty(2**21)  # 8 MiB each
        del first
        return second, torch.empty(2**20)

    assert measure.peak_mib(measure.Step(step, (), "forward"), CPU) == pytest.approx(16, abs=0.01)


def test_paired_ratio_is_taken_within_rounds():
    # The machine slows down fourfold after one round: the ratio of medians would be 8 / 4 or 8 / 1.
    assert measure.paired_ratio([2.0, 8.0, 8.0], [1.0, 4.0, 4.0]) == 2.0
    assert measure.paired_ratio([1.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def toy_case(providers, mode="full", floor=lambda: None):
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    setup = Setup(inputs=(x, weight), providers=providers, floor=floor)
    return Case(op="toy", shape=(4, 8), mode=mode, setup=lambda device: setup, bytes=1000, flops=2000)


def matmul(x, weight):
    return x @ weight


@pytest.mark.parametrize("mode", cases.MODES)
def test_rows_have_the_schema(mode):
    rows = measure.measure(toy_case({"eager": matmul, "ours": matmul}, mode), measure.Budget(0.0, 3, 3), 1, CPU)
    assert [row["provider"] for row in rows] == ["eager", "ours", "floor"]
    for row in rows:
        assert set(row) == {"op", "variant", "mode", "dtype", "shape", "threads", "provider", "error", *measure.FIGURES}
        assert row["error"] is None and row["rounds"] == 3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gflops"] == pytest.approx(2 * row["gbps"])
        assert row["gbps"] == pytest.approx(1e-6 * 1000 / row["median_ms"])
    assert rows[1]["over_ours"] == 1.0 and rows[2]["floor_percent"] == 100.0


def test_a_failing_provider_is_a_row_with_its_reason():
    def broken(x, weight):
        raise NotImplementedError("toy: no kernel\nsecond line")

    rows = measure.measure(toy_case({"eager": matmul, "ours": broken}), measure.DRY, 1, CPU)
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["ours"]["error"] == "NotImplementedError: toy: no kernel"
    assert by_provider["ours"]["median_ms"] is None
    assert by_provider["eager"]["error"] is None and by_provider["eager"]["over_ours"] is None


def test_saved_bytes_leave_parameters_out_and_count_a_storage_once():
    weight = nn.Parameter(torch.randn(8, 1024))
    x = torch.randn(256, 8, requires_grad=True)  # 8 KiB

    def function(x, weight):
        h = x @ weight  # saves x and weight; h is 1 MiB
        return h * h.view(256, 1024)  # saves h twice

    assert measure.Step(function, (x, weight), "full").saved_mib() == pytest.approx(1 + 8 / 1024)


def test_parameters_of_a_module_are_differentiated():
    layer = nn.Linear(8, 3)
    step = measure.Step(layer, (torch.randn(4, 8),), "full")
    assert [id(t) for t in step.wanted] == [id(layer.weight), id(layer.bias)]


def test_backward_is_timed_over_a_fresh_graph_for_every_call():
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append("backward")
            return grad

    step = measure.Step(Counted.apply, (torch.randn(3, requires_grad=True),), "backward")
    step.warm_up()
    calls.clear()
    step.sample(lambda: calls.append("clock") or 0.0, 2)
    assert calls == ["forward", "forward", "clock", "backward", "backward", "clock"]


def test_gpu_timing_runs_every_step_in_its_mode(monkeypatch):
    seen = []

    def do_bench(call, rep, return_mode):
        seen.append(rep)
        call(), call()
        return [2.0, 4.0, 3.0]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    inputs = toy_case({}).setup(CPU).inputs
    steps = {mode: measure.Step(matmul, inputs, mode) for mode in cases.MODES}
    for step in steps.values():
        step.warm_up()
    times = measure.time_gpu(steps, measure.Budget(6.0, 1, 1))
    assert times == {mode: [2e-3, 4e-3, 3e-3] for mode in cases.MODES} and seen == [2000.0] * 3


def test_cases_are_distinct_and_complete():
    for family in cases.families():
        loaded = cases.load(family)
        assert len({case.key for case in loaded}) == len(loaded)
        assert any(case.headline for case in loaded)
        for case in loaded:
            assert case.mode in cases.MODES and case.bytes > 0 and case.flops >= 0


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"families are .*noise.*, got 'nonsense'"):
        cases.families(["nonsense"])


@pytest.mark.parametrize("threads", ["0", "two", "1,-1"])
def test_bad_thread_counts_are_refused(threads, capsys):
    with pytest.raises(SystemExit):
        run.parse(["--threads", threads])
    assert "--threads must be positive whole numbers" in capsys.readouterr().err


def test_each_thread_gets_a_core_of_its_own(monkeypatch):
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda pid: {7, 3, 5})
    environment = run.environment(2)
    assert environment["GOMP_CPU_AFFINITY"] == "3 5" and environment["OMP_NUM_THREADS"] == "2"


def test_more_threads_than_cores_are_not_measured(monkeypatch, tmp_path, capsys):
    measured = []
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(run, "measure", lambda families, threads, budget, device: measured.append(threads) or [])
    out = tmp_path / "rows.jsonl"
    assert run.main(["--only", "noise", "--no-gate", "--out", str(out)]) == 0
    assert measured == [1] and "2 threads are not measured, 1 core(s) are available" in capsys.readouterr().err


def test_red_tests_give_no_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "gate", lambda family: "tests/test_noise.py is not green: 1 failed")
    out = tmp_path / "rows.jsonl"
    assert run.main(["--only", "noise", "--threads", "1", "--out", str(out)]) == 1
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["family"] == "noise" and row["error"].endswith("1 failed") and row["median_ms"] is None
    assert "noise: not measured, tests/test_noise.py is not green: 1 failed" in capsys.readouterr().out


def test_the_gate_is_green_only_after_passing_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    assert run.gate("toy") == "there is no tests/test_toy*.py"
    (tmp_path / "tests" / "test_toy.py").write_text("def test_good():\n    pass\n")
    assert run.gate("toy") is None
    (tmp_path / "tests" / "test_toy_more.py").write_text("def test_bad():\n    assert False\n")
    assert "tests/test_toy*.py is not green" in run.gate("toy") and "1 failed" in run.gate("toy")


@pytest.mark.parametrize(
    "cpuinfo,model",
    [
        ("model name\t: Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz\n", "Intel Xeon E5-2690 v4"),
        ("model name\t: AMD EPYC 9B45\n", "AMD EPYC 9B45"),
    ],
)
def test_cpu_model_has_no_trademarks(monkeypatch, cpuinfo, model):
    monkeypatch.setattr(run.Path, "read_text", lambda self: cpuinfo)
    assert run.cpu_model() == model


def test_dry_run_goes_through_every_case_and_provider(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.run", "--dry", "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, [row["error"] for row in rows if row["error"]] or done.stderr
    expected = {
        (*case.key, provider)
        for family in cases.families()
        for case in cases.load(family, tiny=True)
        for provider in (*case.setup(CPU).providers, "floor")
    }
    assert {(*report.case_key(row), row["provider"]) for row in rows if row["family"] != "machine"} == expected
    assert {row["family"] for row in rows} == {"machine", *cases.families()}
    for row in rows:
        assert {"device", "torch", "triton", "numpy", "commit", "dirty", "budget", "date"} <= set(row)
        assert str(ROOT) not in json.dumps(row)


# ---- the report ----------------------------------------------------------------------------------------------------


def result(provider, median, **changes):
    head = {
        "family": "noise", "op": "philox_normal", "variant": "", "mode": "forward", "dtype": "fp32",
        "shape": [2**20], "threads": 1, "provider": provider, "device": "Some CPU, avx512, 2 cores",
        "torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6", "commit": "0123456789abcdef", "dirty": False,
        "budget": "full", "date": "2026-05-01T10:00:00+00:00",
    }  # fmt: skip
    figures = {"median_ms": median, "over_ours": median / 0.5, "floor_percent": 10 / median, "rounds": 9}
    return head | measure.empty_figures(None) | figures | changes


ROWS = [
    result("eager", 3.0),
    result("compiled", 45.0),
    result("torch", 2.0),
    result("ours", 0.5),
    result("floor", 0.1),
    result("copy", 1.0, family="machine", op="machine", gbps=13.2),
    result("gemm mm", 1.0, family="machine", op="machine", gflops=190.4),
]


def test_report_of_fixed_rows():
    assert report.sections(ROWS, report.markdown_table).splitlines() == [
        "Some CPU, avx512, 2 cores; torch 2.13.0; commit 012345678; 2026-05-01. Times in ms.",
        "",
        "**1 thread, CPU time.** Memory copy 13 GB/s; GEMM mm fp32 190 GFLOP/s.",
        "",
        "| operator | shape | dtype | mode | eager | compiled | torch | ours | speedup | target | floor |",
        "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
        "| philox_normal | 1048576 | fp32 | fwd | 3.000 | 45.0 | 2.000 | 0.500 | 4.00x | 5x | 20% |",
        "",
        report.LEGEND,
    ]


def test_speedup_is_over_the_strongest_baseline_target_over_eager():
    slower = [row | {"over_ours": row["median_ms"] / 0.75} for row in ROWS if row["family"] == "noise"]
    assert "| 2.67x | 5x missed |" in report.sections(
        slower, report.markdown_table
    )  # 2 / 0.75 over torch, 3 / 0.75 over eager
    losing = [row | {"over_ours": row["median_ms"] / 8.0} for row in ROWS if row["family"] == "noise"]
    assert "| 0.25x | 5x missed |" in report.sections(losing, report.markdown_table)


def test_failures_are_named():
    failed = result("ours", 1.0) | measure.empty_figures("RuntimeError: no")
    rows = [*(row | {"over_ours": None} for row in ROWS[:3]), failed]
    text = report.sections(rows, report.markdown_table)
    assert "| failed | - | 5x missed | - |" in text
    assert "- failed: philox_normal 1048576 fp32 forward, ours: RuntimeError: no" in text


def test_saved_memory_is_set_against_its_target():
    case = next(case for case in cases.load("lrt") if case.saved_target is not None)
    key = {"family": "lrt", "op": case.op, "variant": case.variant, "shape": list(case.shape), "mode": case.mode}
    rows = [result("eager", 4.0, saved_mib=40.0, **key), result("ours", 2.0, saved_mib=16.0, **key)]
    assert "| 40.0 | 16.0 | 40% | 30% missed |" in report.sections(rows, report.markdown_table)


def test_terminal_table_fits_a_hundred_columns():
    longest = result("eager", 2320.4, family="lrt", op="lrt_linear", variant="additive", shape=[512, 4096, 1024],
                     mode="full")  # fmt: skip
    lines = report.terminal([longest, *[longest | {"provider": p} for p in ("compiled", "torch", "ours")]]).splitlines()
    table = [line for line in lines if "lrt_linear" in line or line.startswith("operator")]
    assert len(table) == 2 and all(len(line) <= 100 for line in table)


def test_newest_clean_full_run_counts():
    old = result("ours", 9.0, date="2026-04-01T10:00:00+00:00")
    dirty = result("ours", 0.1, date="2026-06-01T10:00:00+00:00", dirty=True)
    quick = result("ours", 0.2, date="2026-06-02T10:00:00+00:00", budget="quick")
    other = result("ours", 7.0, family="kl", date="2026-03-01T10:00:00+00:00")
    kept = report.newest([old, *ROWS, dirty, quick, other])
    assert [row["median_ms"] for row in kept if row["provider"] == "ours"] == [0.5, 7.0]


def test_section_of_a_readme_is_replaced_and_markers_are_demanded():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_section(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        report.with_section("no markers", "new")


def test_pictures_are_the_same_from_the_same_rows_and_linked(tmp_path):
    rows = [
        row | {"shape": [size], "median_ms": row["median_ms"] * size / 2**20} for row in ROWS for size in (64, 2**20)
    ]
    (first,) = report.pictures(rows, tmp_path)
    content = first.read_bytes()
    assert first.name == "some-cpu-avx512-2-cores-noise.svg"
    assert report.pictures(rows, tmp_path) == [first] and first.read_bytes() == content
    assert report.performance_page(rows).endswith(f"![{first.stem}](../benchmarks/results/{first.name})\n")


def test_documents_show_the_newest_results():
    newest = report.newest(report.read())
    section = report.readme_section(report.README.read_text())
    assert section == report.headlines(newest), "run `python -m benchmarks.report --readme`"
    page = report.PERFORMANCE.read_text()
    assert page == report.performance_page(newest), "run `python -m benchmarks.report --readme`"


def test_readme_has_headlines_on_one_thread_and_the_page_everything():
    (case, *_), other = (
        [c for c in cases.load("noise") if c.headline],
        next(c for c in cases.load("noise") if not c.headline),
    )
    rows = [
        row | {"op": c.op, "variant": c.variant, "shape": list(c.shape), "dtype": c.dtype, "mode": c.mode, "threads": n}
        for row in ROWS
        for c in (case, other)
        for n in (1, 2)
    ]
    shown, page = report.headlines(rows), report.performance_page(rows)
    assert shown.count("| philox_normal") == 1 and "1 thread" in shown and "2 pinned" not in shown
    assert page.count("| philox_normal") == 4 and "2 pinned" in page
