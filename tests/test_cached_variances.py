"""lsf.cached_variances: the same outputs and gradients, with sigma^2 made once for as long as the weights stay."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import losssurf_fast as lsf
from losssurf_fast.nn import variance_cache
from losssurf_fast.ops.lrt import PARAMETERIZATIONS

SEED = 5


@pytest.fixture
def made(monkeypatch):
    """The weights whose variances were made, one entry each time."""
    found = []
    make = variance_cache.lrt_variance_operand

    def counted(weight, scale, **options):
        found.append(scale)
        return make(weight, scale, **options)

    monkeypatch.setattr(variance_cache, "lrt_variance_operand", counted)
    return found


def layer(parameterization="additive", dtype=torch.float32):
    torch.manual_seed(0)
    return lsf.nn.LRTLinear(6, 4, parameterization=parameterization, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_outputs_and_gradients_are_those_without_it(parameterization, dtype, made):
    linear, x = layer(parameterization, dtype), torch.randn(3, 6, dtype=dtype, requires_grad=True)
    wanted = [x, *linear.parameters()]
    y = linear(x, SEED)
    gradients = torch.autograd.grad(y.square().sum(), wanted)
    with lsf.cached_variances(linear):
        for _ in range(3):
            cached = linear(x, SEED)
            assert torch.equal(cached, y)
            for got, expected in zip(torch.autograd.grad(cached.square().sum(), wanted), gradients, strict=True):
                assert torch.equal(got, expected)
    assert len(made) == 1
    assert linear.variances is None and torch.equal(linear(x, SEED), y)


def test_a_write_to_a_parameter_makes_them_anew(made):
    linear, x = layer(), torch.randn(3, 6)
    optimizer = torch.optim.SGD(linear.parameters(), 0.1)
    with lsf.cached_variances(linear):
        linear(x, SEED).square().sum().backward()
        optimizer.step()
        stepped = linear(x, SEED)
        linear.load_state_dict({k: v + 1 for k, v in linear.state_dict().items()})
        loaded = linear(x, SEED)
        linear.log_sigma2 = nn.Parameter(linear.log_sigma2 - 2)
        replaced = linear(x, SEED)
    assert len(made) == 4
    assert torch.equal(replaced, linear(x, SEED))
    assert not torch.equal(stepped, loaded) and not torch.equal(loaded, replaced)


def test_one_for_each_dtype_of_activations(made):
    linear = layer()
    with lsf.cached_variances(linear), torch.no_grad():
        for _ in range(2):
            plain = linear(torch.ones(2, 6), SEED)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                half = linear(torch.ones(2, 6), SEED)
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert len(made) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half, linear(torch.ones(2, 6), SEED))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_attention_keeps_its_projections(parameterization, made):
    torch.manual_seed(0)
    model = lsf.to_lrt(nn.MultiheadAttention(8, 2, batch_first=True), parameterization)
    x = torch.randn(2, 5, 8)
    expected = lsf.predict(Logits(model), x, num_samples=3, seed=0)
    with lsf.cached_variances(model):
        assert torch.equal(lsf.predict(Logits(model), x, num_samples=3, seed=0), expected)
        before = len(made)
        lsf.predict(Logits(model), x, num_samples=3, seed=0)
    assert before == len(made) > 0


class Logits(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_contexts_nest_and_end_by_exceptions(made):
    linear, x = layer(), torch.randn(3, 6)
    with pytest.raises(KeyError), lsf.cached_variances(linear):
        linear(x, SEED)
        outer = linear.variances
        with lsf.cached_variances(linear):
            linear(x, SEED)
        assert linear.variances is outer
        raise KeyError
    assert linear.variances is None and len(made) == 1


def test_copies_and_pickles_keep_nothing():
    linear = layer()
    with lsf.cached_variances(linear):
        linear(torch.ones(2, 6), SEED)
        assert copy.deepcopy(linear).variances is None
        assert pickle.loads(pickle.dumps(linear)).variances is None


def test_parametrized_weights_are_made_every_time(made):
    class Double(nn.Module):
        def forward(self, t):
            return 2 * t

    linear, x = layer(), torch.randn(3, 6)
    parametrize.register_parametrization(linear, "log_sigma2", Double())
    with lsf.cached_variances(linear):
        before = linear(x, SEED)
        with torch.no_grad():
            linear.parametrizations.log_sigma2.original.sub_(1)
        after = linear(x, SEED)
    assert len(made) == 2
    assert torch.equal(after, linear(x, SEED)) and not torch.equal(after, before)


def test_functional_call_sees_its_own_parameters():
    linear, x = layer(), torch.randn(3, 6)
    others = {name: p.detach() * 0.5 for name, p in linear.named_parameters()}
    expected = torch.func.functional_call(linear, others, (x, SEED))
    with lsf.cached_variances(linear):
        linear(x, SEED)
        assert torch.equal(torch.func.functional_call(linear, others, (x, SEED)), expected)


def test_inside_transforms_and_compile_nothing_is_kept(made):
    linear, x = layer(), torch.randn(3, 6)
    seed = torch.tensor(SEED)
    loss = lambda p: torch.func.functional_call(linear, p, (x, seed)).sum()
    parameters = dict(linear.named_parameters())
    expected = torch.func.grad(loss)(parameters)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    with lsf.cached_variances(linear):
        found = torch.func.grad(loss)(parameters)
        assert torch.equal(compiled(x, seed), linear(x, seed))
    for name in parameters:
        assert torch.equal(found[name], expected[name])
    assert len(made) == 1  # by the plain forward


def test_inference_tensors_are_made_every_time(made):
    with torch.inference_mode():
        linear, x = layer(), torch.randn(3, 6)
        with lsf.cached_variances(linear):
            linear(x, SEED)
    assert made == []


def test_refusals():
    with pytest.raises(TypeError, match=r"^cached_variances: .*must be a torch.nn.Module"), lsf.cached_variances(3):
        pass
    with pytest.raises(ValueError, match=r"^cached_variances: Linear has no"), lsf.cached_variances(nn.Linear(2, 2)):
        pass
    linear = layer()
    linear.log_sigma2.device_mesh = "as a DTensor has one"
    refused = pytest.raises(ValueError, match=r"^cached_variances: LRTLinear must not be sharded")
    with refused, lsf.cached_variances(linear):
        pass
