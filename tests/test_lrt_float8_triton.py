"""Kernels of float8 variances against their references: on a GPU compiled, elsewhere in Triton's interpreter.

The interpreter rounds to float8 wrongly, so there the kernel returns fp32 and torch rounds; its bf16 is wrong too, so x
is fp32 there, and torch._scaled_mm is the CPU's.
"""

import functools

import pytest
import torch
from common import BF16, F32, assert_as_good_as_eager, double, lrt_inputs, with_grad

import losssurf_fast as lsf
from losssurf_fast.ops import lrt, lrt_operand
from losssurf_fast.ops.lrt_operand import FLOAT8, float8_missing

triton = pytest.importorskip("triton", reason="triton is not installed")

from losssurf_fast.ops import lrt_linear_triton, lrt_operand_triton  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MISSING = float8_missing(torch.device("cuda"))
X_DTYPE = BF16 if ON_GPU else F32
multiplies_float8 = pytest.mark.skipif(ON_GPU and bool(MISSING), reason=MISSING)
launcher = lrt_operand_triton.float8_rows


def rows_rounded_by_torch(name, weight, scale, parameterization):
    quantised, row_scale = launcher(name, weight, scale, parameterization, out_dtype=F32)
    return quantised.to(FLOAT8), row_scale


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    if not ON_GPU:
        for module in (lrt_operand_triton, lrt_linear_triton):
            monkeypatch.setattr(module, "float8_rows", rows_rounded_by_torch)


def assert_squares_match(x):
    """(x, None, "layer") gives the bits of the reference of x^2 in fp32."""
    found = lrt_operand_triton.float8_rows("lrt_linear", x.to(DEVICE), None, "layer")
    for actual, expected in zip(found, lrt_operand.float8_rows(x.float().square()), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=0, atol=0, equal_nan=True)


# ---- rows ----------------------------------------------------------------------------------------------------------


@multiplies_float8
@pytest.mark.parametrize(
    "shape", [(0, 4), (3, 0), (1, 1), (300, 1), (5, 16), (130, 33), (3, 2048), (2, 5000), (2, 16384), (2, 16401)]
)
def test_float8_rows_of_any_shape(shape):
    """Several rows in a tile, one, and one in several."""
    x = torch.randn(shape) * torch.rand(shape[0], 1).mul(40).exp2()
    assert_squares_match(x)
    assert_squares_match(x.to(BF16))


@multiplies_float8
def test_float8_rows_of_any_numbers():
    """Squares next to 448 2^k; zeros, subnormals, infinity and NaN; what overflows in squaring."""
    edge = torch.tensor(448.0).sqrt().view(torch.int32) + torch.arange(-50, 50, dtype=torch.int32).unsqueeze(1)
    x = torch.cat([edge.view(F32) * 2.0**exponent for exponent in (-60, 0, 7)])
    assert_squares_match(torch.cat([x, x / 3], 1))
    tiny = [0.0, 2.0**-149, 1e-30, 1e-22, 1e-20, 2.0**-64, 2.0**-63, 2.0**-59]
    huge = [1.8e19, 1.9e19, 3e38, torch.inf, -torch.inf, torch.nan]
    assert_squares_match(torch.tensor([[a, b] for a in tiny + huge for b in (0.0, 1.0, torch.inf)]))


@multiplies_float8
def test_float8_rows_next_to_the_largest_number():
    """exp(s) w^2 = 448 2^k stays 448 (no square is that number), what is above it becomes 224."""
    bits = torch.tensor(1.75).log().view(torch.int32) + torch.arange(-30, 30, dtype=torch.int32).unsqueeze(1)
    log_alpha, weight = bits.view(F32).to(DEVICE), torch.full((60, 1), 4.0, device=DEVICE)
    scaled, scale = launcher("lrt_linear", weight, log_alpha, "weight", out_dtype=F32)
    assert ((scaled > 224) & (scaled <= 448)).all() and (scaled == 448).any()
    assert sorted(set(scale.tolist())) == [2.0**-4, 2.0**-3]


@multiplies_float8
@pytest.mark.parametrize("kind", lrt.PARAMETERIZATIONS)
def test_lrt_variance_operand_in_float8(kind):
    """exp differs from torch's by units in the last place, which rounding to float8 rarely shows."""
    _, weight, scale, _ = lrt_inputs(kind, (1, 48, 80), X_DTYPE, F32)
    found = lrt_operand_triton.lrt_variance_operand_triton(
        None if weight is None else weight.to(DEVICE), scale.to(DEVICE), kind, FLOAT8
    )
    expected = lrt_operand.lrt_variance_operand_reference(weight, scale, kind, FLOAT8)
    values, reference = (q.cpu().float() * s.cpu().unsqueeze(1) for q, s in (found, expected))
    torch.testing.assert_close(values, reference, rtol=0.13, atol=0)
    assert (values == reference).float().mean() >= (1 if kind in ("layer", "neuron") else 0.99)


# ---- lrt_linear ----------------------------------------------------------------------------------------------------


