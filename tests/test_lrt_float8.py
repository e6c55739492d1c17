"""Variances in float8: scales and rounding of the operands, errors of standard deviations, gradients, refusals, layers.

``test_lrt_float8_triton.py`` has the kernels.
"""

import copy
import logging
import pickle

import pytest
import torch
from common import BF16, F32, F64, double, lrt_inputs, with_grad
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.ops import lrt, lrt_operand
from losssurf_fast.ops.lrt_operand import FLOAT8, VarianceOperand, float8_missing, float8_product, float8_rows

SHAPE = (24, 32, 48)  # M, O, I


def dequantised(quantised, scale):
    return quantised.double() * scale.double().unsqueeze(1)


def assert_same(actual, expected):
    """The same (float8, row scales), in NaN too."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a.cpu().float(), e.float(), rtol=0, atol=0, equal_nan=True)


# ---- the operands --------------------------------------------------------------------------------------------------


def test_float8_rows_scales_at_the_edges():
    """448 2^k needs the scale 2^k and a number above it the next; below 2^-126 there is none."""
    for exponent in range(-126, 120):
        edge = torch.tensor(448.0).ldexp(torch.tensor(exponent))
        row = torch.stack([edge, edge.nextafter(torch.tensor(torch.inf)), edge.nextafter(torch.tensor(0.0))])
        quantised, scale = float8_rows(row.unsqueeze(1))
        assert scale.tolist() == [2.0**exponent, 2.0 ** (exponent + 1), 2.0**exponent]
        assert quantised.float().flatten().tolist() == [448, 224, 448]
    tiny = torch.tensor([[2.0**-149], [2.0**-133], [2.0**-127], [0.0]])
    quantised, scale = float8_rows(tiny)
    assert (scale == 2.0**-126).all() and quantised.float().flatten().tolist() == [0, 2.0**-7, 0.5, 0]


def test_float8_rows_of_any_finite_numbers():
    """The largest element of a row stays in the upper half of float8's range: nothing overflows."""
    bits = torch.randint(0, 0x7F800000, (4000, 1), dtype=torch.int32)
    values = bits.view(F32) * torch.rand(4000, 5)
    quantised, scale = float8_rows(values)
    assert quantised.float().isfinite().all() and (scale.frexp().mantissa == 0.5).all()
    largest = quantised.float().amax(1)
    assert (largest[scale > 2.0**-126] >= 224).all() and (largest <= 448).all()
    step = 2.0**-4 * values.double() + 2.0**-10 * scale.double().unsqueeze(1)
    assert ((dequantised(quantised, scale) - values.double()).abs() <= step).all()


def test_float8_rows_that_are_not_finite_or_empty():
    values = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [3.0, 4.0]])
    quantised, scale = float8_rows(values)
    assert quantised.float().isnan().all(1).tolist() == scale.isnan().tolist() == [True, True, False]
    for shape in ((0, 4), (3, 0)):
        quantised, scale = float8_rows(torch.zeros(shape))
        assert quantised.shape == shape and scale.shape == shape[:1] and scale.isfinite().all()


def test_lrt_variance_operand_reference_in_float8():
    for kind in lrt.PARAMETERIZATIONS:
        _, weight, scale, _ = lrt_inputs(kind, SHAPE)
        sigma2 = lrt.variance_operand(weight, scale, kind, F32)
        made = lrt_operand.lrt_variance_operand_reference(weight, scale, kind, FLOAT8)
        assert_same(made, float8_rows(sigma2))


# ---- the error of standard deviations ------------------------------------------------------------------------------


def relative_error(var, exact):
    return (var / exact).sqrt() - 1


def data_set(name, inputs):
    """(x, sigma^2) of one row of the table of ops/lrt_operand.py."""
    x, z = torch.randn(128, inputs), torch.randn(96, inputs)
    if name == "normal":
        return x, (0.05 * z).square()
    if name == "rectified":
        return x.relu(), (3 * z - 5).exp()
    return x * (3 / torch.randn(3, 128, inputs).square().sum(0)).sqrt(), (z - 5).exp()


