"""The Triton kernel of curve_linear: on a GPU compiled, elsewhere in Triton's interpreter (see conftest.py)."""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64, assert_as_good_as_eager
from curve_linear import curve_inputs, each, everything

import losssurf_fast as lsf
from losssurf_fast.ops.curve_linear import curve_linear_backward_reference, curve_linear_reference
from losssurf_fast.ops.lrt_strategy import shared_memory

pytest.importorskip("triton", reason="triton is not installed")

from test_triton import DEVICE, ON_GPU, SMALL_TILE, one_rounding_per_fma  # noqa: F401

from losssurf_fast.ops import curve_linear_triton

DTYPES = [(F32, F32), (F16, F16), (F16, F32)] + ([(BF16, BF16), (BF16, F32)] if ON_GPU else [])
WAYS = list(itertools.product((False, True), (0, 1, 3)))  # a t for each row, biases


def on_device(inputs, bends=3):
    return each(inputs, lambda t: t.to(DEVICE), bends)


def kernels():
    """Every way ``curve_linear`` can run: the launcher's choice, and each forced."""
    yield curve_linear_triton.curve_linear_triton
    yield curve_linear_triton.linear_synthesised
    yield lambda *args: curve_linear_triton.linear_fused(*args, SMALL_TILE)


@pytest.mark.parametrize(("per_row", "biases"), WAYS)
def test_curve_linear(per_row, biases):
    """Every kernel is as good as eager in every dtype, at odd sizes."""
    for shape, (dtype, bend_dtype) in itertools.product([(1, 1, 1), (32, 32, 32), (17, 63, 33)], DTYPES):
        inputs = curve_inputs(shape, dtype, bend_dtype, biases=biases, per_row=per_row)
        exact = curve_linear_reference(*each(inputs, torch.Tensor.double))
        eager = curve_linear_reference(*inputs)
        for kernel in kernels():
            assert_as_good_as_eager(kernel(*on_device(inputs)).cpu(), eager, exact)


@pytest.mark.parametrize(("per_row", "biases"), WAYS)
def test_curve_linear_backward(per_row, biases):
    """Every gradient is as good as eager's, and any one of them alone is that of all together."""
    for dtype, bend_dtype in DTYPES:
        inputs = curve_inputs((17, 23, 33), dtype, bend_dtype, biases=biases, per_row=per_row)
        grad = torch.randn(17, 23).to(dtype)
        flags = everything(biases)
        eager = curve_linear_backward_reference(grad, *inputs, *flags)
        exact = curve_linear_backward_reference(grad.double(), *each(inputs, torch.Tensor.double), *flags)
        backward = curve_linear_triton.curve_linear_backward_gemms
        together = backward(grad.to(DEVICE), *on_device(inputs), *flags)
        for actual, e, x in zip(together, eager, exact, strict=True):
            assert_as_good_as_eager(actual.cpu(), e, x)
        alone = []
        for i in range(len(together)):
            need = [k == i for k in range(len(together))]
            flags = need[0], need[1:4], need[4], need[5:]
            alone += backward(grad.to(DEVICE), *on_device(inputs), *flags)
        for one, of_all in zip(alone, together, strict=True):
            torch.testing.assert_close(one, of_all)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("bends", [2, 5, 8])
def test_curve_linear_bends(bends, per_row):
    inputs = curve_inputs((5, 17, 20), bends=bends, biases=bends, per_row=per_row)
    for kernel in kernels():
        y = kernel(*on_device(inputs, bends))
        torch.testing.assert_close(y.cpu(), curve_linear_reference(*inputs), rtol=1e-5, atol=1e-5)


def test_curve_linear_weight_is_that_of_curve_weights():
    """x = identity shows the weight: the bits of the reference's sum, where the dot adds nothing but zeros."""
    _, bends, coefficients, _ = curve_inputs((16, 16, 16), F16, F16)
    x = torch.eye(16, dtype=F16)
    y = curve_linear_triton.linear_fused(*on_device((x, bends, coefficients, [])), SMALL_TILE)
    assert torch.equal(y.cpu(), curve_linear_reference(x, bends, coefficients, []))


def test_curve_linear_does_not_read_bends_of_coefficient_zero():
    for shape in ((4, 16, 16), (4, 5, 7)):
        x, bends, coefficients, _ = curve_inputs(shape)
        coefficients[1] = 0
        expected = curve_linear_reference(x, bends, coefficients, [])
        bends[1].fill_(torch.nan)
        y = curve_linear_triton.linear_fused(*on_device((x, bends, coefficients, [])), SMALL_TILE)
        torch.testing.assert_close(y.cpu(), expected)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 3, 0)])
def test_curve_linear_empty(shape, per_row):
    inputs = on_device(curve_inputs(shape, biases=3, per_row=per_row))
    y = curve_linear_triton.curve_linear_triton(*inputs)
    torch.testing.assert_close(y, curve_linear_reference(*inputs))
    grads = curve_linear_triton.curve_linear_backward_gemms(y, *inputs, *everything(3))
    torch.testing.assert_close(grads, curve_linear_backward_reference(y, *inputs, *everything(3)))


# ---- choices -------------------------------------------------------------------------------------------------------


def test_kernels_are_attached():
    assert lsf.kernel_for("curve_linear", "cuda") == "Triton"
    assert lsf.kernel_for("curve_linear_backward", "cuda") == "library GEMMs"


def test_fused():
    fused = lambda rows, dtype=BF16, bends=3, capability=(9, 0): curve_linear_triton.fused(
        rows, dtype, bends, capability
    )
    assert fused(1) and fused(128) and not fused(129)
    assert fused(64, F32) and not fused(65, F32)
    assert fused(128, F16) and not fused(1, F64)
    assert fused(1, bends=8) and not fused(1, bends=9)
    assert not fused(1, capability=(7, 5))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_curve_tile(capability):
    """Two stages at least, all of them in shared memory."""
    mixes = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]
    for rows, (x, p), bends in itertools.product((1, 16, 17, 64, 128), mixes, (2, 3, 5, 8)):
        tile = curve_linear_triton.curve_tile(rows, x, p, bends, capability)
        stage = tile.block_k * (tile.block_m * x.itemsize + bends * tile.block_n * p.itemsize)
        assert 2 <= tile.num_stages <= 4 and stage * (tile.num_stages - 1) <= shared_memory(capability)