@multiplies_float8
@pytest.mark.parametrize("kind", lrt.PARAMETERIZATIONS)
@pytest.mark.parametrize("shape", [(5, 16, 16), (40, 48, 160), (0, 16, 16), (3, 16, 0), (3, 0, 16)])
def test_lrt_linear_in_float8(kind, shape):
    """Library GEMM and fused pass are as good as plain torch on the same operands."""
    inputs = lrt_inputs(kind, shape, X_DTYPE, F32)
    operand = lrt_operand.lrt_variance_operand_reference(*inputs[1:3], kind, FLOAT8)
    rest = (kind, 3, 8, 1)
    eager, exact = (
        lrt.lrt_linear_reference(*tensors, torch.tensor(5), *rest, *operand) for tensors in (inputs, double(inputs))
    )
    on_device = lambda tensors: [t if t is None else t.to(DEVICE) for t in tensors]
    seed = torch.tensor(5, device=DEVICE)
    found = lrt_linear_triton.lrt_linear_triton(*on_device(inputs), seed, *rest, *on_device(operand))
    for actual, e, x in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(actual.cpu(), e, x)


# ---- on a GPU ------------------------------------------------------------------------------------------------------

on_float8_gpu = lambda test: pytest.mark.gpu(
    pytest.mark.skipif(bool(MISSING), reason=f"no GPU for float8: {MISSING}")(test)
)


def gpu_layer(inputs, outputs, **options):
    torch.manual_seed(0)
    return lsf.nn.LRTLinear(inputs, outputs, device="cuda", dtype=BF16, **options)


@on_float8_gpu
@pytest.mark.parametrize("inputs", [1024, 4096, 8192])
def test_accumulation_bias(inputs):
    """torch._scaled_mm against fp64 on the same float8 operands: sums of positive products, which truncation lowers."""
    x = torch.randn(512, inputs, device="cuda").to(BF16)
    operand = launcher("lrt_linear", torch.randn(512, inputs, device="cuda"), None, "layer")
    var = lrt_linear_triton.float8_product(x, *operand).double()
    squares, scale = launcher("lrt_linear", x, None, "layer")
    exact = (squares.double() * scale.double().unsqueeze(1)) @ (operand[0].double() * operand[1].unsqueeze(1)).t()
    error = var / exact - 1
    assert abs(error.mean()) < 4e-3, f"bias {error.mean():.2e}"  # half of it in the standard deviation
    assert error.abs().max() < 1.2e-2, f"largest {error.abs().max():.2e}"  # bf16 rounds by 3.9e-3


@on_float8_gpu
def test_standard_deviations_against_fp64():
    x = torch.randn(512, 4096, device="cuda").to(BF16)
    weight, scale = torch.randn(512, 4096, device="cuda") * 0.02, torch.randn(512, 4096, device="cuda") - 9
    options = {"parameterization": "additive", "seed": 1}
    y8 = lsf.ops.lrt_linear(x, weight, scale, **options, variance_dtype=FLOAT8)
    y = lsf.ops.lrt_linear(x, weight, scale, **options)
    seed = torch.tensor(1, device="cuda")
    var = torch.ops.losssurf_fast.lrt_linear(
        x, weight, scale, None, seed, "additive", 0, 0, 0,
        *lsf.ops.lrt_variance_operand(weight, scale, parameterization="additive", dtype=FLOAT8),
    )[1]  # fmt: skip
    error = (var.double() / (x.double().square() @ scale.double().exp().t())).sqrt() - 1
    assert error.square().mean().sqrt() < 4e-3 and abs(error.mean()) < 3e-3
    assert not torch.equal(y8, y) and (y8.float() - y.float()).abs().mean() < 1e-2 * y.float().std()


@on_float8_gpu
def test_gradients_are_those_of_the_exact_formulas():
    inputs = [t.cuda().contiguous() for t in lrt_inputs("additive", (64, 128, 96), BF16, F32)]
    grads = []
    for variance_dtype in (FLOAT8, None):
        tensors = with_grad(inputs)
        y = lsf.ops.lrt_linear(*tensors, parameterization="additive", seed=1, variance_dtype=variance_dtype)
        grads.append(torch.autograd.grad(y.float().square().sum(), tensors))
    for actual, expected in zip(*grads, strict=True):
        assert actual.isfinite().all() and actual.dtype == expected.dtype
        assert (actual - expected).float().norm() < 3e-2 * expected.float().norm()


@on_float8_gpu
def test_layers_compile_cache_and_autocast():
    layer, x = gpu_layer(96, 128, variance_dtype=FLOAT8), torch.randn(64, 96, device="cuda")
    seed = torch.tensor(3, device="cuda")
    y = layer(x.to(BF16), seed)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x.to(BF16), seed), y)
    with torch.no_grad(), lsf.cached_variances(layer):
        for _ in range(2):
            assert torch.equal(layer(x.to(BF16), seed), y)
        assert layer.variances["weight"].operand.row_scale is not None
    wide = lsf.set_variance_dtype(lsf.nn.LRTLinear(96, 128, device="cuda"), FLOAT8)
    with torch.autocast("cuda", BF16):
        assert wide(x, seed).dtype == BF16
    with pytest.raises(TypeError, match="needs x in torch.bfloat16"):
        wide(x, seed)
    operator = torch.ops.losssurf_fast.lrt_variance_operand.default
    torch.library.opcheck(operator, (layer.weight.detach(), layer.scale.detach(), "additive", FLOAT8))


@on_float8_gpu
def test_a_cuda_graph():
    """Forward and backward can be captured, and a replay draws with the seed that is in memory then."""
    inputs = [t.cuda().contiguous().requires_grad_() for t in lrt_inputs("additive", (64, 128, 96), BF16)]
    seed = torch.tensor(1, device="cuda")
    forward = functools.partial(lsf.ops.lrt_linear, parameterization="additive", seed=seed, variance_dtype=FLOAT8)

    def step():
        y = forward(*inputs)
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected)