@pytest.mark.parametrize(
    ("name", "rms", "largest"), [("normal", 2e-3, 1.3e-2), ("rectified", 9e-3, 5e-2), ("student", 4.5e-3, 4e-2)]
)
@pytest.mark.parametrize("inputs", [1024, 4096])
def test_lrt_float8_error(name, rms, largest, inputs):
    """That of the docstring's table, for bf16 x against fp64; float8 has some of it to lose."""
    x, sigma2 = data_set(name, inputs)
    x = x.to(BF16)
    exact = x.double().square() @ sigma2.double().t()
    error = relative_error(float8_product(x.double(), VarianceOperand(*float8_rows(sigma2))), exact)
    assert rms / 4 < error.square().mean().sqrt() < rms and error.abs().max() < largest
    assert abs(error.mean() + 1e-3) < 6e-4


def test_float8_without_scales_saturates():
    x, sigma2 = data_set("student", 1024)
    exact = x.double().square() @ sigma2.double().t()
    clipped = lambda t: t.clamp(max=448).to(FLOAT8).double()
    assert relative_error(clipped(x.square()) @ clipped(sigma2).t(), exact).abs().max() > 0.2
    scaled = float8_product(x.double(), VarianceOperand(*float8_rows(sigma2)))
    assert relative_error(scaled, exact).abs().max() < 4e-2


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", lrt.PARAMETERIZATIONS)
def test_lrt_linear_float8_gradients(kind):
    """Those of the exact formulas at the variance that float8 gave."""
    inputs = with_grad(double(lrt_inputs(kind, SHAPE)))
    x, weight, scale, bias = inputs
    seed, grad = torch.tensor(3), torch.randn(SHAPE[:2], dtype=F64)
    operand = lrt_operand.lrt_variance_operand_reference(weight, scale, kind, FLOAT8)
    with torch.no_grad():
        y, var = lrt.lrt_linear_reference(*inputs, seed, kind, 0, 0, 0, *operand)
    needed = [t is not None for t in inputs]
    found = lrt.lrt_linear_backward_reference(grad, x, weight, scale, True, var, seed, kind, needed)

    exact = x.square() @ lrt.variance_operand(weight, scale, kind, F64).t()
    assert 0 < (exact - var).abs().max() < 0.1 * exact.max()
    alpha = scale.exp() if kind in ("layer", "neuron") else 1.0
    mean = bias.expand_as(var) if weight is None else x @ weight.t() + bias
    composite = lrt.lrt_sample_reference(mean, (exact - exact.detach() + var) * alpha, seed)
    torch.testing.assert_close(composite, y)
    present = [t for t in inputs if t is not None]
    expected = torch.autograd.grad(composite, present, grad)
    for actual, e in zip([f for f, n in zip(found, needed, strict=True) if n], expected, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, e)


# ---- calling -------------------------------------------------------------------------------------------------------


def arguments(kind="additive", shape=SHAPE, device="cpu"):
    tensors = lrt_inputs(kind, shape, BF16, F32)
    return [t if t is None else t.contiguous().to(device) for t in tensors], {"parameterization": kind, "seed": 1}


