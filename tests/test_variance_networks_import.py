"""Checkpoints in the layout of github.com/da-molchanov/variance-networks, whose layers' outputs are computed here."""

import collections
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf


class LeNet5(nn.Module):
    """Names and order of the peer's network, of a smaller size."""

    def __init__(self, bias=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 5, bias=bias), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 5, bias=bias), nn.BatchNorm2d(6)
        self.dense1, self.bn3 = nn.Linear(96, 12, bias=bias), nn.BatchNorm1d(12)
        self.dense2 = nn.Linear(12, 10, bias=bias)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = F.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        return self.dense2(self.bn3(self.dense1(x.flatten(1))).relu())


WEIGHTS = {"conv1": (4, 1, 5, 5), "conv2": (6, 4, 5, 5), "dense1": (12, 96), "dense2": (10, 12)}
X = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def checkpoint(noise=None, alpha_shape=None, bias=False, seed=0):
    """``noise`` maps layers to "log_alpha" (of ``alpha_shape``) or "sigma"."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(state))) * 0.1
    state = collections.OrderedDict()
    for name, shape in WEIGHTS.items():
        kind = (noise or {}).get(name)
        linear = len(shape) == 2
        if kind == "sigma":
            state[f"{name}.sigma"] = draw(*shape)
        else:
            state[f"{name}.W" if kind and linear else f"{name}.weight"] = draw(*shape)
        if kind == "log_alpha":
            state[f"{name}.log_alpha"] = draw(*(alpha_shape(shape) if alpha_shape else (1, 1))) - 3
        if bias:
            state[f"{name}.bias"] = draw(*(shape[:1] if not kind else (1, shape[0]) if linear else (1, shape[0], 1, 1)))
    for name, channels in (("bn1", 4), ("bn2", 6), ("bn3", 12)):
        state.update({f"{name}.weight": draw(channels) + 1, f"{name}.bias": draw(channels)})
        state.update({f"{name}.running_mean": draw(channels), f"{name}.running_var": draw(channels).exp()})
    return state


def posterior_of(layer):
    (posterior,) = layer.posteriors()
    return posterior.log_sigma2().exp().expand(posterior.shape)


ALPHA_SHAPES = {
    "scalar": ("layer", lambda shape: (1, 1)),
    "scalar_of_four": ("layer", lambda shape: (1,) * len(shape)),
    "outputs": ("neuron", lambda shape: (shape[0], *[1] * (len(shape) - 1))),
    "weights": ("weight", lambda shape: shape),
    "inputs": ("weight", lambda shape: (1, *shape[1:])),
    "scalar_into_neuron": ("neuron", lambda shape: (1, 1)),
    "scalar_into_weight": ("weight", lambda shape: (1,) * len(shape)),
}


@pytest.mark.parametrize("shape", ALPHA_SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_variational_dropout(shape, bias, prefix):
    parameterization, alpha_shape = ALPHA_SHAPES[shape]
    state = checkpoint(dict.fromkeys(WEIGHTS, "log_alpha"), alpha_shape, bias)
    model = lsf.to_lrt(LeNet5(bias), parameterization)
    given = {prefix + name: t for name, t in state.items()}
    assert lsf.load_variance_networks(model, given) is model
    for name in WEIGHTS:
        weight = state.get(f"{name}.W", state.get(f"{name}.weight"))
        layer = getattr(model, name)
        assert torch.equal(layer.weight, weight)
        sigma2 = (state[f"{name}.log_alpha"].exp() * weight.square()).expand(weight.shape)
        torch.testing.assert_close(posterior_of(layer), sigma2)
        if bias:
            assert torch.equal(layer.bias, state[f"{name}.bias"].flatten())
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(model.bn2, name), state[f"bn2.{name}"])
    assert torch.isfinite(model.eval()(X)).all()


def test_variance_layers_and_plain_ones():
    state = checkpoint({"dense1": "sigma", "conv2": "sigma"}, bias=True)
    assert (state["dense1.sigma"] < 0).any()
    model = lsf.to_lrt(LeNet5(bias=True), "variance", include=["dense1", "conv2"])
    lsf.load_variance_networks(model, state)
    for name in ("dense1", "conv2"):
        layer = getattr(model, name)
        torch.testing.assert_close(layer.log_sigma2.exp(), state[f"{name}.sigma"].square())
        assert torch.equal(layer.bias, state[f"{name}.bias"].flatten())
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    x = torch.randn(2000, 96, generator=torch.Generator().manual_seed(1))
    draws = model.dense1(x, seed=2)
    var = F.linear(x.square(), state["dense1.sigma"].square())  # the peer's LinearVariance
    standardised = (draws - state["dense1.bias"]) / var.sqrt()
    assert abs(standardised.mean()) < 0.03 and abs(standardised.std() - 1) < 0.02


def test_sigma_of_zero_is_no_infinity():
    state = checkpoint({"dense1": "sigma"})
    state["dense1.sigma"][0] = 0
    model = lsf.load_variance_networks(lsf.to_lrt(LeNet5(), "variance", include="dense1"), state)
    assert torch.isfinite(model.dense1.log_sigma2).all()
    assert model.dense1.log_sigma2[0].exp().max() < 1e-37


@pytest.mark.parametrize("legacy", [False, True])
def test_files(tmp_path, legacy):
    state = checkpoint({"dense1": "log_alpha"})
    torch.save(state, tmp_path / "net.cpt", _use_new_zipfile_serialization=not legacy)
    for path in (tmp_path / "net.cpt", str(tmp_path / "net.cpt")):
        model = lsf.load_variance_networks(lsf.to_lrt(LeNet5(), "layer", include="dense1"), path)
        assert torch.equal(model.dense1.weight, state["dense1.W"])
    with pytest.raises(FileNotFoundError):
        lsf.load_variance_networks(model, tmp_path / "none.cpt")
    (tmp_path / "net.cpt").write_bytes((tmp_path / "net.cpt").read_bytes()[:500])
    with pytest.raises(ValueError, match="load_variance_networks: .* is damaged"):
        lsf.load_variance_networks(model, tmp_path / "net.cpt")


def test_wrapped_and_half_precision_models():
    state = checkpoint({"dense1": "log_alpha"})
    model = lsf.to_lrt(LeNet5().to(torch.bfloat16), "layer", include="dense1")
    wrapped = torch.compile(model, backend="eager")
    assert lsf.load_variance_networks(wrapped, state) is wrapped
    assert model.dense1.weight.dtype == torch.bfloat16
    assert torch.equal(model.dense1.weight, state["dense1.W"].bfloat16())
    assert torch.equal(model.dense1.log_alpha, state["dense1.log_alpha"].flatten())


def test_a_bare_layer():
    state = {"W": torch.randn(3, 4), "log_alpha": torch.full((1, 1), -2.0), "bias": torch.randn(1, 3)}
    layer = lsf.load_variance_networks(lsf.nn.LRTLinear(4, 3, parameterization="layer"), state)
    assert layer.log_alpha.item() == -2
    assert torch.equal(layer.bias, state["bias"][0])


def refused(model, state, *parts):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="the checkpoint is of another model") as error:
        lsf.load_variance_networks(model, state)
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_other_models_are_refused_with_advice():
    vdo, variance = checkpoint({"dense1": "log_alpha"}), checkpoint({"dense1": "sigma"})
    refused(
        LeNet5(), vdo, "missing in it: dense1.weight", "in it, but not in the model: dense1.W, dense1.log_alpha",
        "convert with lsf.to_lrt(model, 'layer', include=['dense1'])",
    )  # fmt: skip
    refused(
        lsf.to_lrt(LeNet5(), "layer", include="dense1"), variance, "missing in it: dense1.weight, dense1.log_alpha",
        "convert with lsf.to_lrt(model, 'variance', include=['dense1'])",
    )  # fmt: skip
    refused(
        lsf.to_lrt(LeNet5(), "additive", include="dense1"), vdo, "missing in it: dense1.sigma",
        "but not in the model: dense1.log_alpha",
    )  # fmt: skip
    fine = checkpoint({"dense1": "log_alpha"}, lambda shape: shape)
    refused(
        lsf.to_lrt(LeNet5(), "layer", include="dense1"), fine, "dense1.log_alpha (12, 96) for dense1.log_alpha (1,)",
        "convert with lsf.to_lrt(model, 'weight', include=['dense1'])",
    )  # fmt: skip
    refused(lsf.to_lrt(LeNet5(), "layer"), checkpoint(), "it has no noise (log_alpha, sigma)")
    wide = dict(vdo, **{"dense2.weight": torch.zeros(10, 13), "extra.weight": torch.zeros(2)})
    refused(
        lsf.to_lrt(LeNet5(), "layer", include="dense1"), wide, "dense2.weight (10, 13) for dense2.weight (10, 12)",
        "but not in the model: extra.weight",
    )  # fmt: skip
    bernoulli = checkpoint()
    bernoulli["dense1.W"] = bernoulli.pop("dense1.weight")
    refused(lsf.to_lrt(LeNet5(), "variance", include="dense1"), bernoulli, "'dense1' had Bernoulli or uniform noise")


@pytest.mark.parametrize(
    ("model", "state", "message"),
    [
        (None, {}, "model must be a torch.nn.Module, got NoneType"),
        (nn.Linear(2, 2), None, "checkpoint must be a state_dict or the path of one, got NoneType"),
        (
            nn.Linear(2, 2),
            {"weight": 3},
            "checkpoint must map names to tensors, got a",
        ),
    ],
)
def test_bad_arguments(model, state, message):
    with pytest.raises(TypeError, match=f"load_variance_networks: {message}"):
        lsf.load_variance_networks(model, state)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.empty(3, 4, device="meta"), ValueError, "fc.W must be a dense real tensor with values"),
        (torch.ones(3, 4).to_sparse(), ValueError, "fc.W must be a dense real tensor with values"),
        (torch.ones(3, 4, dtype=torch.complex64), ValueError, "fc.W must be a dense real tensor with values"),
        (torch.full((3, 4), float("nan")), ValueError, "fc.W must have finite numbers"),
        ({"W": torch.ones(3, 4)}, TypeError, "must map names to tensors, got a dict under 'fc.W'; if it holds"),
    ],
)
def test_values_that_cannot_be_copied_leave_the_model_alone(value, error, message):
    model = lsf.to_lrt(nn.Sequential(collections.OrderedDict(fc=nn.Linear(4, 3))), "layer")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {"fc.bias": torch.zeros(1, 3), "fc.log_alpha": torch.zeros(1, 1), "fc.W": value}
    with pytest.raises(error, match=re.escape(message)):
        lsf.load_variance_networks(model, state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_keys_that_are_no_names():
    model = lsf.to_lrt(nn.Sequential(nn.Linear(4, 3)), "layer")
    with pytest.raises(TypeError, match="must map names to tensors, got a Tensor under 1"):
        lsf.load_variance_networks(model, {1: torch.ones(1)})
