"""The kl family on the CPU: divergences against their references, golden values, and every finite number."""

import itertools
import math
import pathlib
import subprocess

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, assert_as_good_as_eager, double, instruction_set

from losssurf_fast import ops
from losssurf_fast.ops import kl

OP = torch.ops.losssurf_fast
ROOT = pathlib.Path(__file__).parent.parent
DTYPES = [F64, F32, BF16, F16]
SHAPES = [(1,), (17, 33), (2048,), (2049,), (3, 5000), (0,), (4, 0)]
OPTIONS = {"exact": (True,), "approximate": (False,), "ard": (), "normal": (0.7,)}
PRIORS = ["exact", "approximate", "ard"]  # on log_alpha
NAMES = list(OPTIONS)


def sample(shape, dtype=F32, weight=False, seed=0):
    """([log_alpha], []) or ([log_sigma2], [weight]); slices of wider tensors, so their rows are not adjacent."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(*shape[:-1], shape[-1] + 3, generator=generator)[..., 1 : shape[-1] + 1]
    if not weight:
        return [(4 * draw() - 1).to(dtype)], []
    return [(2 * draw() - 3).to(dtype)], [(0.3 * draw()).to(dtype)]


def public(name):
    """The public function as f(param, weight=None) of one tensor each."""
    return {
        "exact": lambda p, w=None: ops.kl_log_uniform(p, weight=w),
        "approximate": lambda p, w=None: ops.kl_log_uniform(p, exact=False, weight=w),
        "ard": lambda p, w=None: ops.kl_ard(p, weight=w),
        "normal": lambda p, w=None: ops.kl_normal(w, p, prior_std=0.7),
    }[name]


def functions(name):
    """(operator, its reference, operator with slopes, its reference) as f(params, weights)."""
    stem = {"ard": "kl_ard", "normal": "kl_normal"}.get(name, "kl_log_uniform")
    found = (
        getattr(OP, stem),
        getattr(kl, f"{stem}_reference"),
        getattr(OP, f"{stem}_slopes"),
        getattr(kl, f"{stem}_slopes_reference"),
    )
    return [lambda p, w, f=f: f(p, w, [1] * len(p), *OPTIONS[name]) for f in found]


# ---- values ---------------------------------------------------------------------------------------------------------

# log_alpha, exact KL, three constants, ARD, exact slope, slope of the three constants
GOLDEN = [
    (-5, 3.1317776, 3.1366839, 2.50336, -0.503439, -0.500259),
    (-3, 2.1079783, 2.1155902, 1.52429, -0.530212, -0.537778),
    (-1, 0.91453131, 0.91387229, 0.656631, -0.599704, -0.593265),
    (0, 0.4266856, 0.43123895, 0.346574, -0.362389, -0.359128),
    (1, 0.17319386, 0.17796972, 0.156631, -0.162960, -0.165136),
    (3, 0.024688335, 0.025420043, 0.0242937, -0.0244845, -0.0253848),
    (8, 1.6772194e-4, 1.6836935e-4, 1.67703e-4, -1.67713e-4, -1.68666e-4),
]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"log_alpha={row[0]}")
def test_kl_golden_values(row, dtype):
    log_alpha = torch.tensor([float(row[0])], dtype=dtype, requires_grad=True)
    exact, approximate, ard = (public(name)(log_alpha) for name in PRIORS)
    slopes = [torch.autograd.grad(value, log_alpha)[0].item() for value in (exact, approximate)]
    assert exact.item() == pytest.approx(row[1], rel=3e-7)
    assert approximate.item() == pytest.approx(row[2], rel=3e-7)
    assert ard.item() == pytest.approx(row[3], rel=3e-6)
    assert slopes == pytest.approx(row[4:], rel=3e-6)


def test_kl_normal_golden_value():
    """Against torch.distributions, which has this one."""
    weight, log_sigma2 = torch.randn(7, dtype=F64), torch.randn(7, dtype=F64)
    posterior = torch.distributions.Normal(weight, (0.5 * log_sigma2).exp())
    prior = torch.distributions.Normal(torch.zeros(7, dtype=F64), 0.7)
    expected = torch.distributions.kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(ops.kl_normal(weight, log_sigma2, 0.7), expected)
    zero_mean = ops.kl_normal(torch.zeros_like(weight), log_sigma2, 0.7)
    torch.testing.assert_close(ops.kl_normal(None, log_sigma2, 0.7), zero_mean)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_kl_normal_of_tiny_and_large_variances(isa):
    """Every log_sigma2 in [-300, 88], through the range where exp leaves the normal numbers of fp32."""
    with instruction_set(isa):
        for log_sigma2 in torch.cat((torch.arange(-300.0, 88.0, 0.37), torch.arange(-88.5, -86.0, 0.01))):
            s = log_sigma2.reshape(1).clone().requires_grad_()
            kl = ops.kl_normal(None, s)
            expected = 0.5 * (torch.expm1(s.detach().double()) - s.detach().double()).sum().float()
            torch.testing.assert_close(kl.detach(), expected)
            (slope,) = torch.autograd.grad(kl, s)
            torch.testing.assert_close(slope, 0.5 * torch.expm1(s.detach().double()).float())


def test_kl_log_uniform_is_the_integral_of_dawsons_function():
    """KL = 2 int_0^sqrt(mu) D, by the trapezoidal rule on D' = 1 - 2 z D solved from its Taylor series."""
    mu = torch.tensor([0.05, 0.5, 2.0, 6.0], dtype=F64)
    total = torch.zeros_like(mu)  # 2 int_0^z D = sum_k (-2)^k z^(2k + 2) / ((2k + 1)!! (k + 1))
    term = torch.ones_like(mu)
    for k in range(80):
        total += term * mu / (k + 1)
        term = term * -2 * mu / (2 * k + 3)
    values = torch.stack([ops.kl_log_uniform(-(2 * m).log().reshape(1)) for m in mu])
    torch.testing.assert_close(values, total, rtol=1e-11, atol=0)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", PRIORS)
