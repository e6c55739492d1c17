"""The lrt family on the CPU: lrt_sample and lrt_linear against their references."""

import itertools

import pytest
import torch
from common import (
    BF16,
    F16,
    F32,
    F64,
    INSTRUCTION_SETS,
    assert_as_good_as_eager,
    double,
    instruction_set,
    lrt_inputs,
    with_grad,
)

import losssurf_fast as lsf
from losssurf_fast import ops
from losssurf_fast.ops import lrt

DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]  # activations, parameters
SHAPES = [(1, 1, 1), (17, 33, 63), (64, 512, 40), (33, 10, 500), (0, 4, 3), (5, 0, 3), (5, 3, 0)]  # M, O, I
OP = torch.ops.losssurf_fast


# ---- forward and backward against the reference --------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_lrt_linear_forward_and_backward(parameterization, isa):
    """As good as eager in every dtype, odd shape and instruction set, forward and every gradient."""
    place = (torch.tensor(5), parameterization)
    offsets = (3, 2, 1)
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        for shape, (dtype, param_dtype) in itertools.product(SHAPES, DTYPES):
            inputs = lrt_inputs(parameterization, shape, dtype, param_dtype)
            exact_y, exact_var = lrt.lrt_linear_reference(*double(inputs), *place, *offsets)
            eager_y, eager_var = lrt.lrt_linear_reference(*inputs, *place, *offsets)
            y, var = OP.lrt_linear(*inputs, *place, *offsets)
            assert_as_good_as_eager(y, eager_y, exact_y)
            assert_as_good_as_eager(var, eager_var, exact_var)

            grad = torch.randn(y.shape).to(dtype)
            rest = (*place, [t is not None for t in inputs], *offsets)
            grads = OP.lrt_linear_backward(grad, *inputs[:3], True, var, *rest)
            eager = lrt.lrt_linear_backward_reference(grad, *inputs[:3], True, eager_var, *rest)
            exact = lrt.lrt_linear_backward_reference(grad.double(), *double(inputs[:3]), True, exact_var, *rest)
            for i, (actual, like) in enumerate(zip(grads, inputs, strict=True)):
                assert like is None or i == 3 or actual.dtype == like.dtype
                if actual.numel() > 1:  # the one number of "layer" is tested over many draws below
                    assert_as_good_as_eager(actual, eager[i], exact[i])


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
def test_lrt_linear_backward_in_blocks(parameterization):
    """Few rows and many weights: the C++ backward walks over blocks of outputs (374 and 226 of these)."""
    inputs = lrt_inputs(parameterization, (5, 600, 700))
    place = (torch.tensor(5), parameterization)
    grad, var = torch.randn(5, 600), OP.lrt_linear(*inputs, *place)[1]
    exact_var = lrt.lrt_linear_reference(*double(inputs), *place)[1]
    for need_x, need_scale in ((True, True), (True, False), (False, True)):
        needed = [need_x, False, need_scale, False]
        ours = OP.lrt_linear_backward(grad, *inputs[:3], True, var, *place, needed)
        eager = lrt.lrt_linear_backward_reference(grad, *inputs[:3], True, var, *place, needed)
        exact = lrt.lrt_linear_backward_reference(grad.double(), *double(inputs[:3]), True, exact_var, *place, needed)
        for i in (0, 2):
            assert_as_good_as_eager(ours[i], eager[i], exact[i])


