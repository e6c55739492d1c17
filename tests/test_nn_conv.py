import copy
import pickle
import re

import pytest
import torch
from common import BF16, F16, F64
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")
SPATIAL = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
PLAIN = {
    **{getattr(lsf.nn, f"LRTConv{d}d"): getattr(nn, f"Conv{d}d") for d in (1, 2, 3)},
    **{getattr(lsf.nn, f"LRTConvTranspose{d}d"): getattr(nn, f"ConvTranspose{d}d") for d in (1, 2, 3)},
}
CASES = [
    (lsf.nn.LRTConv1d, {"stride": 2, "padding": 1}),
    (lsf.nn.LRTConv1d, {"padding": "same", "dilation": 2, "padding_mode": "circular"}),
    (lsf.nn.LRTConv2d, {}),
    (lsf.nn.LRTConv2d, {"padding": "same", "kernel_size": (4, 3), "groups": 2}),
    (lsf.nn.LRTConv2d, {"padding": (2, 1), "padding_mode": "reflect", "stride": (2, 1)}),
    (lsf.nn.LRTConv2d, {"padding": "valid", "bias": False}),
    (lsf.nn.LRTConv3d, {"padding": 1, "padding_mode": "replicate"}),
    (lsf.nn.LRTConvTranspose1d, {"stride": 2, "output_padding": 1}),
    (lsf.nn.LRTConvTranspose2d, {"stride": 2, "padding": 1, "groups": 2}),
    (lsf.nn.LRTConvTranspose2d, {"stride": (3, 2), "dilation": 2, "bias": False}),
    (lsf.nn.LRTConvTranspose3d, {"stride": 2}),
]
BOTH = [(lsf.nn.LRTConv2d, {"padding": 1}), (lsf.nn.LRTConvTranspose2d, {"stride": 2, "groups": 2})]
cases = pytest.mark.parametrize(("cls", "options"), CASES)
both = pytest.mark.parametrize(("cls", "options"), BOTH)
parameterizations = pytest.mark.parametrize("parameterization", ALL)


def make(cls, options, **more):
    return cls(4, 6, **{"kernel_size": 3, **options, **more})


def inputs(cls, batch=2, dtype=torch.float32):
    return torch.randn(batch, 4, *SPATIAL[int(cls.__name__[-2])], dtype=dtype)


def log_alpha(parameterization):
    return {} if parameterization == "variance" else {"init_log_alpha": -1.0}


@cases
def test_without_noise_it_is_the_torch_layer(cls, options):
    plain = make(PLAIN[cls], options)
    layer = make(cls, options, init_log_sigma2=-80.0)
    assert isinstance(layer, PLAIN[cls])
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["log_sigma2"], [])
    for x in (inputs(cls), inputs(cls)[0], inputs(cls, 4)[::2]):
        expected = plain(x)
        torch.testing.assert_close(layer.train()(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.eval()(x), expected)


@cases
@parameterizations
def test_shapes_agree_in_training_and_evaluation(cls, options, parameterization):
    layer, plain = make(cls, options, parameterization=parameterization), make(PLAIN[cls], options)
    outputs = {"layer": (1,), "neuron": (6,)}.get(parameterization, tuple(plain.weight.shape))
    assert tuple(layer.scale.shape) == outputs
    for x in (inputs(cls), inputs(cls)[0], inputs(cls, 0)):
        assert layer.train()(x).shape == layer.eval()(x).shape == plain(x).shape
    if parameterization == "variance":
        bias = 0.0 if layer.bias is None else layer.bias.view(-1, *[1] * len(layer.kernel_size))
        torch.testing.assert_close(layer(inputs(cls)), torch.zeros_like(plain(inputs(cls))) + bias)


@both
@parameterizations
def test_moments(cls, options, parameterization):
    """Mean and variance over draws are those of convolutions with the mean weights and the variances."""
    torch.manual_seed(0)
    layer = make(cls, options, parameterization=parameterization, **log_alpha(parameterization), dtype=F64)
    if parameterization in ("neuron", "weight"):
        nn.init.uniform_(layer.log_alpha, -3, 1)
    x = inputs(cls, 1, F64)
    (posterior,) = layer.posteriors()
    sigma2 = posterior.log_sigma2().detach().exp().expand(posterior.shape)
    with torch.no_grad():
        draws = torch.stack([layer(x, seed=s) for s in range(4000)])
        mean = layer.eval()(x)
        var = layer.plain(x.square(), sigma2, with_bias=False)
    spread = (var / 4000).sqrt()
    assert ((draws.mean(0) - mean).abs() / spread).max() < 5.5
    torch.testing.assert_close(draws.var(0) / var, torch.ones_like(var), atol=0.15, rtol=0)


def test_neuron_alphas_of_grouped_transposed_convolutions_reach_their_channels():
    layer = lsf.nn.LRTConvTranspose1d(4, 6, 3, groups=2, parameterization="neuron")
    with torch.no_grad():
        layer.log_alpha.copy_(torch.arange(6.0))
    alpha = layer.spread(layer.scale).expand_as(layer.weight)[..., 0]
    assert alpha[:2].tolist() == [[0, 1, 2]] * 2
    assert alpha[2:].tolist() == [[3, 4, 5]] * 2
    torch.testing.assert_close(
        layer.kl("normal"),
        lsf.ops.kl_normal([layer.weight], [alpha[..., None] + layer.weight.square().log()], 1.0),
    )


@both
@parameterizations
def test_gradients_reach_every_parameter(cls, options, parameterization):
    layer = make(cls, options, parameterization=parameterization)
    x = inputs(cls).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@both
@pytest.mark.parametrize("parameterization", ["neuron", "additive", "variance"])
def test_gradcheck(cls, options, parameterization):
    layer = make(cls, options, parameterization=parameterization, **log_alpha(parameterization), dtype=F64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    call = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,), {"seed": 3})
    x = torch.randn(1, 4, 3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters))


