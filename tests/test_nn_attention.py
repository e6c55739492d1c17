import copy
import itertools
import pickle

import pytest
import torch
from common import BF16, F16, F64
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")
parameterizations = pytest.mark.parametrize("parameterization", ALL)
FLAGS = (False, True)


def make(parameterization="additive", **options):
    return lsf.nn.LRTMultiheadAttention(8, 2, parameterization=parameterization, **options)


def noisy(parameterization, **options):
    first = "init_log_sigma2" if parameterization in ("additive", "variance") else "init_log_alpha"
    return make(parameterization, **{first: 0.0}, **options)


def both(**options):
    """nn.MultiheadAttention and ours with its weights, neither with noise."""
    plain = nn.MultiheadAttention(8, 2, **options)
    for bias in (plain.in_proj_bias, plain.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    layer = make(init_log_sigma2=-80.0, **options)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.endswith("log_sigma2") for name in missing) and not unexpected
    return plain, layer


def sequences(batch_first=False, kdim=8, vdim=8):
    tensors = [torch.randn(3, length, size) for length, size in ((4, 8), (5, kdim), (5, vdim))]
    return tensors if batch_first else [t.transpose(0, 1) for t in tensors]


def masks(batch=3):
    padding = torch.zeros(batch, 5, dtype=torch.bool)
    padding[0, 3:] = True
    upper = torch.ones(4, 5).triu(1).bool()
    return upper, torch.rand(batch * 2, 4, 5).gt(0.7).logical_and(torch.arange(5) > 0), padding


def assert_same(actual, expected):
    assert (actual[1] is None) == (expected[1] is None)
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


# ---- equal to the torch layer without noise ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", FLAGS)
@pytest.mark.parametrize("bias", FLAGS)
@pytest.mark.parametrize("add_bias_kv", FLAGS)
@pytest.mark.parametrize("add_zero_attn", FLAGS)
@pytest.mark.parametrize("kdim", [None, 6])
def test_without_noise_it_is_the_torch_layer(batch_first, bias, add_bias_kv, add_zero_attn, kdim):
    sizes = {"kdim": kdim, "vdim": kdim and 3}
    plain, layer = both(
        batch_first=batch_first, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, **sizes
    )
    query, key, value = sequences(batch_first, **{k: v for k, v in sizes.items() if v})
    upper, each, padding = masks()
    for mode, attn_mask, key_padding_mask in itertools.product(FLAGS, (None, upper, each), (None, padding)):
        plain.train(mode), layer.train(mode)
        arguments = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            expected = plain(query, key, value, **arguments, **options)
            assert_same(layer(query, key, value, **arguments, **options), expected)


def test_float_masks_and_positional_arguments():
    plain, layer = both()
    arguments = (*sequences(), torch.randn(3, 5), True, torch.randn(4, 5), False)
    assert_same(layer(*arguments), plain(*arguments))


@pytest.mark.parametrize("batch_first", FLAGS)
def test_unbatched(batch_first):
    plain, layer = both(batch_first=batch_first)
    query, key, value = (t[0] for t in sequences(True))
    upper, _, padding = masks()
    for options in ({}, {"key_padding_mask": padding[0]}, {"attn_mask": upper, "need_weights": False}):
        assert_same(layer(query, key, value, **options), plain(query, key, value, **options))


@pytest.mark.parametrize("add_zero_attn", FLAGS)
@pytest.mark.parametrize("need_weights", FLAGS)
def test_causal_hint(add_zero_attn, need_weights):
    plain, layer = both(add_zero_attn=add_zero_attn)
    x = torch.randn(5, 3, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = plain(x, x, x, attn_mask=mask, need_weights=need_weights)  # without a hint, which is a hint only
    assert_same(layer(x, x, x, attn_mask=mask, need_weights=need_weights, is_causal=True), expected)


def test_dropout_follows_training():
    plain, layer = both(dropout=0.5)
    x = torch.randn(4, 3, 8)
    for need_weights in FLAGS:
        assert_same(layer.eval()(x, x, x, need_weights=need_weights), plain.eval()(x, x, x, need_weights=need_weights))
    layer.train()
    dropped = layer(x, x, x)[1]
    assert not torch.equal(dropped, layer(x, x, x)[1])
    assert (layer(x, x, x, average_attn_weights=False)[1] == 0).any()


def test_gradients_without_noise_are_those_of_the_torch_layer():
    plain, layer = both(add_bias_kv=True)
    inputs = sequences()
    for one in (plain, layer):
        one(*inputs)[0].square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)