def test_lrt_linear_layer_gradient_error():
    """The single number d log_alpha of "layer" is a long sum: its error over 40 draws is at most twice eager's."""
    errors = []
    for seed in range(40):
        inputs = lrt_inputs("layer", (64, 96, 32), seed=seed)
        place = (torch.tensor(seed), "layer")
        grad = torch.randn(64, 96)
        exact_var = lrt.lrt_linear_reference(*double(inputs), *place)[1]
        var = OP.lrt_linear(*inputs, *place)[1]
        needed = [False, False, True, False]
        ours = OP.lrt_linear_backward(grad, *inputs[:3], True, var, *place, needed)[2]
        eager = lrt.lrt_linear_backward_reference(grad, *inputs[:3], True, var, *place, needed)[2]
        exact = lrt.lrt_linear_backward_reference(grad.double(), *double(inputs[:3]), True, exact_var, *place, needed)[
            2
        ]
        errors.append((ours - exact, eager - exact))
    ours, eager = (torch.cat(e).square().mean().sqrt() for e in zip(*errors, strict=True))
    assert ours <= 2 * eager


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_backward_reference_is_the_gradient(parameterization):
    """The written-out backward reference equals autograd of the forward reference in float64."""
    inputs = with_grad(lrt_inputs(parameterization, dtype=F64))
    place = (torch.tensor(5), parameterization, 3, 2, 1)
    y, var = lrt.lrt_linear_reference(*inputs, *place)
    grad = torch.randn_like(y)
    needed = [t is not None for t in inputs]
    expected = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], grad))
    actual = lrt.lrt_linear_backward_reference(grad, *inputs[:3], True, var, *place[:2], needed, *place[2:])
    for got, need in zip(actual, needed, strict=True):
        if need:
            torch.testing.assert_close(got, next(expected))


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_gradcheck(parameterization):
    inputs = with_grad(lrt_inputs(parameterization, (5, 4, 3), F64))
    present = [t for t in inputs if t is not None]

    def layer(*tensors):
        tensors = iter(tensors)
        x, weight, scale, bias = (t if t is None else next(tensors) for t in inputs)
        return ops.lrt_linear(x, weight, scale, bias, parameterization=parameterization, seed=3, col_offset=1)

    assert torch.autograd.gradcheck(layer, present)
    assert torch.autograd.gradgradcheck(layer, present)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_every_subset_of_gradients(parameterization):
    """A gradient does not depend on which others are asked for."""
    inputs = lrt_inputs(parameterization)
    present = [i for i, t in enumerate(inputs) if t is not None]

    def grads(wanted):
        tensors = [t if i not in wanted else t.detach().clone().requires_grad_() for i, t in enumerate(inputs)]
        y = ops.lrt_linear(*tensors, parameterization=parameterization, seed=7)
        return dict(zip(wanted, torch.autograd.grad(y.sum(), [tensors[i] for i in wanted]), strict=True))

    everything = grads(present)
    for size in range(1, len(present)):
        for wanted in itertools.combinations(present, size):
            for i, grad in grads(wanted).items():
                torch.testing.assert_close(grad, everything[i], rtol=0, atol=0)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_opcheck(parameterization):
    for grad, (dtype, param_dtype) in itertools.product((False, True), [(F32, F32), (BF16, F32)]):
        inputs = lrt_inputs(parameterization, (5, 4, 3), dtype, param_dtype)
        inputs = with_grad(inputs) if grad else inputs
        # The fp32 gradients of bf16 GEMMs differ in their last bits between calls of different strides.
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == BF16 else {}
        torch.library.opcheck(OP.lrt_linear, (*inputs, torch.tensor(3), parameterization, 1, 2, 3), **tolerance)


def test_lrt_linear_backward_opcheck():
    """Also where only some gradients are needed: what is not needed comes as empty tensors that share no memory."""
    x, weight, scale, bias = lrt_inputs("neuron", (5, 4, 3))
    _, var = OP.lrt_linear(x, weight, scale, bias, torch.tensor(3), "neuron")
    for needed in itertools.product((False, True), repeat=4):
        arguments = (torch.randn(5, 4), x, weight, scale, True, var, torch.tensor(3), "neuron", list(needed))
        torch.library.opcheck(OP.lrt_linear_backward, arguments)


def test_operators_refuse_what_their_pointers_cannot_take():
    """Called past the public functions, the C++ kernels still read nothing out of bounds."""
    x, weight, scale, bias = lrt_inputs("additive", (5, 4, 3))
    seed = torch.tensor(3)
    with pytest.raises(ValueError, match="seed must be a 0-d int64 tensor"):
        OP.philox_normal(torch.empty(0, dtype=torch.int64), 2, 2)
    with pytest.raises(ValueError, match="bias must be"):
        OP.lrt_linear(x, weight, scale, bias[:1], seed, "additive")
    with pytest.raises(ValueError, match="scale must have 12 elements"):
        OP.lrt_linear(x, weight, scale[:2], bias, seed, "additive")
    with pytest.raises(ValueError, match="mean and var must be"):
        OP.lrt_sample(torch.zeros(2, 3), torch.zeros(2, 2), seed)