def test_kl_relative_error(name, isa):
    """Value and slope of every single weight within 1e-6 of float64, over log_alpha in [-20, 20]."""
    log_alpha = torch.cat([torch.linspace(-20, 20, 801), torch.linspace(-3, -2, 400)])
    op, reference, slopes_op, slopes_reference = functions(name)
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        values = torch.stack([op([t.reshape(1)], []) for t in log_alpha])
        slopes = slopes_op([log_alpha], [])[1][0]
    exact = torch.stack([reference([t.reshape(1)], []) for t in log_alpha.double()])
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes.double(), slopes_reference([log_alpha.double()], [])[1][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_kl_as_good_as_eager(name, weight, isa):
    """Sum and slopes, every dtype, odd shape and instruction set."""
    _, _, op, reference = functions(name)
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        for shape, dtype in itertools.product(SHAPES, DTYPES):
            params, weights = sample(shape, dtype, weight)
            value, slopes = op(params, weights)
            eager_value, eager_slopes = reference(params, weights)
            exact_value, exact_slopes = reference(double(params), double(weights))
            assert_as_good_as_eager(value, eager_value, exact_value)
            assert [s.shape for s in slopes] == [t.shape for t in (*params, *weights)]
            for ours, eager, exact in zip(slopes, eager_slopes, exact_slopes, strict=True):
                assert_as_good_as_eager(ours, eager, exact)


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kl_slopes_reference_is_the_gradient(name, weight):
    """The written-out slopes equal autograd of the reference's value in float64, and the kernel's."""
    _, reference, slopes_op, slopes_reference = functions(name)
    params, weights = sample((6, 50), F64, weight)
    inputs = [t.detach().clone().requires_grad_() for t in (*params, *weights)]
    expected = torch.autograd.grad(reference(inputs[:1], inputs[1:]), inputs)
    for slopes in (slopes_reference(params, weights)[1], slopes_op(params, weights)[1]):
        for slope, grad in zip(slopes, expected, strict=True):
            torch.testing.assert_close(slope, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_kl_same_bits_everywhere(name):
    """Sum and slopes do not depend on threads, instruction set or whether slopes are wanted."""
    op, _, slopes_op, _ = functions(name)
    params, weights = [], []
    for i, shape in enumerate([(100, 700), (5,), (3000,), (0,)]):
        p, w = sample(shape, weight=True, seed=i)
        params, weights = params + p, weights + w
    threads = torch.get_num_threads()
    results = []
    try:
        for count, isa in itertools.product((1, 2), INSTRUCTION_SETS):
            torch.set_num_threads(count)
            with instruction_set(isa):
                value, slopes = slopes_op(params, weights)
                assert torch.equal(value, op(params, weights))
                results.append((value, *slopes, op(params, [])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_kl_scalar_same_bits(tmp_path):
    """csrc/kl_math.h without vectors gives the slopes of the C++ kernels."""
    program = tmp_path / "kl_scalar"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/kl_scalar.cpp"), "-o", str(program)], check=True)
    (log_sigma2,), (weight,) = sample((4000,), weight=True)
    inputs = torch.stack([log_sigma2, weight], dim=1).numpy().tobytes()
    out = subprocess.run([program], input=inputs, stdout=subprocess.PIPE, check=True).stdout
    out = torch.frombuffer(bytearray(out), dtype=F32).view(4000, 5)
    for column, name in enumerate(PRIORS):
        assert torch.equal(out[:, column], functions(name)[2]([log_sigma2], [weight])[1][0])
    assert torch.equal(out[:, 3], OP.kl_normal_slopes([log_sigma2], [weight], [1], 1.0)[1][0])
    assert torch.equal(out[:, 4], functions("ard")[2]([log_sigma2], [weight])[1][1])


# ---- numbers at the edge --------------------------------------------------------------------------------------------

EXTREMES = [-3e38, -1e4, -88.0, -0.0, 88.0, 1e4, 3e38]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRIORS)
def test_kl_finite_for_every_log_alpha(name, dtype):
    """One weight at a time: -log_alpha / 2 on one side, 0 on the other, slopes -1/2 and 0."""
    for x in EXTREMES:
        x = max(-torch.finfo(dtype).max, min(torch.finfo(dtype).max, x))
        log_alpha = torch.full((3,), x, dtype=dtype)[:1].requires_grad_()
        value = public(name)(log_alpha)
        (slope,) = torch.autograd.grad(value, log_alpha)
        assert torch.isfinite(value) and torch.isfinite(slope).all()
        if x > 80:
            assert 0 <= value.item() < 1e-34 and slope.abs().item() < 1e-34
        if x < -80:
            shift = 0.0 if name == "ard" else 0.635
            assert value.item() == pytest.approx(-0.5 * log_alpha.item() + shift, rel=1e-3)
            assert slope.item() == pytest.approx(-0.5, rel=1e-6)


@pytest.mark.parametrize("name", PRIORS)
def test_kl_keeps_infinity_and_nan(name):
    for dtype in (F32, F64):
        value = lambda x, dtype=dtype: public(name)(torch.tensor([x], dtype=dtype)).item()
        assert value(math.inf) == 0 and value(-math.inf) == math.inf and math.isnan(value(math.nan))
        weight = torch.tensor([math.nan], dtype=dtype)
        assert public(name)(torch.zeros(1, dtype=dtype), weight).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRIORS)
def test_kl_weight_of_zero(name, dtype):
    """An additive weight of 0, also among tiny ones, has KL 0; every gradient is finite."""
    for log_sigma2 in (-200.0, -88.0, 0.0, 50.0):
        param = torch.full((1,), log_sigma2, dtype=dtype, requires_grad=True)
        weight = torch.zeros(1, dtype=dtype, requires_grad=True)
        value = public(name)(param, weight)
        assert value.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, (param, weight)))
        tiny = torch.tensor([1e-7, -1e-38, torch.finfo(dtype).tiny], dtype=dtype, requires_grad=True)
        param = param.detach().expand(3).clone().requires_grad_()
        value = public(name)(param, tiny)
        assert torch.isfinite(value) and all(g.isfinite().all() for g in torch.autograd.grad(value, (param, tiny)))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", PRIORS)
