import copy
import pickle

import pytest
import torch
from common import BF16, F16, F64
from torch import nn

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")
parameterizations = pytest.mark.parametrize("parameterization", ALL)
INDEX = torch.tensor([[1, 2, 3], [2, 2, 8]])


def make(parameterization="additive", **options):
    return lsf.nn.LRTEmbedding(9, 5, parameterization=parameterization, **options)


def noisy(parameterization, **options):
    """A layer with much noise."""
    first = "init_log_sigma2" if parameterization in ("additive", "variance") else "init_log_alpha"
    return make(parameterization, **{first: 0.0}, **options)


@parameterizations
def test_parameters(parameterization):
    layer = make(parameterization)
    shape = {"layer": (1,), "neuron": (5,)}.get(parameterization, (9, 5))
    assert isinstance(layer, nn.Embedding)
    assert tuple(layer.scale.shape) == shape
    assert (layer.weight is None) == (parameterization == "variance")
    assert f"parameterization={parameterization!r}" in repr(layer)
    names = {layer.scale_name} | ({"weight"} if layer.weight is not None else set())
    assert set(layer.state_dict()) == names


@pytest.mark.parametrize("index", [INDEX, INDEX.int(), INDEX.t(), INDEX[:0], torch.tensor(3)])
def test_without_noise_it_is_nn_embedding(index):
    plain = nn.Embedding(9, 5, padding_idx=2)
    layer = make(padding_idx=2, init_log_sigma2=-80.0)
    assert layer.load_state_dict(plain.state_dict(), strict=False) == (["log_sigma2"], [])
    torch.testing.assert_close(layer(index), plain(index))
    assert torch.equal(layer.eval()(index), plain(index))


@parameterizations
def test_moments(parameterization):
    torch.manual_seed(0)
    layer = make(parameterization, dtype=F64, **({} if parameterization == "variance" else {"init_log_alpha": -1.0}))
    index = torch.arange(9).repeat(20000, 1)
    with torch.no_grad():
        draws, mean = layer(index, seed=1), layer.eval()(index[0])
    (posterior,) = layer.posteriors()
    var = posterior.log_sigma2().detach().exp().expand(9, 5)
    assert ((draws.mean(0) - mean).abs() / (var / 20000).sqrt()).max() < 5.5
    torch.testing.assert_close(draws.var(0) / var, torch.ones_like(var), atol=0.06, rtol=0)
    covariance = torch.cov(draws[:, 0].t())  # dimensions, and lookups of one row, are independent
    assert (covariance - covariance.diag().diag()).abs().max() < 0.05 * covariance.diag().max()


def test_each_lookup_of_a_row_draws_its_own_noise():
    out = noisy("additive")(torch.tensor([4, 4, 4]))
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])


@parameterizations
@pytest.mark.parametrize("sampling", ["local", "weights", "flipout"])
def test_padding_has_no_noise_and_no_gradient(parameterization, sampling):
    layer = noisy(parameterization, padding_idx=2, sampling=sampling)
    out = layer(INDEX)
    padding = INDEX == 2
    assert (out[padding] == 0).all()
    assert (out[~padding] != 0).all()
    out.square().sum().backward()
    for parameter in layer.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0
        if sampling == "local" and parameter.shape[0] == 9:
            assert (parameter.grad[2] == 0).all() and (parameter.grad[4] == 0).all()
    with lsf.sample_weights(layer):
        assert (layer(INDEX)[padding] == 0).all()


def test_padding_row_that_is_not_zero_stays_itself():
    layer = noisy("additive", padding_idx=2)
    with torch.no_grad():
        layer.weight[2] = 3.0
    for sampling in ("local", "weights", "flipout"):
        lsf.set_sampling(layer, sampling)
        assert (layer(INDEX)[INDEX == 2] == 3).all()


@parameterizations
def test_gradcheck(parameterization):
    layer = make(parameterization, dtype=F64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    call = lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (INDEX,), {"seed": 3})
    assert torch.autograd.gradcheck(call, parameters)


