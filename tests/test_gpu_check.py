"""The GPU check in one command: its dry run on the CPU, and what a section that fails or hangs costs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import borders, cases, gpu_check, records, report, run, timing
from benchmarks.gpu_check import Section


def test_dry_run_goes_through_every_section_and_case(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sections, borders, measured = done.stdout.split("\n\n", 2)
    assert [line.split()[:2] for line in sections.splitlines()[1:]] == [
        ["build", "ok"], ["tests", "ok"], ["operators", "ok"], ["borders", "ok"],
    ]  # fmt: skip
    assert "ops/lrt_strategy.DUAL_MAX_ROWS is 128; measured: additive forward" in borders
    assert "GPU time. Memory copy" in measured and "/eager" in measured and report.GPU_LEGEND in measured
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))
    assert len(files) == 3 and [f.startswith("checks/") for f in files].count(True) == 2
    rows = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert all(row["budget"] == "dry" and row["device"] for row in rows)
    found = {(*records.case_key(row), row["provider"]) for row in rows if row.get("cases") == "cuda"}
    expected = {
        (*case.key, provider)
        for family in cases.families()
        for case in cases.load(family, tiny=True, device_type="cuda")
        for provider in (*case.setup(torch.device("cpu")).providers, "floor")
        if case.compiles or provider != "compiled"
    }
    assert {row for row in found if row[0] != "machine"} == expected
    assert {row[-1] for row in found if row[0] == "machine"} == {"copy", "read", "fill", "gemm mm", "gemm rowwise"}
    assert {(row["op"], row["mode"], row["provider"]) for row in rows if row.get("family") == "borders"} == {
        ("lrt_linear", "forward", "dual"), ("lrt_linear", "forward", "operands, then dual"),
        ("lrt_linear", "forward", "two_gemms"), ("lrt_linear", "backward", "dual"),
        ("lrt_linear", "backward", "two_gemms"), ("curve_linear", "forward", "fused"),
        ("curve_linear", "forward", "synthesised"),
    }  # fmt: skip


def test_a_section_that_fails_or_hangs_costs_only_itself(monkeypatch, tmp_path, capsys):
    run = lambda *codes: lambda _: [(sys.executable, "-c", code) for code in codes]
    listed = [
        Section("broken", run("print('fine')", "raise SystemExit('no compiler')"), 1),
        Section("hangs", run("import time; print('started', flush=True); time.sleep(60)", "print('fine')"), 0.05),
        Section("works", run("print('fine')"), 1),
    ]
    monkeypatch.setattr(gpu_check, "sections", lambda *_: listed)
    start = time.monotonic()
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 30
    printed = capsys.readouterr()
    assert "no compiler" in printed.err and "fine" not in printed.err
    lines = [line.split() for line in printed.out.splitlines()[1:4]]
    assert [line[:2] for line in lines] == [["broken", "failed"], ["hangs", "too"], ["works", "ok"]]
    (record,) = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    said = [section["said"] for section in record["sections"]]
    assert (said[0], said[1][0], said[2]) == (["no compiler"], "started", ["fine"])


def results_in(folder):
    return folder / f"{records.slug(run.describe_device('cpu'))}.jsonl"


def measured(**more):
    """A row as ``benchmarks.run`` writes it."""
    row = {"family": "noise", "op": "philox_normal", "variant": "", "mode": "forward", "dtype": "fp32", "shape": [64]}
    row |= {"threads": 1, "provider": "ours", "cases": "cuda"} | run.origin("cpu", "dry") | timing.empty_figures(None)
    return row | {"median_ms": 1.5} | more


def test_the_rows_of_a_section_that_was_killed_are_in_the_table(monkeypatch, tmp_path, capsys):
    out = results_in(tmp_path)
    out.write_text(json.dumps(measured(op="measured before")) + "\n")
    killed = f"import time; print({json.dumps(measured())!r}, file=open({str(out)!r}, 'a'), flush=True); time.sleep(60)"
    listed = [Section("operators", lambda _: [(sys.executable, "-c", killed)], 0.05)]
    monkeypatch.setattr(gpu_check, "sections", lambda *_: listed)
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "too long" in shown and "philox_normal 64    fp32  fwd  1.500" in shown and "measured before" not in shown


@pytest.mark.parametrize(
    ("said", "kept_beside"),
    [
        ("Segmentation fault", {"noise", "kl"}),
        ("FAILED tests/test_triton.py::test_a - assert", {"noise", "kl"}),
        ("FAILED tests/test_kl_triton.py::test_a[cuda::0] - assert 0", {"kl"}),
        ("ERROR tests/test_noise_calling.py - no torch", {"noise"}),
        ("FAILED tests/test_swag.py::test_b - assert", set()),
    ],
)
def test_figures_of_families_with_red_tests_are_not_among_the_results(monkeypatch, tmp_path, capsys, said, kept_beside):
    out = results_in(tmp_path)
    out.write_text('{"before": 1}\n')
    rows = [json.dumps(measured(family=family)) for family in ("noise", "kl")]
    writes = f"print({rows[0]!r}, {rows[1]!r}, sep='\\n', file=open({str(out)!r}, 'a'))"
    listed = [
        Section("tests", lambda _: [(sys.executable, "-c", f"print({said!r}); raise SystemExit(1)")], 1),
        Section("operators", lambda _: [(sys.executable, "-c", writes)], 1),
    ]
    monkeypatch.setattr(gpu_check, "sections", lambda *_: listed)
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "1.500" in shown and "kept beside the results" in shown
    families = lambda files: {json.loads(line).get("family") for path in files for line in path.open()} - {None}
    assert families([out]) == {"noise", "kl"} - kept_beside and out.read_text().startswith('{"before": 1}\n')
    assert families(tmp_path.rglob("*-unconfirmed.jsonl")) == kept_beside


def test_a_section_over_its_limit_says_what_had_failed(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_red():\n    assert 0, 'a red test'\ndef test_hangs():\n    time.sleep(60)\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))
    outcome = gpu_check.carry_out(Section("tests", lambda _: [command], 0.1), time.monotonic() + 60)
    assert outcome.status == "too long" and any("a red test" in line for line in outcome.said)


def test_processes_over_the_limit_end_together():
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    section = Section("tests", lambda _: 4 * [(sys.executable, "-c", stubborn)], 0.03)
    start = time.monotonic()
    assert gpu_check.carry_out(section, start + 60).status == "too long"
    assert time.monotonic() - start < 1.8 + 2 * gpu_check.LAST_WORDS


def test_an_interrupt_ends_what_runs_and_keeps_what_was_measured(tmp_path):
    """Ctrl-C while the operators are measured, after red tests: no process goes on, no figure is among the results."""
    out, pid = results_in(tmp_path), tmp_path / "pid"
    measures = f"print({json.dumps(measured())!r}, file=open({str(out)!r}, 'a'), flush=True); "
    measures += f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from benchmarks import gpu_check as g\n"
        "g.sections = lambda *_: [\n"
        "    g.Section('tests', lambda _: [(sys.executable, '-c', 'raise SystemExit(1)')], 1),\n"
        f"    g.Section('operators', lambda _: [(sys.executable, '-c', {measures!r})], 1),\n"
        "    g.Section('borders', lambda _: [('true',)], 1),\n"
        "]\n"
        f"sys.exit(g.main(['--dry', '--out', {str(tmp_path)!r}]))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=gpu_check.ROOT, **pipes) as check:
        wait_for(lambda: pid.exists() and pid.read_text())
        check.send_signal(signal.SIGINT)
        said, errors = check.communicate(timeout=30)
    assert check.returncode == 1 and "Traceback" not in errors.replace(measures, ""), errors
    assert "interrupted" in said and "1.500" in said and "borders" not in said
    assert not alive(int(pid.read_text())) and out.read_text() == ""
    assert len([line for path in tmp_path.rglob("*-unconfirmed.jsonl") for line in path.open()]) == 1


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_folder_that_cannot_be_written_to_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry", "--out", "/proc/no"])
    assert "--out /proc/no cannot be written to" in capsys.readouterr().err


def test_sections_after_the_deadline_are_named():
    outcome = gpu_check.carry_out(Section("late", lambda _: [("false",)], 1), deadline=time.monotonic() - 1)
    assert outcome.status == "too long" and outcome.seconds == 0


def test_a_section_leaves_the_later_ones_their_time():
    given = []
    section = Section("operators", lambda minutes: given.append(minutes) or [("true",)], minutes=7)
    assert gpu_check.carry_out(section, deadline=time.monotonic() + 300, later=75).status == "ok"
    assert given[0] == pytest.approx(225 / 60, abs=0.01)
    listed = gpu_check.sections(False, gpu_check.ROOT, "gpu", None)
    assert sum(s.minutes for s in listed[:2]) + sum(s.least for s in listed[2:]) <= 9 + 1.25
    (command,) = listed[2].commands(4.0)
    assert command[command.index("--minutes") + 1] == "3.25" and command[command.index("--device") + 1] == "cuda"


def test_tests_are_dealt_into_even_heaps():
    files = ["tests/test_noise_calling.py", "tests/test_neb_gpu.py"]
    heaps = gpu_check.dealt(files, 3)
    tests = [test for heap in heaps for test in heap]
    assert len(set(tests)) == len(tests) > 20 and {test.partition("::")[0] for test in tests} == set(files)
    assert max(map(len, heaps)) - min(map(len, heaps)) <= 1
    heaps = gpu_check.dealt([*files, "tests/no_such_file.py"], 3)
    assert ["tests/no_such_file.py"] in ([test for test in heap if "::" not in test] for heap in heaps)  # and says so


def test_it_starts_where_the_package_is_not_built():
    code = (
        "import sys; sys.modules['losssurf_fast'] = None; from benchmarks import gpu_check; from pathlib import Path; "
    )
    code += "print([len(s.commands(1.0)) > 0 for s in gpu_check.sections(False, Path('.'), 'gpu', None)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.stdout == "[True, True, True, True]\n", done.stderr


def test_it_can_be_called_by_its_path(tmp_path):
    command = [sys.executable, str(gpu_check.ROOT / "benchmarks" / "gpu_check.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--dry" in done.stdout, done.stderr


def test_what_the_listing_says_besides_is_no_test(monkeypatch):
    said = "tests/test_neb_gpu.py::test_a[x::y]\nWarning: std::bad_alloc\nERROR tests/test_no.py::test_b\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said))
    assert gpu_check.dealt(["tests/test_neb_gpu.py"], 8) == [["tests/test_neb_gpu.py::test_a[x::y]"]]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--dry" in capsys.readouterr().err


def test_every_file_with_gpu_tests_is_run():
    files = set(gpu_check.gpu_tests())
    assert {"tests/test_triton.py", "tests/test_curve_gpu.py", "tests/test_averaging_gpu.py"} <= files
    assert {"tests/test_kl_triton.py", "tests/test_curve_linear_triton.py", "tests/test_triton_conv.py"} <= files
    assert "tests/test_kl.py" not in files and "tests/test_gpu_check.py" not in files


@pytest.mark.parametrize(
    ("dual", "ready", "expected"),
    [((1, 1, 3), (9, 9, 9), 32), ((3, 1, 1), (9, 9, 9), 0), ((1, 1, 1), (9, 9, 9), 64), ((1, 3, 3), (9, 1, 9), 16)],
)
def test_border_is_where_the_library_starts_winning(dual, ready, expected):
    times = {
        rows: {"dual": first, "operands, then dual": second, "two_gemms": 2}
        for rows, first, second in zip((16, 32, 64), dual, ready, strict=True)
    }
    assert borders.border(times) == expected


def test_borders_are_set_against_the_constants_in_force():
    forward, backward, curve, *_ = borders.sweeps()
    lines = borders.conclusions({forward: 256, backward: 64, curve: 32})
    assert lines == [
        "ops/lrt_strategy.DUAL_MAX_ROWS is 128; measured: additive forward 256, additive backward 64",
        "ops/curve_linear_triton.FUSED_MAX_ROWS is 128; measured: 3 bends forward 32",
    ]
    assert all(borders.current(sweep.constant) > 0 for sweep in borders.sweeps())


def test_a_strategy_that_fails_is_a_row_with_its_reason():
    def broken():
        raise RuntimeError("out of resource: shared memory")

    sweep = dataclasses.replace(borders.sweeps()[0], strategies=lambda *_: {"dual": broken, "two_gemms": lambda: None})
    times, rows = borders.measure(sweep, torch.device("cpu"), dry=True)
    assert all(set(measured) == {"two_gemms"} for measured in times.values())
    assert [row["error"] for row in rows if row["provider"] == "dual"] == 2 * [
        "RuntimeError: out of resource: shared memory"
    ]