# ---- noise -----------------------------------------------------------------------------------------------------------


@parameterizations
@pytest.mark.parametrize("kdim", [None, 6])
def test_parameters(parameterization, kdim):
    layer = make(parameterization, kdim=kdim)
    scale = "log_sigma2" if parameterization in ("additive", "variance") else "log_alpha"
    inputs = {"in_proj": (24, 8)} if kdim is None else {"q_proj": (8, 8), "k_proj": (8, 6), "v_proj": (8, 8)}
    assert isinstance(layer, nn.MultiheadAttention) and isinstance(layer.out_proj, lsf.nn.LRTLinear)
    for name, shape in inputs.items():
        expected = {"layer": (1,), "neuron": shape[:1]}.get(parameterization, shape)
        assert tuple(getattr(layer, f"{name}_{scale}").shape) == expected
        weight = getattr(layer, f"{name}_weight")
        assert weight is None if parameterization == "variance" else tuple(weight.shape) == shape
    assert [p.name for p in layer.posteriors()] == [f"{name}_weight" for name in inputs]
    total = sum(p.shape.numel() for one in (layer, layer.out_proj) for p in one.posteriors())
    assert total == sum(a * b for a, b in inputs.values()) + 64
    assert f"parameterization={parameterization!r}" in repr(layer)


@parameterizations
@pytest.mark.parametrize("kdim", [None, 6])
def test_every_projection_draws_noise(parameterization, kdim):
    layer = noisy(parameterization, kdim=kdim)
    query, key, value = sequences(kdim=kdim or 8)
    heads = lambda seed: layer._project(query, key, value, seed)
    first, second = heads(torch.tensor(1)), heads(torch.tensor(2))
    assert all((a != b).all() for a, b in zip(first, second, strict=True))
    out = layer(query, key, value)[0]
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with lsf.prediction(layer, "deterministic"):
        assert torch.equal(layer(query, key, value)[0], layer(query, key, value)[0])


@parameterizations
def test_projections_are_lrt_linear(parameterization):
    layer, seed = noisy(parameterization), torch.tensor(3)
    query, key, value = sequences()
    (posterior,) = layer.posteriors()
    arguments = (posterior.weight, posterior.scale, layer.in_proj_bias)
    q, k, v = layer._project(query, key, value, seed)
    for i, (out, x) in enumerate(zip((q, k, v), (query, key, value), strict=True)):
        whole = lsf.ops.lrt_linear(x, *arguments, parameterization=parameterization, seed=seed)
        torch.testing.assert_close(out, whole[..., 8 * i : 8 * (i + 1)])


def test_noise_is_the_same_however_the_inputs_are_shared():
    layer, x = noisy("additive"), torch.randn(4, 3, 8)
    expected = layer(x, x, x, seed=5)
    for key, value in ((x.clone(), x.clone()), (x, x.clone())):
        assert_same(layer(x, key, value, seed=5), expected)
    y = x.clone()
    assert_same(layer(x, y, y, seed=5), expected)


def test_noise_of_queries_keys_values_and_output_is_independent():
    layer = noisy("variance", bias=False)
    x = torch.ones(50, 40, 8)
    q, k, v = layer._project(x, x, x, torch.tensor(2))
    plain = lsf.nn.LRTLinear.local(layer.out_proj, x, 0)
    draws = torch.stack([t.flatten() for t in (q, k, v, plain)])
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.05
    same = torch.randn(30, 20, 8)
    seen = []
    layer.out_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    layer(same, same, same, seed=7)
    assert seen[0] != 7


