"""lsf.cached_variances: the same outputs and gradients, with sigma^2 made once for as long as the weights stay."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import losssurf_fast as lsf
from losssurf_fast import ops
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
    y = linear(x, SEED)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    linear.requires_grad_(False)
    with lsf.cached_variances(linear):
        for _ in range(3):
            cached = linear(x, SEED)
            assert torch.equal(cached, y)
            assert torch.equal(torch.autograd.grad(cached.square().sum(), x)[0], gradient)
    assert len(made) == 1
    assert linear.variances is None and torch.equal(linear(x, SEED), y)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_ready_made_operand_takes_no_gradient_from_the_parameters(parameterization):
    linear, x = layer(parameterization), torch.randn(3, 6, requires_grad=True)
    inputs = (x, linear.weight, linear.scale, linear.bias)
    options = {"parameterization": parameterization, "seed": SEED}
    wanted = [t for t in inputs if t is not None]
    operand = ops.lrt_variance_operand(
        linear.weight, linear.scale, parameterization=parameterization, dtype=torch.float32
    )
    found, expected = (
        torch.autograd.grad(ops.lrt_linear(*inputs, **options, **more).square().sum(), wanted)
        for more in ({"variance_operand": operand}, {})
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parameters_that_change_otherwise_are_seen(made):
    linear, x = layer(), torch.randn(3, 6)

    def loaded():
        linear.load_state_dict({k: v + 1 for k, v in linear.state_dict().items()})

    def replaced():
        linear.log_sigma2 = nn.Parameter(linear.log_sigma2 - 2)

    def installed():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(linear.parameters()) * 0.5, linear.parameters())

    with torch.no_grad(), lsf.cached_variances(linear):
        for change in (loaded, replaced, installed, lambda: linear.log_sigma2.add_(1), lambda: linear.double()):
            x = x.to(linear.weight.dtype)
            before = linear(x, SEED)
            change()
            x = x.to(linear.weight.dtype)
            after, count = linear(x, SEED), len(made)
            assert torch.equal(after, linear(x, SEED)) and len(made) == count
            linear.variances.clear()
            assert torch.equal(after, linear(x, SEED)) and not torch.equal(after, before)


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


def test_attention_to_other_keys_keeps_other_parts(made):
    torch.manual_seed(0)
    model = lsf.to_lrt(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    call = lambda keys: model(x, keys, keys, need_weights=False, seed=SEED)[0]
    with torch.no_grad(), lsf.prediction(model, "stochastic"):
        expected = [call(keys) for keys in (x, memory, x)]
        with lsf.cached_variances(model):
            found = [call(keys) for keys in (x, memory, x)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and len(made) > 0


class Logits(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@torch.no_grad()
def test_contexts_nest_overlap_and_end_by_exceptions(made):
    linear, x = layer(), torch.randn(3, 6)
    with pytest.raises(KeyError), lsf.cached_variances(linear):
        linear(x, SEED)
        outer = linear.variances
        with lsf.cached_variances(linear):
            linear(x, SEED)
        assert linear.variances is outer
        raise KeyError
    assert linear.variances is None and len(made) == 1
    first, second = lsf.cached_variances(linear), lsf.cached_variances(linear)
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert linear.variances is not None
    second.__exit__(None, None, None)
    assert linear.variances is None


@torch.no_grad()
def test_copies_and_pickles_keep_nothing(made):
    linear, x = layer(), torch.ones(2, 6)
    with lsf.cached_variances(linear):
        linear(x, SEED)
        assert copy.deepcopy(linear).variances is None
        assert pickle.loads(pickle.dumps(linear)).variances is None
        shallow = copy.copy(linear)
        plain = lsf.from_lrt(copy.deepcopy(linear))
    shallow(x, SEED)
    assert len(made) == 1 and not shallow.variances and not hasattr(plain, "variances")


@torch.no_grad()
def test_of_weights_that_one_call_has_nothing_is_kept(made):
    class Double(nn.Module):
        def forward(self, t):
            return 2 * t

    linear, x = layer(), torch.randn(3, 6)
    others = {name: p.detach() * 0.5 for name, p in linear.named_parameters()}
    expected = torch.func.functional_call(linear, others, (x, SEED))
    with lsf.cached_variances(linear):
        linear(x, SEED)
        assert torch.equal(torch.func.functional_call(linear, others, (x, SEED)), expected)
        assert not linear.variances
        parametrize.register_parametrization(linear, "log_sigma2", Double())
        linear(x, SEED)
        assert not linear.variances
    assert len(made) == 1


def test_under_tracing_nothing_is_kept(made):
    linear, x = layer().requires_grad_(False), torch.randn(3, 6)
    seed = torch.tensor(SEED)
    loss = lambda p: torch.func.functional_call(linear, p, (x, seed)).sum()
    parameters = dict(linear.named_parameters())
    expected = torch.func.grad(loss)(parameters)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    with lsf.cached_variances(linear):
        found = torch.func.grad(loss)(parameters)
        assert torch.equal(compiled(x, seed), linear(x, seed))
        made.clear()
        linear.variances.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            linear(torch.empty(3, 6), seed)
        graph = make_fx(lambda x: linear(x, seed), tracing_mode="real")(x)
        assert made == [] and not linear.variances
        assert type(linear(x, seed)) is torch.Tensor
        assert torch.equal(graph(x), linear(x, seed))
    for name in parameters:
        assert torch.equal(found[name], expected[name])


@pytest.mark.filterwarnings("ignore")  # trace is deprecated, and takes sizes for constants
def test_a_traced_module_follows_its_weights():
    linear, x = layer().requires_grad_(False), torch.randn(3, 6)
    with lsf.cached_variances(linear):
        linear(x, SEED)
        traced = torch.jit.trace(lambda x: linear(x, SEED), x, check_trace=False)
        linear.log_sigma2 += 1
        assert torch.equal(traced(x), linear(x, SEED))


def test_inference_tensors_are_made_every_time(made):
    with torch.inference_mode():
        linear, x = layer(), torch.randn(3, 6)
        with lsf.cached_variances(linear):
            linear(x, SEED)
    assert made == []


BAD_INPUTS = [
    ("x", None),
    (torch.ones(2, 6, dtype=torch.int64), None),
    (torch.ones(()), None),
    (torch.ones(2, 5), None),
    (torch.ones(2, 6, dtype=torch.float64), None),
    (torch.ones(2, 6), torch.float64),
    (torch.ones(2, 6), torch.bfloat16),
]


def assert_the_same_error(linear, x):
    """Inside the context as outside."""
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"^lrt_linear: ") as without:
        linear(x, SEED)
    with torch.no_grad(), lsf.cached_variances(linear), pytest.raises(without.type) as within:
        linear(x, SEED)
    assert str(within.value) == str(without.value)


@pytest.mark.parametrize(("bad", "dtype"), BAD_INPUTS)
def test_a_bad_input_has_the_error_that_it_has_without(bad, dtype):
    assert_the_same_error(layer(dtype=dtype), bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_layers_have_the_errors_that_they_have_without(dtype):
    assert_the_same_error(lsf.nn.LRTLinear(16, 32, variance_dtype="float8_e4m3fn"), torch.ones(2, 16, dtype=dtype))


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


def test_operands_that_cannot_be_right_are_refused():
    x, weight, scale = torch.randn(3, 6), torch.randn(4, 6), torch.full((4, 6), -3.0)
    options = {"parameterization": "additive", "seed": SEED}
    sigma2, _ = ops.lrt_variance_operand(weight, scale, parameterization="additive", dtype=torch.float32)
    for wrong, error in (
        (sigma2.to_sparse(), ValueError), (sigma2.clone().requires_grad_(), ValueError), ([[1.0]], TypeError),
        (sigma2[:3], ValueError), (sigma2.double(), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"^lrt_linear: variance_operand must"):
            ops.lrt_linear(x, weight, scale, **options, variance_operand=ops.VarianceOperand(wrong))
    with pytest.raises(TypeError, match=r"^lrt_variance_operand: weight must be a tensor of one of"):
        ops.lrt_variance_operand(weight.int(), scale, parameterization="additive", dtype=torch.float32)
    half = ops.lrt_variance_operand(weight, scale.bfloat16(), parameterization="weight", dtype=torch.bfloat16)
    assert half.sigma2.dtype == torch.bfloat16  # fp32 weights beside a bf16 scale, as in lrt_linear
    raw = torch.ops.losssurf_fast
    with pytest.raises(ValueError, match=r"^lrt_variance_operand: weight is missing"):
        raw.lrt_variance_operand(None, scale, "additive", torch.float32)
    with pytest.raises(ValueError, match=r"^lrt_linear: weight is missing"):
        raw.lrt_linear(x, None, scale, None, torch.tensor(SEED), "additive")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 2048])  # few for the dual kernel, many for the library's GEMMs
@torch.no_grad()
def test_on_a_gpu(rows):
    """bf16 sigma^2, made once; also on another stream, and inside a CUDA graph, which keeps and uses none."""
    torch.manual_seed(0)
    linear = lsf.nn.LRTLinear(256, 512, dtype=torch.bfloat16, device="cuda")
    x, seed = torch.randn(rows, 256, dtype=torch.bfloat16, device="cuda"), torch.tensor(SEED, device="cuda")
    y = linear(x, seed)
    with lsf.cached_variances(linear):
        assert torch.equal(linear(x, seed), y)
        kept = linear.variances["weight"].operand.sigma2
        assert torch.equal(linear(x, seed), y) and linear.variances["weight"].operand.sigma2 is kept
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            elsewhere = linear(x, seed)
            assert linear.variances["weight"].operand.sigma2 is not kept
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(elsewhere, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear(x, seed)
        assert not linear.variances
        linear.log_sigma2 += 1
        graph.replay()
        assert torch.equal(captured, linear(x, seed)) and not torch.equal(captured, y)
