import argparse
import sys

import pytest
import torch
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast import demo
from losssurf_fast.demo import averages, noise, paths, report
from losssurf_fast.demo import data as demo_data
from losssurf_fast.demo.models import NETWORKS, EagerBezier, EagerLRT, network, perceptron, resnet50_tensors
from losssurf_fast.demo.timing import compare
from losssurf_fast.demo.train import evidence_lower_bound, train


@pytest.fixture(scope="module")
def digits():
    return demo_data.load("digits", None)


def test_digits_are_split_the_same_way_every_time(digits):
    assert digits.train_x.shape == (1347, 64)
    assert digits.test_x.shape == (450, 64)
    assert torch.equal(digits.train_x, demo_data.load("digits", None).train_x)
    torch.testing.assert_close(digits.train_x.mean().item(), 0.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train_x.std().item(), 1.0)
    assert 0.1 < digits.chance() < 0.12


def test_all_networks_start_from_the_same_weights():
    plain = network("dropout", 64, 16, 10, seed=4)
    for kind in NETWORKS[1:]:
        other = network(kind, 64, 16, 10, seed=4)
        for name in ("first", "last"):
            assert torch.equal(getattr(plain, name).weight, getattr(other, name).weight)
        if kind == "variance":
            torch.testing.assert_close(other.hidden.log_sigma2.exp(), plain.hidden.weight.detach().square())
        else:
            assert torch.equal(plain.hidden.weight, other.hidden.weight)