def test_manual_seed_and_seed_repeat_the_noise():
    layer, x = noisy("layer"), torch.randn(4, 3, 8)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(layer(x, x, x)[0])
    assert torch.equal(*outputs)
    assert not torch.equal(layer(x, x, x)[0], outputs[0])
    assert torch.equal(layer(x, x, x, seed=2)[0], layer(x, x, x, seed=torch.tensor(2))[0])


@parameterizations
@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("sampling", ["weights", "flipout"])
def test_weight_space_sampling(parameterization, kdim, sampling):
    layer = noisy(parameterization, kdim=kdim, sampling=sampling)
    inputs = sequences(kdim=kdim or 8)
    assert not torch.equal(layer(*inputs)[0], layer(*inputs)[0])
    assert torch.equal(layer(*inputs, seed=1)[0], layer(*inputs, seed=1)[0])
    with lsf.sample_weights(layer, 3) as draw:
        out = layer(*inputs)[0]
        assert torch.equal(layer(*inputs)[0], out)
        drawn = {**dict(layer.named_parameters()), **draw.weights}
    plain = nn.MultiheadAttention(8, 2, kdim=kdim)
    plain.load_state_dict({n: drawn[n] for n in plain.state_dict()})
    torch.testing.assert_close(out, plain(*inputs)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parameterization", ["neuron", "variance"])
def test_gradcheck(parameterization):
    layer = make(parameterization, dtype=F64, **({} if parameterization == "variance" else {"init_log_alpha": -1.0}))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 1, 8, dtype=F64, requires_grad=True)

    def call(x, *p):
        named = dict(zip(names, p, strict=True))
        return torch.func.functional_call(layer, named, (x, x, x), {"seed": 3, "need_weights": False})[0]

    assert torch.autograd.gradcheck(call, (x, *parameters))


@parameterizations
@pytest.mark.parametrize("half", [BF16, F16])
def test_half_precision(parameterization, half):
    layer, x = make(parameterization), torch.randn(4, 3, 8)
    for mode in FLAGS:
        assert layer.train(mode)(*[x.to(half)] * 3)[0].dtype == half
    layer.to(half)
    assert all(p.dtype == (torch.float32 if "log_" in name else half) for name, p in layer.named_parameters())
    mask = torch.randn(4, 4)
    for mode in FLAGS:
        for need_weights in FLAGS:
            out = layer.train(mode)(*[x.to(half)] * 3, attn_mask=mask, need_weights=need_weights)[0]
            assert out.dtype == half


@parameterizations
def test_autocast(parameterization):
    layer, x = make(parameterization, add_bias_kv=True), torch.randn(4, 3, 8)
    with torch.autocast("cpu", BF16):
        for mode, need_weights in itertools.product(FLAGS, FLAGS):
            assert layer.train(mode)(x, x, x, need_weights=need_weights)[0].dtype == BF16


@parameterizations
@pytest.mark.parametrize("need_weights", FLAGS)
def test_compile_fullgraph(parameterization, need_weights):
    torch._dynamo.reset()
    layer, x, seed = make(parameterization), torch.randn(4, 3, 8), torch.tensor(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in FLAGS:
        layer.train(mode)
        assert_same(
            compiled(x, x, x, need_weights=need_weights, seed=seed),
            layer(x, x, x, need_weights=need_weights, seed=seed),
        )
    layer.train()
    assert not torch.equal(compiled(x, x, x)[0], compiled(x, x, x)[0])


@parameterizations
def test_copies_and_state(parameterization):
    layer, x = make(parameterization), torch.randn(4, 3, 8)
    expected = layer(x, x, x, seed=1)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x, seed=1)[0], expected)
    made = make(parameterization, device="meta").to_empty(device="cpu")
    made.reset_parameters()
    assert all(torch.isfinite(p).all() for p in made.parameters())
    assert (made.in_proj_bias == 0).all() and (made.out_proj.bias == 0).all()
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x, x, x, seed=1)[0], expected)


