import copy
import pickle

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")
SCALES = {
    "layer": ("log_alpha", (1,)),
    "neuron": ("log_alpha", (5,)),
    "weight": ("log_alpha", (5, 7)),
    "additive": ("log_sigma2", (5, 7)),
    "variance": ("log_sigma2", (5, 7)),
}


@pytest.fixture(params=ALL)
def layer(request):
    return lsf.nn.LRTLinear(7, 5, parameterization=request.param)


def expected_mean(layer, x):
    if layer.weight is None:
        return layer.bias.expand(*x.shape[:-1], layer.out_features)
    return F.linear(x, layer.weight, layer.bias)


def test_parameters(layer):
    name, shape = SCALES[layer.parameterization]
    expected = {"weight": (5, 7), "bias": (5,), name: shape}
    if layer.parameterization == "variance":
        del expected["weight"]
        assert layer.weight is None
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == expected
    assert isinstance(layer, nn.Linear)
    assert layer.scale is getattr(layer, name)
    assert f"parameterization={layer.parameterization!r}" in repr(layer)
    assert lsf.nn.LRTLinear(7, 5, bias=False, parameterization=layer.parameterization).bias is None


def test_initial_noise_is_alike():
    square = 1 / (3 * 64)  # mean square of nn.Linear's initial weights
    for name in ("layer", "neuron", "weight", "additive"):
        layer = lsf.nn.LRTLinear(64, 64, parameterization=name)
        log_alpha = layer.scale - torch.tensor(square).log() if name == "additive" else layer.scale
        torch.testing.assert_close(log_alpha, torch.full_like(log_alpha, -5.0), atol=0.1, rtol=0)
    variance = lsf.nn.LRTLinear(64, 64, parameterization="variance").log_sigma2.exp().mean()
    torch.testing.assert_close(variance.item(), square, atol=0, rtol=0.1)


def test_initial_values_given():
    assert (lsf.nn.LRTLinear(3, 2, parameterization="neuron", init_log_alpha=-2.0).log_alpha == -2).all()
    for name in ("additive", "variance"):
        assert (lsf.nn.LRTLinear(3, 2, parameterization=name, init_log_sigma2=-7.0).log_sigma2 == -7).all()
    zero = nn.Linear(3, 2)
    nn.init.zeros_(zero.weight)
    assert torch.isfinite(lsf.to_lrt(zero, "additive").log_sigma2).all()


def test_scheme_follows_mode(layer):
    x = torch.randn(2, 3, 7)
    noisy = layer(x, seed=3)
    direct = lsf.ops.lrt_linear(
        x, layer.weight, layer.scale, layer.bias, parameterization=layer.parameterization, seed=3
    )
    assert torch.equal(noisy, direct)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), expected_mean(layer, x))
    assert F.relu(layer(x), inplace=True).shape == (2, 3, 5)


def test_gradients_reach_every_parameter(layer):
    x = torch.randn(4, 7, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_manual_seed_repeats_the_noise(layer):
    x = torch.randn(4, 7)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)


def test_without_noise_it_is_nn_linear():
    linear, x = nn.Linear(7, 5), torch.randn(4, 7)
    expected = linear(x)
    layer = lsf.to_lrt(copy.deepcopy(linear), "additive", init_log_sigma2=-60.0)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_model_keeps_wide_scale(layer, half):
    value = layer.scale.detach().clone()
    layer(torch.randn(2, 7)).sum().backward()
    layer.to(half)
    assert layer.scale.dtype == layer.scale.grad.dtype == torch.float32
    assert torch.equal(layer.scale, value)
    assert all(p.dtype == half for n, p in layer.named_parameters() if n != layer.scale_name)
    x = torch.randn(2, 7, dtype=half)
    assert layer(x).dtype == half
    assert layer.eval()(x).dtype == half
    made = lsf.nn.LRTLinear(7, 5, parameterization=layer.parameterization, dtype=half)
    assert (made.scale.dtype, made.bias.dtype) == (torch.float32, half)
    assert layer.double().scale.dtype == torch.float64
    assert layer.to(half).scale.dtype == torch.float32


