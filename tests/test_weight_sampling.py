"""lsf.sample_weights: one draw of a whole model's weights, installed for a block."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast.ops.lrt import PARAMETERIZATIONS

WEIGHTS = ("0.weight", "2.weight")


def network(parameterization="additive", **options):
    plain = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    return lsf.to_lrt(plain, parameterization, **options)


def expected_draws(model, seed, sample=0):
    """By the formulas of the layers, one after the other."""
    found = {}
    for row, (name, layer) in enumerate((n, m) for n, m in model.named_modules() if isinstance(m, lsf.nn.LRTLayer)):
        (posterior,) = layer.posteriors()
        noise = lsf.ops.philox_normal(posterior.shape.numel(), seed, row_offset=row, sample=sample)
        std = (0.5 * posterior.log_sigma2()).exp()
        if layer.scale_name == "log_alpha":
            std = std * posterior.weight.sign()  # the noise multiplies the weight
        mean = 0 if posterior.weight is None else posterior.weight
        found[f"{name}.weight"] = mean + std * noise.view(posterior.shape)
    return found


def plain_output(model, weights, x):
    hidden = F.relu(F.linear(x, weights["0.weight"], model[0].bias))
    return F.linear(hidden, weights["2.weight"], model[2].bias)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_sample_weights_draws_and_computes_with_them(parameterization):
    model, x = network(parameterization), torch.randn(5, 7)
    with lsf.sample_weights(model, 3, sample=2) as draw:
        outputs = [model(x), model.eval()(x)]
        with lsf.prediction(model, "deterministic"):
            outputs.append(model(x))
    expected = expected_draws(model, 3, sample=2)
    assert tuple(draw.weights) == WEIGHTS
    for name, weight in draw.weights.items():
        torch.testing.assert_close(weight, expected[name])
    for output in outputs:
        assert torch.equal(output, plain_output(model, draw.weights, x))
    model.train()
    assert not torch.equal(model(x), outputs[0])  # noise of its own again


@pytest.mark.parametrize("prior", ["normal", "log_uniform", "ard"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_sample_weights_gradients_and_kl(parameterization, prior):
    """Those of the formulas and of lsf.kl_divergence; parameters stay as they are."""
    model, x = network(parameterization), torch.randn(5, 7)
    before = copy.deepcopy(model.state_dict())
    with lsf.sample_weights(model, 3, prior=prior, prior_std=0.5) as draw:
        (model(x).square().sum() + 0.1 * draw.kl).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kl = lsf.kl_divergence(model, prior, prior_std=0.5)
    torch.testing.assert_close(draw.kl, kl)
    loss = plain_output(model, expected_draws(model, 3), x).square().sum() + 0.1 * kl
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, ours, theirs in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(ours.grad, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_sample_weights_approximate_kl_and_none():
    model = network()
    approximate = lsf.kl_divergence(model, "log_uniform", exact=False)
    torch.testing.assert_close(lsf.sample_weights(model, prior="log_uniform", exact=False).kl, approximate)
    assert lsf.sample_weights(model, prior=None).kl == 0


def test_sample_weights_seed():
    model = network()
    torch.manual_seed(0)
    first, second = lsf.sample_weights(model), lsf.sample_weights(model)
    again = lsf.sample_weights(model, first.seed)
    other = lsf.sample_weights(model, first.seed, sample=1)
    assert torch.equal(first.weights["0.weight"], again.weights["0.weight"])
    for different in (second, other):
        assert not torch.equal(first.weights["0.weight"], different.weights["0.weight"])


def test_sample_weights_blocks_nest_and_end_with_exceptions():
    model, x = network(), torch.randn(5, 7)
    first, second = lsf.sample_weights(model, 1), lsf.sample_weights(model, 2)
    outputs = {}
    with first:
        outputs["first"] = model(x)
        with second:
            outputs["second"] = model(x)
            with first:  # again, inside itself
                assert torch.equal(model(x), outputs["first"])
            assert torch.equal(model(x), outputs["second"])
        assert torch.equal(model(x), outputs["first"])
    assert not torch.equal(outputs["first"], outputs["second"])
    with pytest.raises(KeyboardInterrupt), second:
        raise KeyboardInterrupt
    assert all(layer.drawn is None for layer in (model[0], model[2]))
    with first:  # later
        assert torch.equal(model(x), outputs["first"])


def test_sample_weights_tied_layers_draw_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    lsf.to_lrt(model)
    draw = lsf.sample_weights(model, 0)
    assert list(draw.weights) == ["0.weight"]
    with draw:
        assert torch.equal(model[1](torch.eye(4)), draw.weights["0.weight"].t())
        assert model[0].drawn["weight"] is model[1].drawn["weight"]
    torch.testing.assert_close(draw.kl, lsf.kl_divergence(model, "normal"))
    shared = nn.Sequential(model[0], model[0])  # one module in two places
    assert list(lsf.sample_weights(shared, 0).weights) == ["0.weight"]


def test_sample_weights_frozen_parameters():
    model, x = network(), torch.randn(5, 7)
    model[0].weight.requires_grad_(False)
    model[2].log_sigma2.requires_grad_(False)
    with lsf.sample_weights(model, 3) as draw:
        (model(x).sum() + draw.kl).backward()
    has_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert has_grad == {"0.log_sigma2", "0.bias", "2.weight", "2.bias"}
    for p in model.parameters():
        p.requires_grad_(False)
    assert not lsf.sample_weights(model, 3).kl.requires_grad


def test_sample_weights_in_no_grad_needs_no_graph():
    model = network()
    with torch.no_grad():
        draw = lsf.sample_weights(model, 3)
    assert not draw.kl.requires_grad and not draw.weights["0.weight"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sample_weights_dtypes(dtype):
    model = network().to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with lsf.sample_weights(model, 3) as draw:
        assert model(torch.randn(5, 7, dtype=dtype)).dtype == dtype
    assert draw.weights["0.weight"].dtype == dtype and draw.kl.dtype == wide


def test_sample_weights_autocast():
    model, x = network(), torch.randn(5, 7)
    with lsf.sample_weights(model, 3) as draw, torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        (output.float().square().sum() + draw.kl).backward()
    assert output.dtype == torch.bfloat16 and model[0].log_sigma2.grad.dtype == torch.float32


def test_sample_weights_compiled_model():
    """The compiled model takes each draw as an input: later draws run the same code, and gradients flow through it."""
    model, x = network(), torch.randn(5, 7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        with lsf.sample_weights(compiled, seed) as draw:
            output = compiled(x)
        assert tuple(draw.weights) == WEIGHTS
        torch.testing.assert_close(output, plain_output(model, draw.weights, x))
        plain = plain_output(model, draw.weights, x).square().sum()
        expected = torch.autograd.grad(
            plain, model[0].log_sigma2, retain_graph=True
        )  # torch may donate compiled buffers
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), model[0].log_sigma2), expected)
    assert counter.frame_count == 1
    assert compiled.eval()(x).shape == (5, 3)  # outside: the mean weights
    torch.testing.assert_close(compiled(x), model.eval()(x))


def test_sample_weights_compiled_step():
    """The draw itself inside a compiled function."""
    model = network()

    def loss(seed):
        draw = lsf.sample_weights(model, seed)
        return sum(w.square().sum() for w in draw.weights.values()) + draw.kl

    seed = torch.tensor(5)
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(seed), loss(seed))


def test_sample_weights_copies_and_pickles_have_no_draw():
    model, x = network(), torch.randn(5, 7)
    with lsf.sample_weights(model, 3) as draw:
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert model.state_dict().keys() == copied.state_dict().keys()
    buffer.seek(0)
    for other in (copied, pickled, torch.load(buffer, weights_only=False)):
        assert all(layer.drawn is None for layer in (other[0], other[2]))
        torch.testing.assert_close(other.eval()(x), model.eval()(x))
    assert draw.weights["0.weight"].requires_grad


def test_sample_weights_of_one_layer_and_its_repr():
    layer = lsf.nn.LRTLinear(3, 2)
    draw = lsf.sample_weights(layer, 11)
    assert list(draw.weights) == ["weight"] and repr(draw) == "WeightSample(1 tensors, seed=11)"


def test_sample_weights_fit_a_plain_model():
    model, plain = network(), nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 7)
    with lsf.sample_weights(model, 3) as draw:
        expected = model(x)
    biases = {name: p for name, p in model.state_dict().items() if name.endswith("bias")}
    torch.testing.assert_close(torch.func.functional_call(plain, {**biases, **draw.weights}, (x,)), expected)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda m: lsf.sample_weights(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda m: lsf.sample_weights(nn.Linear(2, 2)), ValueError, "Linear has no stochastic layers"),
        (lambda m: lsf.sample_weights(m, "1"), TypeError, "seed must be an int or a 0-d int64 tensor, got str"),
        (lambda m: lsf.sample_weights(m, 2**64), ValueError, "seed must fit in 64 bits"),
        (lambda m: lsf.sample_weights(m, prior="flat"), ValueError, "prior must be one of .*, got 'flat'"),
        (lambda m: lsf.sample_weights(m, prior_std=0.0), ValueError, "prior_std must be positive, got 0.0"),
        (lambda m: lsf.sample_weights(m, prior_std="1"), TypeError, "prior_std must be a number, got str"),
        (lambda m: lsf.sample_weights(m, sample=-1), ValueError, r"sample must lie in \[0, 4294967296\), got -1"),
        (lambda m: lsf.sample_weights(m.to("meta")), ValueError, "must hold values, got tensors on the meta device"),
    ],
)
def test_sample_weights_bad_inputs(call, error, message):
    with pytest.raises(error, match=f"sample_weights: .*{message}"):
        call(network())


def test_sample_weights_on_two_devices():
    model = network()
    model[2].to("meta")
    with pytest.raises(ValueError, match="sample_weights: Sequential must hold values"):
        lsf.sample_weights(model)