def test_kl_subnormal_weights(name, isa):
    """Below the normal numbers too, log_alpha is that of the weight and every slope is finite."""
    op, reference, slopes_op, slopes_reference = functions(name)
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        for weight in (1e-45, -1e-40, 1.1754942e-38, 1.1754944e-38, 3e-38):
            weights = [torch.tensor([weight])]
            params = [2 * weights[0].double().abs().log().float() - 1]
            exact, exact_slopes = slopes_reference(double(params), double(weights))
            for value, slopes in (slopes_op(params, weights), slopes_reference(params, weights)):
                torch.testing.assert_close(value.double(), exact, rtol=3e-5, atol=0)  # log_sigma2 has an ulp of 1.5e-5
                torch.testing.assert_close(slopes[0].double(), exact_slopes[0], rtol=3e-5, atol=0)
                assert slopes[1].isfinite().all() and slopes[1].sign() == -slopes[0].sign() * weights[0].sign()
            assert op(params, weights) == slopes_op(params, weights)[0]
    weights = [torch.tensor([5e-324], dtype=F64)]
    for slopes in (slopes_op([2 * weights[0].log()], weights)[1], slopes_reference([2 * weights[0].log()], weights)[1]):
        assert slopes[1] == torch.finfo(F64).max


def test_kl_normal_under_a_narrow_prior():
    """Infinite, not NaN, where the sum leaves fp32; right where the mean is as small as the prior is narrow."""
    zeros = torch.zeros(70)
    for weight in (zeros, None):
        for prior_std in (1e-30, torch.finfo(F32).tiny):
            assert ops.kl_normal(weight, zeros, prior_std) == math.inf
            assert kl.kl_normal_reference([zeros], [] if weight is None else [weight], [1], prior_std) == math.inf
            slopes = OP.kl_normal_slopes([zeros], [] if weight is None else [weight], [1], prior_std)[1]
            assert (slopes[0] > 1e38).all() and all(s.isfinite().all() for s in slopes)
    assert ops.kl_normal(zeros.double(), zeros.double(), 1e-30).item() == pytest.approx(35e60)
    for prior_std in (1e-30, 1e30):
        weight, log_sigma2 = torch.full((70,), 3 * prior_std), torch.full((70,), 2 * math.log(prior_std))
        assert ops.kl_normal(weight, log_sigma2, prior_std).item() == pytest.approx(70 * 4.5, rel=1e-6)