def test_refusals():
    call = lambda tensors, options, **more: lsf.ops.lrt_linear(*tensors, **options, **more)
    half, options = arguments()
    operand = VarianceOperand(*float8_rows(half[2].exp()))
    wide = lrt_inputs("additive", SHAPE)
    for dtype in (FLOAT8, "float8_e4m3fn"):
        with pytest.raises(RuntimeError, match=r"lrt_linear: .*compute capability 8\.9 or more, got a cpu device"):
            call(half, options, variance_dtype=dtype)
    with torch.autocast("cpu", BF16), pytest.raises(RuntimeError, match="got a cpu device"):  # x has the dtype there
        call(wide, options, variance_dtype=FLOAT8)
    for wrong in ("bfloat16", torch.float8_e5m2, 8):
        with pytest.raises(ValueError, match="lrt_linear: variance_dtype must be None or 'float8_e4m3fn', got"):
            call(half, options, variance_dtype=wrong)
    with pytest.raises(TypeError, match=r"lrt_linear: .* needs x in torch\.bfloat16, got torch\.float32"):
        call(wide, options, variance_dtype=FLOAT8)
    for shape in ((24, 32, 40), (24, 33, 48)):
        with pytest.raises(ValueError, match=r"lrt_linear: .*multiples of 16, got \(3[23], 4[08]\)"):
            call(arguments(shape=shape)[0], options, variance_dtype=FLOAT8)
    for wrong in (operand._replace(row_scale=operand.row_scale[:3]), VarianceOperand(operand.sigma2.float())):
        with pytest.raises(ValueError, match=r"lrt_linear: .*variance_operand must be torch.float.*, got torch"):
            call(half, options, variance_operand=wrong, variance_dtype=FLOAT8)
    with pytest.raises(TypeError, match="row_scale of variance_operand must hold a tensor, got NoneType"):
        call(half, options, variance_operand=VarianceOperand(operand.sigma2), variance_dtype=FLOAT8)
    seed = torch.tensor(1)
    with pytest.raises(NotImplementedError, match="lrt_linear: .*torch.func"):
        torch.func.grad(
            lambda x: call((x, *half[1:]), {"parameterization": "additive", "seed": seed}, variance_dtype=FLOAT8).sum()
        )(half[0])
    make = lsf.ops.lrt_variance_operand
    with pytest.raises(RuntimeError, match="lrt_variance_operand: float8_e4m3fn needs a GPU .*, got a cpu device"):
        make(*half[1:3], parameterization="additive", dtype=FLOAT8)
    with pytest.raises(ValueError, match=r"lrt_variance_operand: .*multiples of 16, got \(33, 48\)"):
        make(*arguments(shape=(24, 33, 48))[0][1:3], parameterization="additive", dtype=FLOAT8)
    with pytest.raises(TypeError, match="lrt_variance_operand: dtype must be one of"):
        make(*double(half[1:3]), parameterization="additive", dtype=FLOAT8)
    with pytest.raises(NotImplementedError, match="float8 operands are not multiplied on the CPU"):
        torch.ops.losssurf_fast.lrt_variance_operand(*half[1:3], "additive", FLOAT8)


def test_float8_missing(monkeypatch):
    assert float8_missing(torch.device("cpu")) == "a cpu device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((8, 6), "compute capability 8.6"), ((8, 9), ""), ((9, 0), ""), ((12, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert float8_missing(torch.device("cuda")) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match=r"name: float8_e4m3fn needs .* 8\.9 or more, got compute capability 8\.0"):
        lrt_operand.check_float8_device("name", torch.device("cuda"))


def test_tracing_does_not_ask_the_gpu():
    """Fake tensors of a GPU, with none at hand, get the shapes and dtypes of the results."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(24, 48, dtype=BF16, device="cuda:0"), torch.empty(32, 48, device="cuda:0")
        options = {"parameterization": "weight", "seed": torch.empty((), dtype=torch.int64, device="cuda:0")}
        with torch.no_grad():
            y = lsf.ops.lrt_linear(x, weight, weight, **options, variance_dtype=FLOAT8)
            made = lsf.ops.lrt_variance_operand(weight, weight, parameterization="weight", dtype=FLOAT8)
    assert (y.shape, y.dtype, y.device.type) == ((24, 32), BF16, "cuda")
    assert (made.sigma2.shape, made.sigma2.dtype, made.row_scale.shape) == ((32, 48), FLOAT8, (32,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_are_traced_whole(backend, monkeypatch):
    """Without the checks, what refuses is the CPU's kernel, when the finished graph runs."""
    for module in (lrt, lrt_operand):
        monkeypatch.setattr(module, "check_float8", lambda name, matrix: None)
    layer = lsf.nn.LRTLinear(32, 48, variance_dtype=FLOAT8, dtype=BF16)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    refused = pytest.raises(NotImplementedError, match="float8 operands are not multiplied on the CPU")
    with torch.enable_grad(), refused:  # a graph that fails within no_grad leaves gradients off
        compiled(torch.randn(4, 32, dtype=BF16), torch.tensor(3))