def test_sparse_gradients():
    layer, dense = noisy("additive", sparse=True), noisy("additive")
    dense.load_state_dict(layer.state_dict())
    for one in (layer, dense):
        one(INDEX, seed=1).square().sum().backward()
    assert layer.weight.grad.is_sparse and layer.log_sigma2.grad.is_sparse
    torch.testing.assert_close(layer.weight.grad.to_dense(), dense.weight.grad)
    torch.testing.assert_close(layer.log_sigma2.grad.to_dense(), dense.log_sigma2.grad)


def test_scale_grad_by_freq():
    layer, plain = make(scale_grad_by_freq=True), nn.Embedding(9, 5, scale_grad_by_freq=True)
    layer(INDEX).sum().backward()
    plain(INDEX).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("sampling", ["local", "weights", "flipout"])
def test_rows_are_shrunk_before_they_are_drawn(sampling):
    layer, index = noisy("layer", max_norm=0.5), torch.arange(7)
    with torch.no_grad():
        layer.weight.mul_(100)
        layer.scale.fill_(-8.0)
    layer.sampling = sampling
    drawn = layer.train()(index)
    assert (layer.weight[index].norm(dim=1) <= 0.5001).all()
    assert (drawn.norm(dim=1) < 0.6).all() and not torch.equal(drawn, layer.weight[index])


def test_a_draw_of_all_rows_refuses_max_norm():
    model = nn.Sequential(noisy("layer", max_norm=0.5))
    for call in (lsf.sample_weights, lambda m: lsf.from_lrt(m, seed=1)):
        with pytest.raises(ValueError, match="sample_weights: 0 must have max_norm None, got 0.5"):
            call(model)


def test_max_norm():
    layer = noisy("layer", max_norm=0.5)
    layer(INDEX)
    assert (layer.weight[[1, 2, 3, 8]].norm(dim=1) <= 0.5 + 1e-6).all()
    with pytest.raises(ValueError, match="LRTEmbedding: max_norm must be None for 'variance'"):
        make("variance", max_norm=1.0)


@parameterizations
@pytest.mark.parametrize("half", [BF16, F16])
def test_half_precision(parameterization, half):
    layer = make(parameterization).to(half)
    assert layer.scale.dtype == torch.float32
    assert layer(INDEX).dtype == layer.eval()(INDEX).dtype == half
    with lsf.sample_weights(layer):
        assert layer(INDEX).dtype == half
    assert make(parameterization, dtype=half)(INDEX).dtype == half


@parameterizations
def test_compile_fullgraph(parameterization):
    torch._dynamo.reset()
    layer, seed = make(parameterization, padding_idx=2), torch.tensor(5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(INDEX, seed), layer(INDEX, seed))
    torch.testing.assert_close(torch.export.export(layer.eval(), (INDEX,)).module()(INDEX), layer(INDEX))


@parameterizations
def test_copies_and_state(parameterization):
    layer = make(parameterization)
    expected = layer(INDEX, seed=1)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(INDEX, seed=1), expected)
    made = make(parameterization, padding_idx=2, device="meta").to_empty(device="cpu")
    made.reset_parameters()
    assert all(torch.isfinite(p).all() for p in made.parameters())
    made.load_state_dict(layer.state_dict())


def test_from_pretrained():
    table = torch.randn(4, 3)
    layer = lsf.nn.LRTEmbedding.from_pretrained(table, padding_idx=1)
    assert not layer.weight.requires_grad and not layer.log_sigma2.requires_grad
    assert torch.equal(layer.eval()(torch.arange(4)), table)
    assert lsf.nn.LRTEmbedding.from_pretrained(table, freeze=False).log_sigma2.requires_grad


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
def test_bad_input(parameterization):
    layer = make(parameterization)
    for mode in (True, False):
        layer.train(mode)
        with pytest.raises(IndexError):
            layer(torch.tensor([9]))
        with pytest.raises(RuntimeError, match="indices"):
            layer(torch.tensor([1.0]))
        with pytest.raises(TypeError):
            layer(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "fancy"}, "LRTEmbedding: parameterization must be one of"),
        ({"sampling": "fancy"}, "LRTEmbedding: sampling must be one of"),
        ({"init_log_sigma2": float("nan")}, "LRTEmbedding: init_log_sigma2 must be a finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lsf.nn.LRTEmbedding(9, 5, **arguments)