@pytest.mark.parametrize("name", ["weight", "log_alpha"])
def test_parametrized(name):
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    layer, x = lsf.nn.LRTLinear(7, 5, parameterization="neuron", init_log_alpha=-1.0), torch.randn(3, 7)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
    nn.utils.parametrize.register_parametrization(layer, name, Double())
    torch.testing.assert_close(layer(x, seed=1), doubled(x, seed=1))
    layer.to(torch.bfloat16)(x.bfloat16()).sum().backward()


def test_export(layer):
    x = torch.randn(3, 7)
    assert torch.export.export(layer, (x,)).module()(x).shape == (3, 5)
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), expected_mean(layer, x))


def test_half_precision_input_with_wide_parameters(layer):
    x = torch.randn(2, 7, dtype=torch.bfloat16)
    assert layer(x).dtype == layer.eval()(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), expected_mean(layer, x.float()), atol=2e-2, rtol=2e-2)


def test_autocast(layer):
    x = torch.randn(2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.eval()(x).dtype == torch.bfloat16


def test_meta_then_to_empty(layer):
    name = layer.parameterization
    made = lsf.nn.LRTLinear(7, 5, parameterization=name, device="meta").to_empty(device="cpu")
    made.reset_parameters()
    assert all(torch.isfinite(p).all() for p in made.parameters())
    torch.manual_seed(0)
    fresh = lsf.nn.LRTLinear(7, 5, parameterization=name)
    torch.manual_seed(0)
    made.reset_parameters()
    for a, b in zip(made.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_state(layer):
    x = torch.randn(3, 7)
    expected = layer(x, seed=1)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, seed=1), expected)
    fresh = lsf.nn.LRTLinear(7, 5, parameterization=layer.parameterization)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, seed=1), expected)
    missing, unexpected = fresh.load_state_dict(nn.Linear(7, 5).state_dict(), strict=False)
    assert missing == [layer.scale_name]
    assert unexpected == (["weight"] if layer.weight is None else [])


def test_compile_fullgraph(layer):
    torch._dynamo.reset()  # the limit of recompilations counts the other parametrizations' layers too
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(4, 7)
    seed = torch.tensor(5)
    torch.testing.assert_close(compiled(x, seed), layer(x, seed))
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x, seed).square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x, seed).square().sum().backward()
    for grad, p in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)
    with lsf.prediction(layer, "deterministic"):
        torch.testing.assert_close(compiled(x), expected_mean(layer, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(layer, reentrant):
    def gradients(run):
        torch.manual_seed(3)
        layer.zero_grad()
        run(torch.ones(4, 7, requires_grad=True)).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    plain = gradients(layer)
    recomputed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_func_grad(layer):
    x = torch.randn(4, 7)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x, 1)).square().sum()

    parameters = dict(layer.named_parameters())
    grads = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()})
    loss(parameters).backward()
    for name, p in parameters.items():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "fancy"}, "LRTLinear: parameterization must be one of .* got 'fancy'"),
        ({"parameterization": "layer", "init_log_sigma2": 0.0}, "'layer' has log_alpha"),
        ({"parameterization": "variance", "init_log_alpha": 0.0}, "no meaning for 'variance'"),
        ({"init_log_sigma2": 0.0, "init_log_alpha": 0.0}, "not both"),
        ({"init_log_sigma2": float("inf")}, "LRTLinear: init_log_sigma2 must be a finite float32 number, got inf"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lsf.nn.LRTLinear(3, 2, **arguments)


def test_bad_input(layer):
    with pytest.raises(ValueError, match=r"lrt_linear: x must be \[\.\.\., 7\] for .*, got \(2, 6\)"):
        layer(torch.randn(2, 6))
    with pytest.raises(TypeError, match="lrt_linear: x must have one of the dtypes .* got torch.int64"):
        layer.eval()(torch.ones(2, 7).long())
    with pytest.raises(TypeError, match="lrt_linear: x must be a tensor, got NoneType"):
        layer.eval()(None)


def test_variance_layer_checks_its_input_in_evaluation_as_in_training():
    layer = lsf.nn.LRTLinear(7, 5, parameterization="variance")
    for x in (None, torch.ones(2, 7).long(), torch.ones(2, 7).double(), torch.ones(2, 6), torch.tensor(1.0)):
        with pytest.raises((TypeError, ValueError)) as training:
            layer.train()(x)
        with pytest.raises(training.type) as evaluation:
            layer.eval()(x)
        assert str(evaluation.value) == str(training.value)