@both
@parameterizations
def test_memory_format_is_kept(cls, options, parameterization):
    layer = make(cls, options, parameterization=parameterization)
    x = inputs(cls)
    expected = layer(x, seed=2)
    out = layer(x.to(memory_format=torch.channels_last), seed=2)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)
    evaluated = layer.eval()(x.to(memory_format=torch.channels_last))
    assert evaluated.is_contiguous(memory_format=torch.channels_last)


@both
@parameterizations
@pytest.mark.parametrize("half", [BF16, F16])
def test_half_precision(cls, options, parameterization, half):
    layer, x = make(cls, options, parameterization=parameterization), inputs(cls)
    beside = layer.eval()(x.to(half))
    assert beside.dtype == layer.train()(x.to(half)).dtype == half
    torch.testing.assert_close(beside.float(), layer.eval()(x), atol=3e-2, rtol=3e-2)
    layer.train().to(half)
    assert layer.scale.dtype == torch.float32
    assert layer(x.to(half)).dtype == layer.eval()(x.to(half)).dtype == half


@both
@parameterizations
def test_autocast(cls, options, parameterization):
    layer = make(cls, options, parameterization=parameterization)
    with torch.autocast("cpu", BF16):
        assert layer(inputs(cls)).dtype == layer.eval()(inputs(cls)).dtype == BF16


@both
@parameterizations
def test_compile_fullgraph(cls, options, parameterization):
    torch._dynamo.reset()
    layer, x, seed = make(cls, options, parameterization=parameterization), inputs(cls), torch.tensor(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seed=seed), layer(x, seed=seed))
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_compile_with_output_size():
    torch._dynamo.reset()
    layer = lsf.nn.LRTConvTranspose2d(4, 6, 3, stride=2)
    x, seed = torch.randn(2, 4, 5, 5), torch.tensor(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, [12, 11], seed), layer(x, [12, 11], seed))


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
@pytest.mark.parametrize("sampling", ["local", "weights", "flipout"])
def test_output_size(parameterization, sampling):
    plain = nn.ConvTranspose2d(4, 6, 3, stride=2)
    layer = lsf.nn.LRTConvTranspose2d(4, 6, 3, stride=2, parameterization=parameterization, sampling=sampling)
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 4, 5, 6)
    for size in (None, [11, 14], [2, 6, 12, 13]):
        assert layer.train()(x, size).shape == layer.eval()(x, size).shape == plain(x, size).shape
        if parameterization == "additive":
            torch.testing.assert_close(layer(x, size), plain(x, size))
    assert layer(x, output_size=[12, 14], seed=torch.tensor(1)).shape == (2, 6, 12, 14)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, [20, 20])


@both
@parameterizations
def test_copies_and_state(cls, options, parameterization):
    layer, x = make(cls, options, parameterization=parameterization), inputs(cls)
    expected = layer(x, seed=1)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, seed=1), expected)
    made = make(cls, options, parameterization=parameterization, device="meta").to_empty(device="cpu")
    made.reset_parameters()
    assert all(torch.isfinite(p).all() for p in made.parameters())
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x, seed=1), expected)
    assert f"parameterization={parameterization!r}" in repr(layer)


@both
@parameterizations
@pytest.mark.parametrize("sampling", ["weights", "flipout"])
def test_weight_space_sampling(cls, options, parameterization, sampling):
    layer, x = make(cls, options, parameterization=parameterization, sampling=sampling), inputs(cls)
    assert layer(x).shape == layer.eval()(x).shape
    with lsf.sample_weights(layer, 3) as draw:
        expected = layer.plain(x, draw.weights["weight"])
        assert torch.equal(layer(x), expected)


