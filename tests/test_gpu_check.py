"""The GPU check in one command: its dry run on the CPU, and what a section that fails or hangs costs."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import borders, gpu_check
from benchmarks.gpu_check import Section


def test_dry_run_goes_through_every_section(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["build", "ok"], ["tests", "ok"], ["operators", "ok"], ["borders", "ok"],
    ]  # fmt: skip
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))
    assert len(files) == 3 and [f.startswith("checks/") for f in files].count(True) == 2
    records = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert all(record["budget"] == "dry" and record["device"] for record in records)
    measured = {record.get("op") for record in records}
    assert {"lrt_linear", "philox_normal"} <= measured


def test_a_section_that_fails_or_hangs_costs_only_itself(monkeypatch, tmp_path, capsys):
    python = sys.executable
    listed = [
        Section("broken", (python, "-c", "raise SystemExit('no compiler')"), 1),
        Section("hangs", (python, "-c", "import time; print('started', flush=True); time.sleep(60)"), 0.05),
        Section("works", (python, "-c", "print('fine')"), 1),
    ]
    monkeypatch.setattr(gpu_check, "sections", lambda *_: listed)
    start = time.monotonic()
    assert gpu_check.main(["--dry", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 30
    printed = capsys.readouterr()
    assert "no compiler" in printed.err and "fine" not in printed.err
    lines = [line.split() for line in printed.out.splitlines()[1:]]
    assert [line[:2] for line in lines] == [["broken", "failed"], ["hangs", "too"], ["works", "ok"]]
    (record,) = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert [section["said"] for section in record["sections"]] == [["no compiler"], ["started"], ["fine"]]


def test_sections_after_the_deadline_are_named():
    outcome = gpu_check.carry_out(Section("late", ("false",), 1), deadline=time.monotonic() - 1)
    assert outcome.status == "too long" and outcome.seconds == 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--dry" in capsys.readouterr().err


def test_every_file_with_gpu_tests_is_run():
    files = gpu_check.gpu_tests()
    assert {"tests/test_triton.py", "tests/test_curve_gpu.py", "tests/test_averaging_gpu.py"} <= set(files)
    assert {"tests/test_kl_triton.py", "tests/test_curve_linear_triton.py"} <= set(files)  # by what test_triton.py sees
    assert "tests/test_kl.py" not in files


@pytest.mark.parametrize(("dual", "expected"), [((1, 1, 3), 32), ((3, 1, 1), 0), ((1, 1, 1), 64), ((1, 3, 1), 16)])
def test_border_is_where_dual_stops_winning(dual, expected):
    times = {rows: {"dual": ms, "two_gemms": 2} for rows, ms in zip((16, 32, 64), dual, strict=True)}
    assert borders.border(times) == expected
