import subprocess
import sys
from pathlib import Path

import pytest
import torch

import losssurf_fast as lsf
from losssurf_fast import __main__ as cli
from losssurf_fast import doctor
from losssurf_fast._library import OPERATORS


def test_doctor_prints_every_operator_in_60_columns(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    for name in OPERATORS:
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        kernel = lsf.kernel_for(name, "cpu")
        assert ("reference" in line) if kernel.startswith("reference") else (kernel in line)
    for word in ("torch", "triton", "numpy", "python", "compiler", "thread", "CUDA", torch.__version__):
        assert word in out


def test_doctor_tells_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "kernel_for", lambda op, device: f"reference (plain torch): no {device} in this test")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.metadata, "version", raise_not_found)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "reference [1]" in out
    assert "[1] no cpu in this test" in out
    assert "[2] no cuda in this test" in out
    assert "none found (needed to build, not to run)" in out
    assert "not installed" in out


def raise_not_found(name):
    raise doctor.importlib.metadata.PackageNotFoundError(name)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"losssurf_fast {lsf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "kernel_for: op must be an operator's name, got NoneType"),
        (("lrt_linear", None), TypeError, "kernel_for: device must be a string or a torch.device, got NoneType"),
        (("lrt_linear", "meta"), ValueError, "kernel_for: device must be one that computes, .* got 'meta'"),
        (("lrt_linear", "bogus"), ValueError, "kernel_for: device must be one that computes, .* got 'bogus'"),
    ],
)
def test_kernel_for_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        lsf.kernel_for(*arguments)


def test_bench_needs_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(lsf, "__file__", str(tmp_path / "losssurf_fast" / "__init__.py"))
    with pytest.raises(SystemExit, match="part of the source tree"):
        cli.main(["bench"])


def test_bench_passes_its_arguments_on(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # else a real benchmarks package further down the path wins
    (tmp_path / "benchmarks" / "run.py").write_text("def main(argv):\n    print(argv)\n    return 7\n")
    monkeypatch.setattr(lsf, "__file__", str(tmp_path / "losssurf_fast" / "__init__.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = [name for name in sys.modules if name.split(".")[0] == "benchmarks"]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["bench", "--only", "lrt", "--quick"]) == 7
    for name in ("benchmarks", "benchmarks.run"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: demo | bench | doctor"),
        (["dance"], "invalid choice: 'dance'"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
        (["demo", "--data", "cifar"], "invalid choice: 'cifar'"),
        (["demo", "--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["demo", "--epochs", "many"], "argument --epochs: must be a whole number of at least 1, got 'many'"),
        (["demo", "--seed", str(2**64)], "argument --seed: must be a whole number from 0 to 2^63 - 1, got '1844"),
        (["bench", "--threads", "0"], "--threads must be positive whole numbers separated by commas, got '0'"),
        (["bench", "--device", "bogus"], "argument --device: must be cpu or cuda, got 'bogus'"),
        (["bench", "--device", "cuda:99"], "argument --device: cuda:99 is not there"),
        (["bench", "--out", "/proc/no/rows"], "--out /proc/no/rows cannot be written to"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_module_runs_and_fails_with_a_code():
    root = Path(lsf.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "losssurf_fast", "dance"], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "usage: python -m losssurf_fast" in result.stderr