def test_a_shard_draws_what_the_whole_batch_draws():
    layer, x = lsf.nn.LRTConv2d(4, 6, 3), torch.randn(4, 4, 5, 5)
    whole = layer(x, seed=7)
    options = {"parameterization": "additive", "seed": 7, "row_offset": 2 * 6}
    half = lsf.ops.lrt_conv2d(x[2:], layer.weight, layer.scale, layer.bias, **options)
    torch.testing.assert_close(half, whole[2:])


def test_bad_input_is_refused_in_evaluation_as_in_training():
    layer = lsf.nn.LRTConv2d(4, 6, 3, parameterization="variance")
    bad = [
        None,
        torch.ones(2, 4, 5, 5).long(),
        torch.ones(2, 3, 5, 5),
        torch.ones(5, 5),
        torch.ones(2, 4, 5, 5).double(),
    ]
    for x in bad:
        with pytest.raises((TypeError, ValueError)) as training:
            layer.train()(x)
        with pytest.raises(training.type) as evaluation:
            layer.eval()(x)
        assert str(evaluation.value) == str(training.value)
        assert str(training.value).startswith("lrt_conv2d: ")
    for x in bad[:2]:
        for other in (lsf.nn.LRTConv2d(4, 6, 3).eval(), lsf.nn.LRTConv2d(4, 6, 3, padding_mode="reflect", padding=1)):
            with pytest.raises(TypeError, match="lrt_conv2d: x must "):
                other(x)
        with pytest.raises(TypeError, match="lrt_conv_transpose2d: x must "):
            lsf.nn.LRTConvTranspose2d(4, 6, 3)(x)
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"lrt_conv2d: x must be larger for kernel sizes \(3, 3\)"):
            layer.train(mode)(torch.ones(2, 4, 2, 2))


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (5, 5), (7,)])
def test_padding_modes_name_the_shape_that_came(shape):
    layer = lsf.nn.LRTConv2d(4, 6, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match=re.escape(f"[N, 4, 2 sizes] or [4, 2 sizes], got {shape}")):
        layer(torch.ones(shape))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parameterization": "fancy"}, ValueError, "LRTConv2d: parameterization must be one of"),
        ({"parameterization": "layer", "init_log_sigma2": 0.0}, ValueError, "'layer' has log_alpha"),
        ({"init_log_alpha": "a"}, TypeError, "LRTConv2d: init_log_alpha must be a real number, got str"),
        ({"sampling": "fancy"}, ValueError, "LRTConv2d: sampling must be one of"),
        ({"groups": 3}, ValueError, "divisible by groups"),
        ({"padding_mode": "fancy"}, ValueError, "padding_mode must be one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        lsf.nn.LRTConv2d(4, 6, 3, **arguments)
    if "fancy" in arguments.get("parameterization", ""):
        with pytest.raises(error, match="LRTConvTranspose2d: parameterization"):
            lsf.nn.LRTConvTranspose2d(4, 6, 3, **arguments)


def test_a_small_network_learns():
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0, :, :4].sum((1, 2)) > x[:, 0, :, 4:].sum((1, 2))).long()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    lsf.to_lrt(model, "layer")
    loss_fn, optimizer = lsf.ELBOLoss(model, 64), torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        loss = loss_fn(model(x), y, kl_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probabilities = lsf.predict(model, x, num_samples=4, seed=0)
    assert (probabilities.argmax(-1) == y).float().mean() > 0.9
    assert F.nll_loss(probabilities.log(), y) < 0.4


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_keep_channels_last(padding_mode, parameterization):
    layer = lsf.nn.LRTConv2d(4, 6, 3, padding=1, padding_mode=padding_mode, parameterization=parameterization)
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    for mode in (True, False):
        assert layer.train(mode)(x).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_weights_decide_in_evaluation_as_in_training():
    layer = lsf.nn.LRTConv2d(4, 6, 3, parameterization="variance").to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 6)
    assert layer.eval()(x).stride() == layer.train()(x).stride()
    assert layer.eval()(x[0]).shape == layer.train()(x[0]).shape == (6, 3, 4)


@pytest.mark.parametrize(
    "make", [lambda **kw: lsf.nn.LRTConv2d(4, 6, 3, **kw), lambda **kw: lsf.nn.LRTLinear(5, 6, **kw)]
)
def test_evaluation_on_the_meta_device(make):
    layer, x = make(parameterization="variance", device="meta"), torch.empty(2, 4, 5, 5, device="meta")
    assert layer.eval()(x).shape == layer.train()(x, seed=torch.empty((), dtype=torch.int64, device="meta")).shape
