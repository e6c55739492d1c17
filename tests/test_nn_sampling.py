"""The ways in which a layer samples: its outputs, its weights, or its weights with flipout's signs."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast.nn.weight_space import SAMPLINGS
from losssurf_fast.ops.lrt import PARAMETERIZATIONS

WEIGHT_SPACE = ("weights", "flipout")


def layer_of(parameterization, sampling, **options):
    return lsf.nn.LRTLinear(7, 5, parameterization=parameterization, sampling=sampling, **options)


def signs(rows, cols, seed, sample):
    return torch.where(lsf.ops.philox_normal((rows, cols), seed, sample=sample) < 0, -1.0, 1.0)


@pytest.mark.parametrize("sampling", WEIGHT_SPACE)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_sampling_formula_and_gradients(parameterization, sampling):
    layer, x = layer_of(parameterization, sampling), torch.randn(4, 7, requires_grad=True)
    (posterior,) = layer.posteriors()
    noise = lsf.ops.philox_normal(35, 11).view(5, 7) * (0.5 * posterior.log_sigma2()).exp()
    if sampling == "weights":
        if layer.scale_name == "log_alpha":
            noise = noise * layer.weight.sign()
        weight = noise if layer.weight is None else layer.weight + noise
        expected = F.linear(x, weight, layer.bias)
    else:
        turned = F.linear(x * signs(4, 7, 11, 1), noise) * signs(4, 5, 11, 2)
        expected = turned + layer.plain(x, layer.weight)
    output = layer(x, 11)
    torch.testing.assert_close(output, expected)
    leaves, grad = [x, *layer.parameters()], torch.randn(4, 5)
    for ours, theirs in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (4, 3, 7), (0, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("sampling", WEIGHT_SPACE)
def test_sampling_shapes_and_samples(sampling, shape):
    """A sample is a place along the first dimension; what lies in it shares one draw."""
    layer, x = layer_of("additive", sampling), torch.randn(shape)
    output = layer(x, 3)
    assert output.shape == (*shape[:-1], 5)
    if len(shape) == 3:
        same = layer(x[:, :1].expand(shape), 3)
        torch.testing.assert_close(same, same[:, :1].expand(same.shape))


@pytest.mark.parametrize("parameterization", ["neuron", "additive", "variance"])
def test_flipout_has_the_variance_of_weights_and_uncorrelated_samples(parameterization):
    """Over many draws: mean and variance of each output as with "weights"; a batch of equal rows decorrelates."""
    draws = 2_000
    layer = lsf.nn.LRTLinear(6, 2, parameterization=parameterization, init_log_sigma2=None)
    x = torch.randn(1, 6).expand(2, 6)
    outputs = {}
    with torch.no_grad():
        for sampling in WEIGHT_SPACE:
            layer.sampling = sampling
            outputs[sampling] = torch.stack([layer(x, seed) for seed in range(draws)])  # [draws, 2 rows, 2 outputs]
        (posterior,) = layer.posteriors()
        variance = x[0].square() @ posterior.log_sigma2().exp().t()
        mean = layer.plain(x, layer.weight)
    for found in outputs.values():
        assert ((found.mean(0) - mean).abs() < 5 * (variance / draws).sqrt()).all()
        assert ((found.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / draws)).all()
    correlation = {s: torch.corrcoef(found[:, :, 0].t())[0, 1].item() for s, found in outputs.items()}
    assert correlation["weights"] == pytest.approx(1, abs=1e-4)
    assert abs(correlation["flipout"]) < 5 / math.sqrt(draws)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_follows_schemes_and_seeds(sampling):
    layer, x = layer_of("additive", sampling), torch.randn(4, 7)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    mean = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.eval()(x), mean)
    with lsf.prediction(layer, "stochastic"):
        assert not torch.equal(layer(x), mean)
    layer.train()
    with lsf.prediction(layer, "deterministic"):
        assert torch.equal(layer(x), mean)
    with lsf.sample_weights(layer, 1) as draw:  # no noise but the draw's
        assert torch.equal(layer(x), F.linear(x, draw.weights["weight"], layer.bias))
    plain = layer_of("additive", "local")
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.kl("normal"), plain.kl("normal"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampling", WEIGHT_SPACE)
def test_sampling_dtypes_and_autocast(sampling, dtype):
    layer = layer_of("additive", sampling)
    wide = layer(torch.ones(4, 7), 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(4, 7), 3).dtype == torch.bfloat16
    output = layer.to(dtype)(torch.ones(4, 7, dtype=dtype), 3)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), wide, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sampling", WEIGHT_SPACE)
def test_sampling_compile(sampling):
    layer, x = layer_of("additive", sampling), torch.randn(4, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    seed = torch.tensor(3)
    output, expected = compiled(x, seed), layer(x, seed)
    torch.testing.assert_close(output, expected)
    parameters = list(layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(output.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_flipout_without_bias_and_frozen():
    layer, x = layer_of("additive", "flipout", bias=False), torch.randn(4, 7)
    layer.weight.requires_grad_(False)
    layer(x, 3).sum().backward()
    assert layer.weight.grad is None and layer.log_sigma2.grad is not None


def test_set_sampling_on_a_converted_model():
    model = lsf.to_lrt(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)))
    assert lsf.set_sampling(model, "flipout") is model
    assert [model[0].sampling, model[2].sampling] == ["flipout", "flipout"]
    assert "sampling='flipout'" in repr(model) and copy.deepcopy(model)[0].sampling == "flipout"
    assert "sampling" not in repr(lsf.set_sampling(model, "local"))
    x = torch.randn(1, 7).expand(6, 7)
    lsf.set_sampling(model, "weights")
    rows = model(x)
    torch.testing.assert_close(rows, rows[:1].expand(6, 3))
    lsf.set_sampling(model, "flipout")
    rows = model(x)
    assert (rows - rows[:1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: layer_of("additive", "bbb"), ValueError, "LRTLinear: sampling must be one of .*, got 'bbb'"),
        (lambda: lsf.set_sampling(nn.Linear(2, 2), "weights"), ValueError, "set_sampling: Linear has no stochastic"),
        (lambda: lsf.set_sampling(3, "weights"), TypeError, "set_sampling: model must be a torch.nn.Module, got int"),
        (
            lambda: lsf.set_sampling(layer_of("additive", "local"), "x"),
            ValueError,
            "set_sampling: sampling must be one of .*, got 'x'",
        ),
    ],
)
def test_sampling_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sampling_set_to_something_else():
    layer = layer_of("additive", "local")
    layer.sampling = "other"
    with pytest.raises(ValueError, match="LRTLinear: sampling must be one of .*, got 'other'"):
        layer(torch.randn(4, 7))


@pytest.mark.parametrize("sampling", WEIGHT_SPACE)
def test_predict_with_many_draws_in_a_call_needs_local_sampling(sampling):
    """Copies of a batch would share one draw of the weights."""
    model = lsf.set_sampling(lsf.to_lrt(nn.Sequential(nn.Linear(7, 3))), sampling)
    assert lsf.predict(model, torch.randn(4, 7), num_samples=4).shape == (4, 3)
    with pytest.raises(ValueError, match=f"predict: draws_per_call=2 needs .* 'local', got {sampling!r}"):
        lsf.predict(model, torch.randn(4, 7), num_samples=4, draws_per_call=2)


# ---- convolutions ---------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "conv2d": lambda p: (lsf.nn.LRTConv2d(4, 6, 3, padding=1, groups=2, parameterization=p), (3, 4, 5, 5)),
    "conv1d, no batch": lambda p: (lsf.nn.LRTConv1d(4, 6, 3, parameterization=p), (4, 7)),
    "transposed": lambda p: (lsf.nn.LRTConvTranspose2d(4, 6, 3, groups=2, parameterization=p), (3, 4, 5, 5)),
    "transposed, one group": lambda p: (lsf.nn.LRTConvTranspose1d(4, 6, 3, parameterization=p), (3, 4, 5)),
}


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sampling_of_convolutions(name, parameterization):
    """Both ways and an installed draw, against the layer's own plain output."""
    layer, shape = CONVOLUTIONS[name](parameterization)
    nn.init.normal_(layer.scale, -1.0, 0.5)
    x, batch = torch.randn(shape), shape[0] if name != "conv1d, no batch" else 1
    spatial = [1] * (len(layer.posteriors()[0].shape) - 2)
    with lsf.sample_weights(layer, 11, prior=None) as draw:
        installed = layer(x)
    weight = draw.weights["weight"]
    torch.testing.assert_close(installed, layer.plain(x, weight))
    layer.sampling = "weights"
    torch.testing.assert_close(layer(x, seed=11), installed)
    layer.sampling = "flipout"
    (posterior,) = layer.posteriors()
    noise = lsf.ops.philox_normal(posterior.shape.numel(), 11).view(posterior.shape)
    noise = noise * (0.5 * posterior.log_sigma2()).exp()
    mean = layer.plain(x, layer.weight)
    turn = lambda t, channels, sample: t * signs(batch, channels, 11, sample).view(batch, channels, *spatial)
    deviation = layer.plain(turn(x, 4, 1).view(shape), noise, with_bias=False)
    torch.testing.assert_close(layer(x, seed=11), mean + turn(deviation, 6, 2).view(mean.shape))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sample_weights_kl_of_convolutions(name, parameterization):
    layer, _ = CONVOLUTIONS[name](parameterization)
    for prior in ("normal", "log_uniform", "ard"):
        torch.testing.assert_close(lsf.sample_weights(layer, prior=prior).kl, lsf.kl_divergence(layer, prior))