def test_lrt_sample_opcheck():
    for grad in (False, True):
        mean, var = torch.randn(5, 7, requires_grad=grad), torch.rand(5, 7, requires_grad=grad)
        torch.library.opcheck(OP.lrt_sample, (mean, var, torch.tensor(3), 1, 2, 3))
        torch.library.opcheck(OP.lrt_sample_backward, (mean.detach(), var.detach(), torch.tensor(3), 1, 2, 3))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_lrt_sample_forward_and_backward(dtype):
    for shape, isa in itertools.product([(1, 1), (17, 33), (3, 5000), (0, 4), (4, 0)], INSTRUCTION_SETS):
        with instruction_set(isa):
            mean, var, grad = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
            place = (torch.tensor(-9), 2, 5, 1)
            exact = lrt.lrt_sample_reference(mean.double(), var.double(), *place)
            assert_as_good_as_eager(
                OP.lrt_sample(mean, var, *place), lrt.lrt_sample_reference(mean, var, *place), exact
            )
            exact = lrt.lrt_sample_backward_reference(grad.double(), var.double(), *place)
            eager = lrt.lrt_sample_backward_reference(grad, var, *place)
            assert_as_good_as_eager(OP.lrt_sample_backward(grad, var, *place), eager, exact)


def test_lrt_sample_gradcheck():
    mean = torch.randn(4, 6, dtype=F64, requires_grad=True)
    var = (torch.rand(4, 6, dtype=F64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: ops.lrt_sample(m, v, 3, sample=2), (mean, var))
    assert torch.autograd.gradgradcheck(lambda m, v: ops.lrt_sample(m, v, 3, sample=2), (mean, var))


# ---- the noise of a layer ------------------------------------------------------------------------------------------


def test_lrt_linear_noise_is_philox_normal():
    """y - mean over the deviation is the contract's noise, and backward draws the same: 2 var dy/dvar = y - mean."""
    mean, var = torch.zeros(9, 11), torch.ones(9, 11, requires_grad=True)
    y = ops.lrt_sample(mean, var, 4, row_offset=2, col_offset=3, sample=1)
    eps = ops.philox_normal((9, 11), 4, row_offset=2, col_offset=3, sample=1)
    torch.testing.assert_close(y, eps, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), var)
    torch.testing.assert_close(2 * grad, eps, rtol=0, atol=0)


def test_lrt_linear_shards_draw_the_noise_of_the_whole():
    x, weight, scale, bias = lrt_inputs("additive", (12, 20, 8), F64)
    whole = ops.lrt_linear(x, weight, scale, bias, parameterization="additive", seed=1)
    rows = [ops.lrt_linear(x[i : i + 5], weight, scale, bias, parameterization="additive", seed=1, row_offset=i)
            for i in (0, 5, 10)]  # fmt: skip
    torch.testing.assert_close(torch.cat(rows), whole)
    columns = [
        ops.lrt_linear(x, weight[c], scale[c], bias[c], parameterization="additive", seed=1, col_offset=c.start)
        for c in (slice(0, 7), slice(7, 8), slice(8, 20))
    ]
    torch.testing.assert_close(torch.cat(columns, dim=1), whole)