@pytest.mark.parametrize("kind", lrt.PARAMETERIZATIONS)
def test_lrt_variance_operand_compiles(kind):
    (x, weight, scale, bias), options = arguments(kind)

    def step(x, weight, scale, bias):
        made = lsf.ops.lrt_variance_operand(weight, scale, parameterization=kind, dtype=BF16)
        return made.sigma2, lsf.ops.lrt_linear(
            x, weight, scale, bias, parameterization=kind, seed=torch.ones((), dtype=torch.int64), variance_operand=made
        )

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(x, weight, scale, bias), step(x, weight, scale, bias), strict=True):
        assert torch.equal(actual, expected)
    torch.library.opcheck(torch.ops.losssurf_fast.lrt_variance_operand.default, (weight, scale, kind, BF16))


# ---- layers --------------------------------------------------------------------------------------------------------


def test_layers_with_a_variance_dtype():
    for dtype in (FLOAT8, "float8_e4m3fn"):
        layer = lsf.nn.LRTLinear(32, 48, variance_dtype=dtype, dtype=BF16)
        assert layer.variance_dtype == FLOAT8 and "variance_dtype=torch.float8_e4m3fn" in repr(layer)
    plain = lsf.nn.LRTLinear(32, 48, dtype=BF16)
    assert plain.variance_dtype is None and "variance_dtype" not in repr(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(F32).to(BF16)):
        assert other.variance_dtype == FLOAT8
        other.load_state_dict(plain.state_dict())
        assert other.variance_dtype == FLOAT8
    x = torch.randn(4, 32, dtype=BF16)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))  # the mean weights
    with pytest.raises(RuntimeError, match="lrt_linear: .*got a cpu device"):
        layer.train()(x)
    uncached = pytest.raises(RuntimeError, match="lrt_linear: .*got a cpu device")
    with uncached, torch.no_grad(), lsf.cached_variances(layer):
        layer(x)
    layer.sampling = "weights"  # whose draws have no variance stream
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lsf.nn.LRTLinear(32, 48, variance_dtype=BF16),
            "LRTLinear: variance_dtype must be None or 'float8_e4m",
        ),
        (lambda: lsf.nn.LRTLinear(32, 40, variance_dtype=FLOAT8), r"LRTLinear: .*multiples of 16, got \(40, 32\)"),
        (
            lambda: lsf.set_variance_dtype(lsf.nn.LRTLinear(16, 16), "half"),
            "set_variance_dtype: variance_dtype must be",
        ),
        (lambda: lsf.set_variance_dtype(nn.Linear(16, 16), FLOAT8), "set_variance_dtype: Linear has no stochastic"),
        (
            lambda: lsf.set_variance_dtype(lsf.nn.LRTLinear(16, 10), FLOAT8),
            r"set_variance_dtype: LRTLinear has no layer that can have it; LRTLinear: its sizes \(10, 16\) are not",
        ),
        (
            lambda: lsf.set_variance_dtype(lsf.nn.LRTConv2d(16, 16, 3), FLOAT8),
            "set_variance_dtype: .*; LRTConv2d: LRTConv2d has no variance_dtype",
        ),
    ],
)
def test_refusals_of_layers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_set_variance_dtype(caplog):
    model = nn.Sequential(nn.Conv1d(16, 32, 1), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    model = lsf.to_lrt(model)
    with caplog.at_level(logging.WARNING, "losssurf_fast"):
        assert lsf.set_variance_dtype(model, "float8_e4m3fn") is model
    assert [getattr(layer, "variance_dtype", None) for layer in model] == [None, None, FLOAT8, None, None]
    (record,) = caplog.records
    assert "0: LRTConv1d has no variance_dtype" in record.message
    assert "4: its sizes (10, 64) are not multiples of 16" in record.message
    caplog.clear()
    lsf.set_variance_dtype(model, None)
    assert model[2].variance_dtype is None and not caplog.records
    assert "variance_dtype" not in repr(model)
    plain = lsf.from_lrt(lsf.set_variance_dtype(model, FLOAT8))
    assert vars(plain[2]).keys() == vars(nn.Linear(1, 1)).keys()
