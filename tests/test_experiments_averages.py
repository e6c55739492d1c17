"""The experiments on averages and paths, each by its command: SWA, curves, width."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import experiments
import losssurf_fast as lsf
from experiments import command, curves, swa, width

QUICK = ["--quick", "--threads", "1", "--out"]
ROOT = Path(experiments.__file__).parents[1]


def results(out, name):
    return json.loads((out / f"{name}.json").read_text())["results"]


def test_swa(tmp_path, capsys):
    assert swa.main([*QUICK, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    found = results(tmp_path, "swa")
    assert [*found["accuracy"]] == ["SGD", "SWA 1", "SWA 1.25", "SWA 1.5"]
    assert (len(found["sgd"]), len(found["swa"])) == (4, 6)
    assert ["swa_error" in epoch for epoch in found["swa"]] == [False, False, True, True, True, True]
    for end, column in ((4, "SWA 1"), (5, "SWA 1.25"), (6, "SWA 1.5")):
        assert found["accuracy"][column] == pytest.approx(100 * (1 - found["swa"][end - 1]["swa_error"]))
        assert f"{found['accuracy'][column]:.2f}" in out
    assert "79.77±0.17" in out  # published
    assert found["accuracy"]["SWA 1.5"] > 50
    assert {p.name for p in tmp_path.iterdir()} == {"sgd.pt", "swa.pt", "swa.png", "swa.json"}


def test_swa_averages_the_weights_after_each_late_epoch(tmp_path, monkeypatch):
    """The checkpoint's average is the mean of the weights that training passed from ``averaged_from`` on."""
    passed = []
    update = lsf.AveragedModel.update_parameters

    def record(average, model):
        passed.append(model.stem.weight.detach().clone())
        update(average, model)

    monkeypatch.setattr(lsf.AveragedModel, "update_parameters", record)
    swa.main([*QUICK, str(tmp_path)])
    state = torch.load(tmp_path / "swa.pt", weights_only=True)["states"]["average"]
    assert len(passed) == state["n_averaged"] == 4
    torch.testing.assert_close(state["module.stem.weight"], torch.stack(passed).mean(0))


def test_curves(tmp_path, capsys):
    assert curves.main([*QUICK, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    found = results(tmp_path, "curves")
    assert [*found["rows"]] == [*found["paths"]] == ["segment", "Bezier", "chain"]
    for name, (low, high, least, most) in found["rows"].items():
        path = found["paths"][name]
        loss, error = path["values"]["train"]["loss"], path["values"]["test"]["error"]
        assert (low, high) == (min(loss), max(loss))
        assert (least, most) == (100 * min(error), 100 * max(error))
        assert len(loss) == 5
        for end in (0, -1):  # the same networks
            assert loss[end] == pytest.approx(found["paths"]["segment"]["values"]["train"]["loss"][end], rel=1e-3)
    assert found["paths"]["Bezier"]["length"] > found["paths"]["segment"]["length"]
    surface = lsf.Surface.load(tmp_path / "plane_independent.npz")
    assert (surface.shape, [*surface.marks]) == ((3, 3), ["w1", "w2", "w3"])
    assert {*lsf.Surface.load(tmp_path / "plane_chain.npz").trajectories} == {"chain"}
    for name in ("curves.png", "planes.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_curve_training_lowers_the_barrier(tmp_path):
    curves.main([*QUICK, str(tmp_path), "--epochs", "12", "--width", "4"])
    rows = results(tmp_path, "curves")["rows"]
    assert rows["Bezier"][1] < 0.9 * rows["segment"][1]
    assert rows["chain"][1] < 0.9 * rows["segment"][1]


def test_width(tmp_path, capsys):
    assert width.main([*QUICK, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    found = results(tmp_path, "width")
    line = lsf.Line.load(tmp_path / "line.npz")
    assert found["distance"] == line.length > 0
    for name, at in (("SWA", 0.0), ("SGD", line.length)):
        rays = lsf.Rays.load(tmp_path / f"rays_{name}.npz")
        start = rays.values["train_loss"][:, 0]
        assert found[name]["loss"] == pytest.approx(start[0], rel=1e-3)
        assert found[name]["width"] is None or found[name]["width"] == pytest.approx(rays.width("train_loss"))
        assert min(abs(line.distances - at)) < 1e-9 * line.length
        assert rays.distances[-1] == pytest.approx(3 * line.length)


@pytest.mark.parametrize("main", [swa.main, curves.main, width.main])
def test_networks_without_a_recipe(main, tmp_path):
    with pytest.raises(SystemExit, match="--model must be one of preresnet110, .*vgg16, got lenet5-8x8"):
        main([*QUICK, str(tmp_path), "--model", "lenet5-8x8"])


def test_published_settings():
    """Of the papers' code: 200 epochs, averages from 161 on at 0.01; curves of 600 epochs at 0.015."""
    setting = lambda model, epochs, lr: command.Setting(
        experiment="swa", data="cifar100", root=None, model=model, width=64, epochs=epochs, batch_size=128, lr=lr,
        seed=0, quick=False, out=Path(), device=torch.device("cpu"), bf16=False, compile=False, rank=0, world=1,
    )  # fmt: skip
    vgg, resnet = setting("vgg16", 200, 0.05), setting("preresnet164", 150, 0.1)
    assert (swa.averaged_from(vgg), swa.averaged_from(resnet)) == (161, 126)
    assert swa.budget_ends(vgg) == [200, 250, 300]
    assert swa.budget_ends(resnet) == [150, 188, 225]
    for found, rate, decay in ((vgg, 0.01, 5e-4), (resnet, 0.05, 3e-4)):
        assert swa.recipe(found)[0] * found.lr == pytest.approx(rate)
        assert swa.recipe(found)[2] == curves.recipe(found)[0] == decay
    for found, epochs, rate in ((vgg, 600, 0.015), (resnet, 200, 0.03)):
        _, longer, slower = curves.recipe(found)
        assert (longer * found.epochs, slower * found.lr) == pytest.approx((epochs, rate))


def test_killed_experiment_goes_on_with_the_same_numbers(tmp_path):
    """SIGKILL in the middle of a training; the second call ends with the numbers of a run that was left alone."""
    flags = [*QUICK, str(tmp_path / "killed"), "--epochs", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.swa", *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "sgd.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(torch.load(tmp_path / "killed" / "sgd.pt", weights_only=True)["history"]) < 16
    torch.use_deterministic_algorithms(False)
    swa.main(flags)
    swa.main([*QUICK, str(tmp_path / "whole"), "--epochs", "16"])
    killed, whole = (results(tmp_path / name, "swa") for name in ("killed", "whole"))
    assert killed == whole