def test_plain_output_projection_is_called():
    layer, x = noisy("additive"), torch.randn(4, 3, 8)
    layer.out_proj = nn.Linear(8, 8)
    calls = []
    layer.out_proj.register_forward_hook(lambda *_: calls.append(1))
    assert layer(x, x, x, seed=1)[0].shape == x.shape
    assert calls == [1]


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 3, 8)


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ((X, X, None), {}, TypeError, "value must be a tensor, got NoneType"),
        (
            (X[..., :7], X, X),
            {},
            ValueError,
            r"query must be \[L, 8\], or with a batch if query has one, got \(4, 3, 7\)",
        ),
        ((X, X[0], X[0]), {}, ValueError, r"key must be \[L, 8\], or with a batch if query has one, got \(3, 8\)"),
        ((X[None], X[None], X[None]), {}, ValueError, "query must be"),
        ((X, X, X[:2]), {}, ValueError, r"key and value must have equal lengths, got \(4, 3, 8\) and \(2, 3, 8\)"),
        ((X, X[:, :2], X[:, :2]), {}, ValueError, "query and key must have one batch size"),
        ((X, X, X), {"is_causal": True}, RuntimeError, "is_causal is a hint about attn_mask, which is missing"),
        (
            (X, X, X),
            {"attn_mask": torch.zeros(4, 5)},
            ValueError,
            r"attn_mask must be \(4, 4\) or \(6, 4, 4\), got \(4, 5\)",
        ),
        ((X, X, X), {"attn_mask": torch.zeros(4, 4).int()}, TypeError, "attn_mask must be bool or floating-point, got"),
        ((X, X, X), {"key_padding_mask": torch.zeros(4)}, ValueError, r"key_padding_mask must be \(3, 4\), got \(4,\)"),
        ((X.long(),) * 3, {}, TypeError, "lrt_linear: x must have one of the dtypes"),
    ],
)
def test_bad_input(parameterization, inputs, options, error, message):
    layer = make(parameterization)
    for mode in FLAGS:
        with pytest.raises(error, match=message):
            layer.train(mode)(*inputs, **options)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)])
    with pytest.raises(NotImplementedError, match="query is nested"):
        make(batch_first=True)(nested, nested, nested)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "fancy"}, "LRTMultiheadAttention: parameterization must be one of"),
        ({"sampling": "fancy"}, "LRTMultiheadAttention: sampling must be one of"),
        ({"init_log_sigma2": float("nan")}, "LRTMultiheadAttention: init_log_sigma2 must be a finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lsf.nn.LRTMultiheadAttention(8, 2, **arguments)


def test_attention_uses_the_library_kernel(monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(a[5]) or kernel(*a))
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    make()(X, X, X, need_weights=False, attn_mask=mask, is_causal=True)
    make()(X, X, X, need_weights=False, attn_mask=mask)
    assert calls == [True, False]


def test_flipout_turns_samples_in_both_layouts():
    """Signs belong to samples: with the sequence first, a batch of equal samples still gives unequal outputs."""
    first = lsf.nn.LRTMultiheadAttention(8, 2, batch_first=True, sampling="flipout", init_log_alpha=0.0)
    other = lsf.nn.LRTMultiheadAttention(8, 2, sampling="flipout", init_log_alpha=0.0)
    other.load_state_dict(first.state_dict())
    x = torch.randn(1, 5, 8).expand(3, -1, -1)
    expected = first(x, x, x, need_weights=False, seed=4)[0]
    x = x.transpose(0, 1)
    found = other(x, x, x, need_weights=False, seed=4)[0]
    torch.testing.assert_close(found.transpose(0, 1), expected)
    assert not torch.allclose(expected[0], expected[1])
