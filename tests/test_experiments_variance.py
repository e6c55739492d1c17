"""The experiments on variance networks: their commands end to end, and the tests that tamper with means and sigmas."""

import json

import pytest
import torch

import losssurf_fast as lsf
from experiments import information_flow, noise, parameterizations, toy, variance_networks
from experiments.models.lenet5 import LeNet5
from experiments.models.vgg_like import VGGLike


def run(experiment, name, tmp_path, capsys):
    assert experiment.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["experiment"] == name
    return record["results"], capsys.readouterr().out


@pytest.fixture
def lenet():
    return LeNet5(8, 1, 10, 4).draw_weights("layer")


def test_variance_networks(tmp_path, capsys):
    results, out = run(variance_networks, "variance_networks", tmp_path, capsys)
    assert results["accuracy"].keys() == {"dropout", "variance"}
    for row in results["accuracy"].values():
        assert row.keys() == set(noise.SCHEMES) and all(0 <= value <= 100 for value in row.values())
    assert "10.1" in out and "99.3" in out and "MNIST" in out
    assert (tmp_path / "variance_networks.png").stat().st_size > 1000


def test_parameterizations(tmp_path, capsys):
    results, out = run(parameterizations, "parameterizations", tmp_path, capsys)
    assert list(results["rows"]) == ["layer", "neuron", "weight", "additive", "variance"]
    assert all(row["elbo"] < 0 for row in results["rows"].values())
    assert "-6.4e+04" in out and "96.3" in out
    assert (tmp_path / "parameterizations.png").stat().st_size > 1000


def test_information_flow(tmp_path, capsys):
    results, out = run(information_flow, "information_flow", tmp_path, capsys)
    assert results["trained"]["1 / alpha"] < results["untrained"]["1 / alpha"]
    assert len(results["history"]) == 2 and "1e-05" in out
    assert (tmp_path / "information_flow.png").stat().st_size > 1000


def test_toy(tmp_path, capsys):
    results, _ = run(toy, "toy", tmp_path, capsys)
    for row in results["accuracy"].values():
        assert row["deterministic"] == 25 and row["ensemble"] > 50
    assert {"toy_activations.png", "toy_regions.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_draw_of_the_toy_serves_the_whole_plane():
    model, point = toy.ToyNetwork(20), torch.randn(1, 2)
    classes = toy.one_draw(model, point.expand(500, 2), seed=3)
    assert (classes == classes[0]).all()


def test_separated_weights_have_the_same_distribution(lenet):
    twin = noise.separated(lenet)
    assert twin.fc1.parameterization == "additive" and "log_alpha" not in dict(twin.fc1.named_parameters())
    assert torch.equal(twin.fc1.weight, lenet.fc1.weight)
    torch.testing.assert_close(twin.fc1.log_sigma2, lenet.fc1.log_alpha + lenet.fc1.weight.square().log())
    assert lenet.fc1.parameterization == "layer"


def test_without_means_keeps_the_variances(lenet):
    twin = noise.without_means(lenet)
    assert (twin.fc1.weight == 0).all() and (lenet.fc1.weight != 0).any()
    assert torch.equal(twin.fc1.log_sigma2, noise.separated(lenet).fc1.log_sigma2)
    one_output = lambda model: lsf.predict(model, torch.randn(5, 1, 8, 8), "deterministic")
    torch.testing.assert_close(one_output(twin), one_output(twin)[:1].expand(5, -1))
    assert (one_output(lenet)[0] != one_output(lenet)[1]).any()


def test_permuted_sigmas_are_one_permutation(lenet):
    before = noise.separated(lenet).fc1
    first, again, other = (noise.with_permuted_sigmas(lenet, seed).fc1 for seed in (0, 0, 1))
    assert torch.equal(first.weight, before.weight)
    assert not torch.equal(first.log_sigma2, before.log_sigma2)
    assert torch.equal(first.log_sigma2.flatten().sort().values, before.log_sigma2.flatten().sort().values)
    assert torch.equal(first.log_sigma2, again.log_sigma2) and not torch.equal(first.log_sigma2, other.log_sigma2)


@pytest.mark.parametrize("size", (8, 28, 32))
def test_vgg_like(size):
    model = VGGLike(3, 10, 4).draw_weights("variance")
    assert [layer.parameterization for layer in noise.gaussian_layers(model)] == ["variance"] * 4
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_lenet_has_the_published_sizes():
    model = LeNet5(28, 1, 10, 20)
    assert model.fc1.weight.shape == (500, 800) and model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("scheme", noise.SCHEMES)
def test_log_probabilities_of_sure_networks_are_finite(scheme):
    """A probability of exp(-1000) is 0 in every dtype."""
    model = torch.nn.Sequential(lsf.nn.LRTLinear(1, 2, init_log_sigma2=-40.0))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [1000.0]]))
    log_probs = noise.Prediction(model, scheme, num_samples=3)(torch.ones(1, 1))
    torch.testing.assert_close(log_probs, torch.tensor([[-1000.0, 0.0]]), atol=0.1, rtol=0)


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--model must be a LeNet-5 or vgg-like, got preresnet20"):
        variance_networks.main(["--quick", "--model", "preresnet20", "--out", str(tmp_path)])
