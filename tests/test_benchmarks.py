"""The benchmark harness: its arithmetic, its rows, a dry run of every case. Reports: test_benchmarks_report.py."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cases, machine, measure, records, run, timing
from benchmarks.cases import Case, Setup

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def test_percentile_interpolates():
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    assert timing.percentile([1.0, 2.0], 0.8) == pytest.approx(1.8)
    assert timing.percentile([7.0], 0.2) == 7.0


def test_peak_on_the_cpu_is_the_most_held_at_once():
    def step():
        first, second = torch.empty(2**21), torch.empty(2**21)  # 8 MiB each
        del first
        return second, torch.empty(2**20)

    assert timing.peak_mib(timing.Step(step, (), "forward"), CPU) == pytest.approx(16, abs=0.01)


def test_paired_ratio_is_taken_within_rounds():
    # The machine slows down fourfold after one round: the ratio of medians would be 8 / 4 or 8 / 1.
    assert timing.paired_ratio([2.0, 8.0, 8.0], [1.0, 4.0, 4.0]) == 2.0
    assert timing.paired_ratio([1.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def toy_case(providers, mode="full", floor=lambda: None):
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    setup = Setup(inputs=(x, weight), providers=providers, floor=floor)
    return Case(op="toy", shape=(4, 8), mode=mode, setup=lambda device: setup, bytes=1000, flops=2000)


def matmul(x, weight):
    return x @ weight


@pytest.mark.parametrize("mode", cases.MODES)
def test_rows_have_the_schema(mode):
    found = measure.measure(toy_case({"eager": matmul, "ours": matmul}, mode), timing.Budget(0.0, 3, 3), 1, CPU)
    assert [row["provider"] for row in found] == ["eager", "ours", "floor"]
    for row in found:
        assert set(row) == {"op", "variant", "mode", "dtype", "shape", "threads", "provider", "error", *timing.FIGURES}
        assert row["error"] is None and row["rounds"] == 3
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gflops"] == pytest.approx(2 * row["gbps"])
        assert row["gbps"] == pytest.approx(1e-6 * 1000 / row["median_ms"])
    assert found[1]["over_ours"] == 1.0 and found[2]["floor_percent"] == 100.0


def test_a_failing_provider_is_a_row_with_its_reason():
    def broken(x, weight):
        raise NotImplementedError("toy: no kernel\nsecond line")

    found = measure.measure(toy_case({"eager": matmul, "ours": broken}), timing.DRY, 1, CPU)
    by_provider = {row["provider"]: row for row in found}
    assert by_provider["ours"]["error"] == "NotImplementedError: toy: no kernel"
    assert by_provider["ours"]["median_ms"] is None
    assert by_provider["eager"]["error"] is None and by_provider["eager"]["over_ours"] is None


def test_saved_bytes_leave_parameters_out_and_count_a_storage_once():
    weight = nn.Parameter(torch.randn(8, 1024))
    x = torch.randn(256, 8, requires_grad=True)  # 8 KiB

    def function(x, weight):
        h = x @ weight  # saves x and weight; h is 1 MiB
        return h * h.view(256, 1024)  # saves h twice

    assert timing.Step(function, (x, weight), "full").saved_mib() == pytest.approx(1 + 8 / 1024)


def test_parameters_of_a_module_are_differentiated():
    layer = nn.Linear(8, 3)
    step = timing.Step(layer, (torch.randn(4, 8),), "full")
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

    step = timing.Step(Counted.apply, (torch.randn(3, requires_grad=True),), "backward")
    step.warm_up()
    calls.clear()
    step.sample(lambda: calls.append("clock") or 0.0, 2)
    assert calls == ["forward", "forward", "clock", "backward", "backward", "clock"]


def test_gpu_timing_runs_every_step_in_its_mode(monkeypatch):
    seen = []

    def do_bench(call, warmup, rep, return_mode):
        seen.append(rep)
        call(), call()
        return [2.0, 4.0, 3.0]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    inputs = toy_case({}).setup(CPU).inputs
    steps = {mode: timing.Step(matmul, inputs, mode) for mode in cases.MODES}
    for step in steps.values():
        step.warm_up()
    times = timing.time_gpu(steps, timing.Budget(0.0, 1, 1, gpu_seconds=6.0), torch.device("cuda"))
    turns = timing.GPU_SLICES
    assert times == {mode: [2e-3, 4e-3, 3e-3] * turns for mode in cases.MODES}
    assert seen == pytest.approx([2000.0 / turns] * 3 * turns)


@pytest.mark.parametrize("device_type", cases.DEVICE_TYPES)
def test_cases_are_distinct_and_complete(device_type):
    for family in cases.families():
        loaded = cases.load(family, device_type=device_type)
        assert len({case.key for case in loaded}) == len(loaded)
        assert any(case.headline for case in loaded)
        for case in loaded:
            assert case.mode in cases.MODES and case.bytes > 0 and case.flops >= 0


def test_cases_of_a_gpu_run_on_a_cpu_once_by_its_clock_and_their_memory_is_measured():
    case = toy_case({"eager": matmul, "ours": matmul}, "full")
    found = measure.measure(case, timing.QUICK, 1, CPU, "cuda")
    assert [row["rounds"] for row in found] == [1, 1, 1] and all(row["median_ms"] > 0 for row in found)
    assert found[0]["peak_mib"] == pytest.approx(4 * (2 * 32 + 64) / 2**20, rel=0.01)  # the product and two gradients


def test_inputs_that_cannot_be_made_are_one_row_with_the_reason():
    def setup(device):
        raise MemoryError("toy: too large")

    (row,) = measure.measure(Case("toy", (4, 8), "full", setup, 1, 1), timing.DRY, 1, CPU)
    assert row["provider"] == "ours" and row["error"] == "MemoryError: toy: too large" and row["median_ms"] is None


def test_an_error_that_shows_only_in_the_timing_is_every_providers(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "time_steps", broken)
    found = measure.measure(toy_case({"eager": matmul, "ours": matmul}), timing.DRY, 1, CPU)
    assert [row["provider"] for row in found] == ["eager", "ours", "floor"]
    assert all(row["error"].startswith("RuntimeError: CUDA error: an illegal") for row in found)


def test_what_torch_should_not_compile_has_no_such_row():
    case = toy_case({"eager": matmul, "compiled": matmul, "ours": matmul})
    found = measure.measure(dataclasses.replace(case, compiles=False), timing.DRY, 1, CPU)
    assert [row["provider"] for row in found] == ["eager", "ours", "floor"]


@pytest.mark.parametrize("device_type", cases.DEVICE_TYPES)
def test_the_machine_has_a_row_for_each_pass_and_gemm(device_type):
    found = {(row["provider"], row["dtype"]): row for row in machine.measure_machine(timing.DRY, 1, CPU, device_type)}
    gemms = {
        "cpu": {("gemm onednn", "fp32"), ("gemm onednn", "bf16")},
        "cuda": {("gemm mm", "tf32"), ("gemm rowwise", "fp8")},
    }
    common = {("copy", "fp32"), ("read", "fp32"), ("fill", "fp32"), ("gemm mm", "fp32"), ("gemm mm", "bf16")}
    assert set(found) == common | gemms[device_type]
    assert all(row["error"] is None and row["gbps"] > 0 for row in found.values())


def test_hardware_without_fp8_costs_that_row_alone(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    found = machine.measure_machine(timing.DRY, 1, CPU, "cuda")
    assert [row["dtype"] for row in found if row["error"]] == ["fp8"] and len(found) == 7


def test_with_little_time_headlines_come_first_and_none_begins_late(monkeypatch, capsys):
    every = measure.chosen_cases(["block_float", "noise", "kl"], timing.QUICK, "cuda", in_time=True)
    order = [case.headline for _, case in every]
    assert order == sorted(order, reverse=True)
    assert list(dict.fromkeys(f for f, case in every if case.headline)) == ["kl", "noise", "block_float"]
    alone = measure.chosen_cases(["block_float", "noise", "kl"], timing.QUICK, "cuda", in_time=False)
    assert sum(order) == len(alone) < len(every)
    late = ["--families", "noise", "--threads", "1", "--budget", "dry", "--cases", "cuda", "--until", "0"]
    monkeypatch.setattr(measure.torch, "set_num_threads", lambda n: None)
    assert measure.main(late) == 0
    printed = capsys.readouterr()
    assert {json.loads(line)["family"] for line in printed.out.splitlines()} == {"machine"}
    assert f"out of time: {len(cases.load('noise', True, 'cuda'))} of" in printed.err


def test_after_a_case_that_breaks_the_device_a_new_process_goes_on(monkeypatch):
    broken, started = toy_case({"eager": matmul, "ours": matmul}), []
    monkeypatch.setattr(measure, "is_lost", lambda device: True)
    monkeypatch.setattr(measure, "measure", lambda *_: [])
    monkeypatch.setattr(cases, "load", lambda *_: [broken, broken])
    monkeypatch.setattr(measure.torch, "set_num_threads", lambda n: None)

    class Popen:  # the measuring process, in this one
        def __init__(self, command, **_):
            started.append(command[command.index("--first") + 1])
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.returncode = measure.main(command[3:])
            self.stdout = printed.getvalue().splitlines()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(run.subprocess, "Popen", Popen)
    found = list(run.measure(["toy"], 1, "dry", "cpu", "cuda", None))
    assert started == ["0", "1", "2"] and {row["family"] for row in found} == {"machine"} and len(found) == 7


def test_rows_are_written_as_they_are_measured(monkeypatch, tmp_path):
    row = {"family": "noise"} | timing.empty_figures(None)

    def interrupted(*_):
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run.main(["--only", "noise", "--no-gate", "--threads", "1", "--out", str(out)])
    assert json.loads(out.read_text())["family"] == "noise"


def test_on_a_gpu_no_process_is_pinned(monkeypatch):
    seen = {}

    class Popen:
        stdout, returncode = (), 0

        def __init__(self, command, env, **_):
            seen[command[command.index("--device") + 1]] = env

        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

    monkeypatch.setattr(run.subprocess, "Popen", Popen)
    monkeypatch.delenv("GOMP_CPU_AFFINITY", raising=False)
    for device in ("cpu", "cuda"):
        assert list(run.measure(["noise"], 1, "dry", device, "cuda", 1.0)) == []
    assert "GOMP_CPU_AFFINITY" in seen["cpu"] and "GOMP_CPU_AFFINITY" not in seen["cuda"]
    assert str(ROOT) in seen["cuda"]["PYTHONPATH"]


def test_families_come_in_the_order_asked_for():
    assert cases.families(["noise", "lrt", "noise"]) == ["noise", "lrt"]
    assert cases.families() == sorted(cases.families())


def test_a_commit_counts_only_where_git_says_nothing(monkeypatch):
    assert run.origin("cpu", "dry", "abc")["commit"] == run.origin("cpu", "dry")["commit"]
    monkeypatch.setattr(run, "_git", lambda *_: None)
    assert run.origin("cpu", "dry")["dirty"]
    told = run.origin("cpu", "dry", "abc")
    assert told["commit"] == "abc" and not told["dirty"]


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"families are .*noise.*, got 'nonsense'"):
        cases.families(["nonsense"])


@pytest.mark.parametrize("threads", ["0", "two", "1,-1"])
def test_bad_thread_counts_are_refused(threads, capsys):
    with pytest.raises(SystemExit):
        run.parse(["--threads", threads])
    assert "--threads must be positive whole numbers" in capsys.readouterr().err


def test_a_cpu_gives_no_figures_for_a_gpus_cases(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--cases", "cuda"])
    assert "--cases cuda needs --device cuda" in capsys.readouterr().err
    assert run.parse(["--cases", "cuda", "--dry"]).cases == "cuda" and run.parse([]).cases == "cpu"


def test_each_thread_gets_a_core_of_its_own(monkeypatch):
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda pid: {7, 3, 5})
    environment = run.environment(2)
    assert environment["GOMP_CPU_AFFINITY"] == "3 5" and environment["OMP_NUM_THREADS"] == "2"


def test_more_threads_than_cores_are_not_measured(monkeypatch, tmp_path, capsys):
    measured = []
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(run, "measure", lambda families, threads, *_: measured.append(threads) or [])
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
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, [row["error"] for row in found if row["error"]] or done.stderr
    expected = {
        (*case.key, provider)
        for family in cases.families()
        for case in cases.load(family, tiny=True)
        for provider in (*case.setup(CPU).providers, "floor")
    }
    assert {(*records.case_key(row), row["provider"]) for row in found if row["family"] != "machine"} == expected
    assert {row["family"] for row in found} == {"machine", *cases.families()}
    for row in found:
        assert {"device", "torch", "triton", "numpy", "commit", "dirty", "budget", "date", "cases"} <= set(row)
        assert str(ROOT) not in json.dumps(row)
