"""lrt_conv at the edges of its numbers, and lrt_sample over channels."""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, instruction_set, lrt_conv_inputs, with_grad
from test_lrt_conv import DTYPES, OP, POINTS, TWO

from losssurf_fast import ops
from losssurf_fast.ops import lrt

# ---- numbers at the edge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lrt_conv_backward_at_negative_variance(dtype, channels_last):
    """Transforming algorithms return slightly negative sums of squares: no noise there, no gradient, nothing NaN."""
    x, weight, scale, _ = lrt_conv_inputs("additive", POINTS, dtype, None, channels_last)
    var = torch.full((60, 7, 1, 1), -1e-3).to(lrt.operand_dtype(dtype))
    rest = (torch.tensor(2), "additive", [True, True, True, False], *POINTS[2])
    grad = torch.ones(60, 7, 1, 1).to(dtype)
    grad_x, grad_weight, grad_scale, _ = OP.lrt_conv_backward(grad, x, weight, scale, False, var, *rest)
    assert (grad_scale == 0).all()
    plain = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *POINTS[2], [True, True, False]
    )  # the mean's alone
    torch.testing.assert_close(grad_x, plain[0])
    torch.testing.assert_close(grad_weight, plain[1])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_zero_variance_is_finite(parameterization, dtypes):
    """x = 0 makes var 0 and its slope 5e7: values and every gradient stay finite."""
    for channels_last in (False, True):
        x, *rest = with_grad(lrt_conv_inputs(parameterization, TWO, *dtypes, channels_last))
        y = OP.lrt_conv(x * 0, *rest, torch.tensor(1), parameterization, *TWO[2])[0]
        for tensor in (y, *torch.autograd.grad(y.sum(), [t for t in (x, *rest) if t is not None])):
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("value", [400.0, 1e-4])
def test_lrt_conv_half_precision_range(value):
    """fp16 activations whose squares leave fp16's range still give the right variance."""
    x, scale = torch.full((2, 4, 5, 5), value, dtype=F16), torch.full((3, 4, 2, 2), -4.0)
    y, var = OP.lrt_conv(x, None, scale, None, torch.tensor(0), "variance", *POINTS[2])
    expected = 16 * float(x[0, 0, 0, 0]) ** 2 * torch.exp(torch.tensor(-4.0)).item()
    assert var.dtype == F32 and torch.isfinite(y).all()
    torch.testing.assert_close(var, torch.full((2, 3, 4, 4), expected))


def test_lrt_conv_zero_variance_limit_is_convolution():
    x, weight, _, bias = lrt_conv_inputs("additive", ((2, 4, 9, 8), (6, 4, 3, 3), TWO[2]))
    y = ops.lrt_conv2d(x, weight, torch.full_like(weight, -1e4), bias, 2, 1, parameterization="additive")
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, bias, 2, 1))


def test_lrt_conv_moments():
    """Mean and variance of y over 20,000 draws lie within 5 standard errors of those of its two streams."""
    x, weight, scale, bias = lrt_conv_inputs("additive", ((1, 2, 3, 3), (2, 2, 2, 2), TWO[2]))
    draws = 20_000
    y = ops.lrt_conv2d(x.expand(draws, -1, -1, -1), weight, scale, bias, parameterization="additive", seed=0).double()
    mean = torch.nn.functional.conv2d(x, weight, bias)
    var = torch.nn.functional.conv2d(x.square(), scale.exp())
    assert ((y.mean(0) - mean).abs() < 5 * (var / draws).sqrt()).all()
    assert ((y.var(0) - var).abs() < 5 * var * (2 / draws) ** 0.5).all()


# ---- lrt_sample over channels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_lrt_sample_channel_shards(isa):
    """Shards by channels and by batch draw the rows of the whole, forward and backward."""
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        for sizes in ((7, 5), (1,), (50, 43), (3, 2, 2)):
            dims = len(sizes)
            mean, var = torch.randn(4, 6, *sizes), torch.rand(4, 6, *sizes).add(0.1).requires_grad_()
            whole = ops.lrt_sample(mean, var, 3, spatial_dims=dims, row_offset=5, sample=2)
            (grad,) = torch.autograd.grad(whole.sum(), var)
            for n, c in itertools.product((slice(0, 4), slice(1, 3)), (slice(0, 6), slice(2, 5), slice(5, 6))):
                v = var[n, c].detach().requires_grad_()
                y = ops.lrt_sample(
                    mean[n, c], v, 3, spatial_dims=dims, row_offset=5 + 6 * n.start, sample=2, channels_total=6,
                    channel_offset=c.start,
                )  # fmt: skip
                assert torch.equal(y, whole[n, c])
                assert torch.equal(torch.autograd.grad(y.sum(), v)[0], grad[n, c])


def test_lrt_sample_channels_opcheck_and_gradcheck():
    mean, var = torch.randn(6, 5, dtype=F64, requires_grad=True), torch.rand(6, 5, dtype=F64).add(0.1).requires_grad_()
    place = (torch.tensor(3), 1, 2, 3, 3, 7)
    torch.library.opcheck(OP.lrt_sample, (mean, var, *place))
    torch.library.opcheck(OP.lrt_sample_backward, (mean.detach(), var.detach(), *place))
    assert torch.autograd.gradcheck(lambda m, v: OP.lrt_sample(m, v, *place), (mean, var))
    assert torch.autograd.gradgradcheck(lambda m, v: OP.lrt_sample(m, v, *place), (mean, var))
    with pytest.raises(ValueError, match="lrt_sample: channels must divide 6 rows"):
        OP.lrt_sample(mean, var, torch.tensor(3), 0, 0, 0, 4, 8)
    with pytest.raises(ValueError, match="be at most channels_total, got 3 and 2"):
        OP.lrt_sample(mean, var, torch.tensor(3), 0, 0, 0, 3, 2)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"channels_total": 4}, ValueError, "channels_total and channel_offset need a size for channels .*dims=0"),
        ({"channel_offset": 1}, ValueError, "channels_total and channel_offset need a size for channels"),
        ({"channels_total": 4, "spatial_dims": 3}, ValueError, "need a size for channels .* with spatial_dims=3"),
        ({"channels_total": 2, "spatial_dims": 1}, ValueError, r"channel_offset must lie in \[0, channels_total - 3\]"),
        ({"channel_offset": 1, "spatial_dims": 1}, ValueError, "channel_offset must lie in .* got 1 of 3"),
        ({"channels_total": 4.0, "spatial_dims": 1}, TypeError, "lrt_sample: channels_total must be an int, got float"),
        ({"channel_offset": True, "spatial_dims": 1}, TypeError, "channel_offset must be an int, got bool"),
        ({"channels_total": 5, "channel_offset": -1, "spatial_dims": 1}, ValueError, "got -1 of 5"),
    ],
)
def test_lrt_sample_channels_bad_inputs(options, error, message):
    with pytest.raises(error, match=message):
        ops.lrt_sample(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 1, **options)