def test_the_talks_effect(digits):
    """A variance network guesses with its mean weights and is right as an ensemble, like binary dropout."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = {kind: network(kind, 64, 128, 10, seed=0) for kind in ("dropout", "variance", "additive")}
        rows = {kind: train(model, digits, 15, 0, kind) for kind, model in models.items()}
    finally:
        torch.set_num_threads(threads)
    assert rows["dropout"].ensemble > 0.94
    assert rows["variance"].ensemble > 0.93
    assert rows["variance"].deterministic < 0.13
    assert 0.8 < rows["variance"].stochastic < rows["variance"].ensemble + 0.01
    assert rows["additive"].deterministic > 0.8
    assert rows["dropout"].elbo is None
    assert rows["variance"].elbo > rows["additive"].elbo
    assert rows["variance"].epochs[-1] == 15
    assert len(rows["variance"].epochs) == len(rows["variance"].curve_ensemble)


def test_evidence_lower_bound(digits):
    model = network("layer", 64, 16, 10, seed=0)
    with torch.no_grad(), lsf.prediction(model, "deterministic"):
        loss = F.cross_entropy(model(digits.train_x), digits.train_y)
    expected = -(1347 * loss + lsf.kl_divergence(model)).item()
    assert abs(evidence_lower_bound(model, digits) - expected) < 0.05 * abs(expected)


def test_eager_layer_is_the_same_distribution():
    ours = lsf.nn.LRTLinear(6, 4, parameterization="additive", init_log_sigma2=-1.0)
    eager = EagerLRT(ours, ours.log_sigma2, zero_mean=False)
    x = torch.randn(1, 6).expand(40_000, 6)
    with torch.no_grad():
        a, b = ours(x), eager(x)
    torch.testing.assert_close(a.mean(0), b.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(a.std(0), b.std(0), atol=0, rtol=0.03)
    torch.testing.assert_close(eager.kl(), ours.kl(exact=False), atol=0, rtol=1e-3)


def test_comparison_times_both(digits):
    timing = compare(digits, "variance", blocks=2, steps=1, seconds=0.0)
    assert timing.blocks == 2
    assert timing.eager_ms > 0 < timing.ours_ms
    assert timing.ratio == timing.eager_ms / timing.ours_ms


def test_demo_prints_the_table_and_saves_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(noise, "WIDTH", 16)
    monkeypatch.setattr(averages, "WIDTH", 16)
    monkeypatch.setattr(averages, "resnet50_tensors", lambda: torch.nn.Linear(50, 10))
    monkeypatch.setattr("losssurf_fast.demo.timing.HIDDEN", 16)
    monkeypatch.setattr(paths, "WIDTH", 8)
    monkeypatch.setattr(paths, "TIMED_WIDTH", 16)
    monkeypatch.setattr(paths, "resnet50_tensors", lambda: torch.nn.Linear(50, 10))
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args(["--quick", "--out", str(tmp_path / "out")])) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 60
    for kind in NETWORKS:
        assert any(line.startswith(kind) for line in out.splitlines())
    assert "eager" in out
    assert "ours" in out
    for weights in averages.WEIGHTS:
        assert any(line.startswith(weights) for line in out.splitlines())
    for path in (paths.LINE, paths.BEZIER, paths.CHAIN, paths.BAND):
        assert any(line.startswith(path) for line in out.splitlines())
    pictures = [*noise.PICTURES, *averages.PICTURES, *paths.PICTURES]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(pictures)


def test_swa_is_the_average_of_its_iterates_and_better_than_them(digits, monkeypatch):
    kept = []

    class Recording(averages.AveragedModel):
        def __init__(self, model, **options):
            super().__init__(model, **options)
            kept.append(model.last.weight.detach().clone())

        def update_parameters(self, model):
            super().update_parameters(model)
            kept.append(model.last.weight.detach().clone())
            torch.testing.assert_close(self.module.last.weight.detach(), torch.stack(kept).mean(0))

    monkeypatch.setattr(averages, "AveragedModel", Recording)
    monkeypatch.setattr(averages, "WIDTH", 64)
    monkeypatch.setattr(averages, "MODELS", 7)
    tracks = averages.train(digits, before=3, after=7, seed=0)
    assert len(kept) == 1 + 7
    assert [*tracks] == [*averages.WEIGHTS]
    for name, track in tracks.items():
        assert track.epochs == ([1, 2, 3] if name == "start" else [4, 5, 6, 7, 8, 9, 10])
        assert track.errors[-1] == track.error
    assert tracks["start"].error < 0.15
    assert tracks["SWA"].loss < tracks["SWA's last iterate"].loss
    assert tracks["SGD"].loss < tracks["start"].loss
    table = averages.table([tracks, tracks])
    assert {len(line) for line in table.splitlines()} == {58}
    assert f"{100 * tracks['SWA'].error:.2f} +- 0.00" in table


def test_updates_are_timed_on_equal_averages(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        timing = averages.time_updates(torch.nn.Linear(9, 5).to(dtype), blocks=2, seconds=0.0)
        assert timing.blocks == 2
        assert timing.eager_ms > 0 < timing.ours_ms
    ema = lambda model: lsf.AveragedModel(model, average="ema")
    monkeypatch.setattr(averages, "AveragedModel", ema)
    with pytest.raises(RuntimeError, match="averages of the same weights differ"):
        averages.time_updates(torch.nn.Linear(9, 5), blocks=2, seconds=0.0)


def test_paths_between_networks(digits):
    """The straight line has a barrier; the trained paths between the same two networks have none to speak of."""
    curves = paths.connect(digits, epochs=12, seed=0)
    loaders = {"train": [(digits.train_x, digits.train_y)], "test": [(digits.test_x, digits.test_y)]}
    reports = {name: lsf.evaluate_curve(curve, loaders, num_points=21) for name, curve in curves.items()}
    line = reports[paths.LINE]["train"]["loss"]
    assert line.barrier > 0.3
    for name in (paths.BEZIER, paths.CHAIN, paths.BAND):
        assert reports[name]["train"]["loss"].barrier < line.barrier / 5
        assert reports[name]["test"]["error"].max < 0.06
        assert reports[name].length > reports[paths.LINE].length
        for ours, theirs in ((curves[name].bends[i], curves[paths.LINE].bends[i]) for i in (0, -1)):
            assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    table = paths.table(reports).splitlines()
    assert {len(row) for row in table[1:]} == {58}
    assert f"{line.max:.4f}" in table[3] and table[3].endswith("1.00")


def test_eager_curve_is_the_same_curve():
    ends = [perceptron(6, 5, 3, seed) for seed in (0, 1)]
    eager, ours, x = EagerBezier(*ends), lsf.Curve(ends), torch.randn(4, 6)
    for t in (0.0, 0.3, 1.0):
        outputs = [curve(x, t=torch.tensor(t)) for curve in (eager, ours)]
        torch.testing.assert_close(*outputs)
        for curve, output in zip((eager, ours), outputs, strict=True):
            curve.zero_grad()
            output.square().sum().backward()
        torch.testing.assert_close(eager.layers[1].weights[1].grad, ours.bends[1].hidden.weight.grad)
        assert eager.layers[1].weights[0].grad is None


def test_steps_on_a_curve_are_timed_beside_plain_ones(digits, monkeypatch):
    monkeypatch.setattr(paths, "TIMED_WIDTH", 16)
    timings = [
        paths.time_weights([torch.zeros(9, 5), torch.zeros(5)], blocks=2, seconds=0.0),
        paths.time_steps(digits, blocks=2, seconds=0.0),
    ]
    for timing in timings:
        assert timing.blocks == 2
        assert timing.eager_ms > 0 < timing.ours_ms
    assert timings[0].plain_ms is None and timings[1].plain_ms > 0
    monkeypatch.setattr(paths, "Curve", lambda ends: lsf.Curve(ends[::-1]))
    monkeypatch.setattr(paths, "curve_coefficients", lambda t, num_bends: torch.ones(3))
    with pytest.raises(RuntimeError, match="weights on a curve differ"):
        paths.time_weights([torch.zeros(9, 5)], blocks=2, seconds=0.0)
    with pytest.raises(RuntimeError, match="our curve differ"):
        paths.time_steps(digits, blocks=2, seconds=0.0)


def test_resnet50():
    with torch.device("meta"):
        parameters = list(resnet50_tensors().parameters())
    assert len(parameters) == 161
    assert sum(p.numel() for p in parameters) == 25_557_032


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    def savefig(path, dpi):
        with open(path, "w") as file:
            file.write("half a picture")
        raise KeyboardInterrupt

    broken = report.new_figure(1, 1)
    broken.savefig = savefig
    (tmp_path / "table.png").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        report.save_pictures(tmp_path, {"table.png": broken})
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_mnist_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="pip install torchvision"):
        demo_data.load("mnist", None)


class FakeTorchvision:
    """Stands for torchvision.datasets: tiny MNIST, or a download that fails."""

    def __init__(self, fail=False):
        self.fail = fail

    def MNIST(self, root, train, download):
        if self.fail:
            raise RuntimeError("no network")
        count = 30 if train else 20
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        return argparse.Namespace(data=images, targets=torch.arange(count) % 10)


def test_mnist(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", argparse.Namespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", FakeTorchvision())
    with pytest.raises(SystemExit, match="needs --root DIR"):
        demo_data.load("mnist", None)
    mnist = demo_data.load("mnist", "somewhere")
    assert (mnist.train_x.shape, mnist.test_x.shape, mnist.side) == ((30, 784), (20, 784), 28)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", FakeTorchvision(fail=True))
    with pytest.raises(SystemExit, match="could not be downloaded:\nno network"):
        demo_data.load("mnist", "somewhere")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        demo_data.load("digits", None)


def test_demo_without_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        demo.run(argparse.Namespace())


def test_unusable_output_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "show", None)  # found out before any training
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "table.png").mkdir(parents=True)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    for out, message in (
        (tmp_path / "file", "--out must be a folder, .*file is none"),
        (tmp_path / "file" / "below", "--out must be a folder, .*below is none"),
        (tmp_path / "out", "table.png in --out .*out must be a file, it is a folder"),
        ("/proc/no/folder", "--out /proc/no/folder cannot be made: No such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            demo.run(parser.parse_args(["--out", str(out)]))