def test_lrt_linear_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            mean, var = torch.ones(300, 700), torch.full((300, 700), 0.5, requires_grad=True)
            y = ops.lrt_sample(mean, var, 3)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), var)))
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_lrt_linear_draws_its_own_seed():
    inputs = lrt_inputs("additive")
    layer = lambda: ops.lrt_linear(*inputs, parameterization="additive")
    torch.manual_seed(3)
    first, second = layer(), layer()
    torch.manual_seed(3)
    assert torch.equal(layer(), first) and not torch.equal(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(layer(), first)
    assert torch.equal(layer(), second)


def test_lrt_linear_moments():
    """Mean and variance of y over 20,000 draws lie within 5 standard errors of x w^T + b and x^2 (sigma^2)^T."""
    x, weight, scale, bias = lrt_inputs("additive", (1, 6, 8))
    draws = 20_000
    y = ops.lrt_linear(x.expand(draws, -1), weight, scale, bias, parameterization="additive", seed=0).double()
    mean, var = x @ weight.t() + bias, x.square() @ scale.exp().t()
    assert ((y.mean(0) - mean).abs() < 5 * (var / draws).sqrt()).all()
    assert ((y.var(0) - var).abs() < 5 * var * (2 / draws) ** 0.5).all()


# ---- numbers at the edge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,param_dtype", DTYPES)
@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_zero_variance_is_finite(parameterization, dtype, param_dtype):
    """x = 0 makes var 0 and its slope 5e7: values and every gradient stay finite."""
    x, weight, scale, bias = with_grad(lrt_inputs(parameterization, dtype=dtype, param_dtype=param_dtype))
    y = ops.lrt_linear(x * 0, weight, scale, bias, parameterization=parameterization, seed=1)
    present = [t for t in (x, weight, scale, bias) if t is not None]
    for tensor in (y, *torch.autograd.grad(y.sum(), present)):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_lrt_sample_zero_and_negative_variance(dtype):
    mean = torch.randn(3, 8).to(dtype)
    var = torch.tensor([0.0, -1e-3, 1.0, 0.25, 0.0, -0.0, -5.0, 1e-6]).to(dtype).expand(3, 8).clone().requires_grad_()
    y = ops.lrt_sample(mean, var, 1)
    (grad,) = torch.autograd.grad(y.sum(), var)
    assert torch.isfinite(y).all() and torch.isfinite(grad).all()
    torch.testing.assert_close(y[:, [1, 6]], mean[:, [1, 6]], rtol=0, atol=1e-6)  # negative counts as zero
    assert (grad[:, [1, 6]] == 0).all()


def test_lrt_gradients_are_not_finite_where_the_incoming_one_is_not():
    """Loss scaling looks for infinities: none may be saturated away, though finite gradients saturate in fp16."""
    for dtype, value in itertools.product((F32, BF16, F16), (float("inf"), float("nan"))):
        var = torch.rand(2, 3).to(dtype).requires_grad_()
        grad = torch.tensor([[1.0, value, 1.0], [1.0, 1.0, 1.0]]).to(dtype)
        (found,) = torch.autograd.grad(ops.lrt_sample(torch.zeros(2, 3, dtype=dtype), var, 3), var, grad)
        assert torch.equal(torch.isfinite(found), torch.isfinite(grad))
        assert torch.equal(
            torch.isfinite(lrt.lrt_sample_backward_reference(grad, var, torch.tensor(3))), torch.isfinite(grad)
        )


def test_lrt_sample_keeps_nan():
    var = torch.tensor([[1.0, float("nan"), 0.5]])
    y = ops.lrt_sample(torch.zeros(1, 3), var, 0)
    assert y.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("value", [400.0, 1e-4])
def test_lrt_linear_half_precision_range(value):
    """fp16 activations whose squares leave fp16's range still give the right variance."""
    x = torch.full((4, 64), value, dtype=F16)
    scale = torch.full((5, 64), -4.0)
    y, var = OP.lrt_linear(x, None, scale, None, torch.tensor(0), "variance")
    assert var.dtype == F32
    torch.testing.assert_close(var, torch.full((4, 5), 64 * float(x[0, 0]) ** 2 * torch.exp(torch.tensor(-4.0)).item()))
    assert torch.isfinite(y).all()


def test_lrt_linear_zero_variance_limit_is_linear():
    x, weight, _, bias = lrt_inputs("additive")
    y = ops.lrt_linear(x, weight, torch.full_like(weight, -1e4), bias, parameterization="additive")
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


# ---- refusals ------------------------------------------------------------------------------------------------------

X, W, S, B = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(5)


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((X, W, S), {"parameterization": "rows"}, ValueError, r"lrt_linear: parameterization must be one of .*'rows'"),
        ((X.tolist(), W, S), {}, TypeError, "lrt_linear: x must be a tensor, got list"),
        ((X.int(), W, S), {}, TypeError, "lrt_linear: x must have one of the dtypes .* got torch.int32"),
        ((X[0, 0], W, S), {}, ValueError, "lrt_linear: x must be .* got a 0-d tensor"),
        ((X, None, S), {}, ValueError, "lrt_linear: weight is missing for parameterization 'additive'"),
        ((X, W, S), {"parameterization": "variance"}, ValueError, "lrt_linear: weight must be None .* 'variance'"),
        ((X, W.double(), S), {}, TypeError, "lrt_linear: weight must be torch.float32 beside x .* got torch.float64"),
        ((X.half(), W.bfloat16(), S), {}, TypeError, "weight must be torch.float16 or torch.float32 .* torch.bfloat16"),
        ((X, W, "s"), {}, TypeError, "lrt_linear: scale must be a tensor, got str"),
        ((X, W.t(), S), {}, ValueError, r"lrt_linear: x must be \[..., 5\] for weight \(4, 5\), got \(3, 4\)"),
        ((X, W[0], S), {}, ValueError, r"weight must be \[out_features, in_features\], got \(4,\)"),
        ((X, W, S[:2]), {}, ValueError, r"scale must be \(5, 4\) for parameterization 'additive', got \(2, 4\)"),
        ((X, W, S), {"parameterization": "neuron"}, ValueError, r"scale must be \(5,\) .*'neuron', got \(5, 4\)"),
        ((X, W, S), {"parameterization": "layer"}, ValueError, r"scale must be \(1,\) .*'layer', got \(5, 4\)"),
        ((X, W, S, B[:3]), {}, ValueError, r"lrt_linear: bias must be \(5,\), got \(3,\)"),
        ((X, W, S, B.to("meta")), {}, ValueError, "bias must be on x's device cpu, got meta"),
        ((X, W, S), {"seed": 1.5}, TypeError, "lrt_linear: seed must be an int or a 0-d int64 tensor, got float"),
        ((X, W, S), {"seed": True}, TypeError, "lrt_linear: seed must be an int .* got bool"),
        ((X, W, S), {"seed": torch.tensor(1.0)}, TypeError, "seed must be .* got torch.float32 tensor"),
        ((X, W, S), {"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"0-d tensor, got shape \(2,\)"),
        ((X, W, S), {"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ((X, W, S), {"row_offset": -1}, ValueError, r"lrt_linear: row_offset must lie in \[0, .* got -1"),
        ((X, W, S), {"col_offset": -4}, ValueError, r"lrt_linear: columns .* got col_offset -4"),
        ((X, W, S), {"col_offset": 2**34 - 4}, ValueError, r"columns .* must lie in \[0, 2\*\*34\)"),
        ((X, W, S), {"sample": 2**32}, ValueError, r"lrt_linear: sample must lie in \[0, 4294967296\)"),
        ((X, W, S), {"row_offset": 1.0}, TypeError, "lrt_linear: row_offset must be an int, got float"),
    ],
)
def test_lrt_linear_bad_inputs(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.lrt_linear(*arguments, **{"parameterization": "additive", **options})


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((X.int(), X), {}, TypeError, "lrt_sample: mean must have one of the dtypes"),
        (("m", X), {}, TypeError, "lrt_sample: mean must be a tensor, got str"),
        ((X, X.double()), {}, TypeError, "lrt_sample: var must be torch.float32 beside mean"),
        ((X, W), {}, ValueError, r"lrt_sample: var must broadcast to mean's shape \(3, 4\), got \(5, 4\)"),
        ((X, X), {"spatial_dims": 1.5}, TypeError, "lrt_sample: spatial_dims must be an int, got float"),
        ((X, X), {"spatial_dims": 3}, ValueError, r"lrt_sample: spatial_dims must lie in \[0, 2\], got 3"),
        ((X, X), {"sample": -1}, ValueError, "lrt_sample: sample must lie in"),
    ],
)
def test_lrt_sample_bad_inputs(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.lrt_sample(*arguments, **options)


def test_lrt_linear_kernel_for():
    assert lsf.kernel_for("lrt_linear", "cpu").startswith("C++")
    assert lsf.kernel_for("losssurf_fast::lrt_linear_backward", "cpu").startswith("C++")
    with pytest.raises(ValueError, match="kernel_for: op must be one of .* got 'lrt_line'"):
        lsf.kernel_for("lrt_line")