def test_kl_of_weight_is_kl_of_its_log_alpha():
    params, weights = sample((9, 40), F64, weight=True)
    log_alpha = params[0] - weights[0].square().log()
    for name in PRIORS:
        torch.testing.assert_close(public(name)(params[0], weights[0]), public(name)(log_alpha))


# ---- lists and counts -----------------------------------------------------------------------------------------------


def test_kl_numel_counts_every_weight():
    """A broadcast log_alpha counts once per weight it covers, in the value and in the gradient."""
    for function in (ops.kl_log_uniform, ops.kl_ard):
        layer, neuron = torch.tensor([-1.3], requires_grad=True), torch.randn(4).requires_grad_()
        value = function([layer, neuron], [20, 12])
        expected = function(layer.expand(20)) + function(neuron.repeat_interleave(3))
        torch.testing.assert_close(value, expected)
        for ours, theirs in zip(
            torch.autograd.grad(value, (layer, neuron)), torch.autograd.grad(expected, (layer, neuron)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(function(layer, 20), function(layer.expand(20)))
        assert function(torch.zeros(0), 0) == 0


@pytest.mark.parametrize("name", NAMES)
def test_kl_list_is_the_sum(name):
    """Lists of every dtype, a hundred tensors, some empty."""
    params, weights = [], []
    for i in range(100):
        p, w = sample((i % 7, 60), [F32, BF16, F16][i % 3], True, seed=i)
        params, weights = [*params, *p], [*weights, w[0].to(F32)]
    one_by_one = sum(public(name)(p, w).double() for p, w in zip(params, weights, strict=True))
    together = public(name)(params, weights)
    assert together.dtype == F32 and together.shape == ()
    torch.testing.assert_close(together.double(), one_by_one)


def test_kl_dtypes():
    assert ops.kl_ard(torch.zeros(3, dtype=F16)).dtype == F32
    assert ops.kl_ard([torch.zeros(3), torch.zeros(3, dtype=F64)]).dtype == F64
    for dtype in DTYPES:
        params, weights = sample((5, 4), dtype, True)
        inputs = [t.clone().requires_grad_() for t in (*params, *weights)]
        for name in NAMES:
            assert [g.dtype for g in torch.autograd.grad(public(name)(*inputs), inputs)] == [dtype, dtype]


def test_kl_fp16_gradient_does_not_overflow():
    """A count of a million weights times a loss weight of 1e-6: neither factor alone may leave fp16."""
    log_alpha = torch.tensor([-4.0], dtype=F16, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.kl_log_uniform(log_alpha, 1_000_000) * 1e-6, log_alpha)
    assert grad.item() == pytest.approx(-0.51075, rel=2e-3)


def test_kl_expanded_and_transposed():
    base = torch.randn(6, 1, dtype=F64)
    for view in (base.expand(6, 5), torch.randn(4, 7, dtype=F64).t(), torch.randn(2, 3, 4, 5, dtype=F64)[:, ::2]):
        torch.testing.assert_close(ops.kl_log_uniform(view), ops.kl_log_uniform(view.contiguous()))
        leaf = view.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ops.kl_log_uniform(leaf), leaf)
        torch.testing.assert_close(grad, functions("exact")[3]([view.contiguous()], [])[1][0])


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kl_gradcheck(name, weight):
    params, weights = sample((3, 4), F64, weight)
    params[0][0, 0] = -6.0  # the asymptotic side
    inputs = [t.clone().requires_grad_() for t in (*params, *weights)]
    assert torch.autograd.gradcheck(public(name), inputs)
    assert torch.autograd.gradgradcheck(public(name), inputs)


@pytest.mark.parametrize("name", ["exact", "ard"])
def test_kl_second_derivative_at_weight_zero(name):
    """KL = exp(-log_sigma2) w^2 / 2 near w = 0."""
    log_sigma2 = torch.tensor([0.7], dtype=F64)
    weight = torch.zeros(1, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(public(name)(log_sigma2, weight), weight, create_graph=True)
    (second,) = torch.autograd.grad(grad, weight)
    torch.testing.assert_close(second, torch.exp(-log_sigma2))


def test_kl_every_subset_of_gradients():
    params, weights = sample((8, 9), weight=True)
    whole = [t.clone().requires_grad_() for t in (*params, *weights)]
    for name in NAMES:
        everything = torch.autograd.grad(public(name)(*whole), whole)
        for i in range(2):
            inputs = [t.detach() for t in whole]
            inputs[i] = inputs[i].clone().requires_grad_()
            (grad,) = torch.autograd.grad(public(name)(*inputs), inputs[i])
            assert torch.equal(grad, everything[i])
