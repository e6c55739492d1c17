"""``lrt_conv`` and the channels of ``lrt_sample`` in Triton: compiled on a GPU, elsewhere interpreted (conftest.py)."""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64, assert_as_good_as_eager, double

import losssurf_fast as lsf
from losssurf_fast.ops import lrt, lrt_conv
from losssurf_fast.ops.lrt_sample import lrt_sample_backward_reference, lrt_sample_reference
from losssurf_fast.ops.noise import philox_normal_reference

pytest.importorskip("triton", reason="triton is not installed")

from test_triton import (  # noqa: F401
    DEVICE,
    ON_GPU,
    PLACES,
    one_rounding_per_fma,
    seed_tensor,
    to_device,
)

from losssurf_fast.ops import lrt_conv_triton, lrt_sample_triton

DTYPES = [(F32, F32), (F16, F16), (F16, F32)] + ([(BF16, BF16), (BF16, F32)] if ON_GPU else [])
# x, weight, (stride, padding, dilation, transposed, output_padding, groups)
ONE = ((3, 3, 33), (5, 3, 3), ([2], [1], [1], False, [0], 1))
TWO = ((2, 4, 7, 6), (6, 2, 3, 2), ([1, 2], [1, 0], [1, 1], False, [0, 0], 2))
THREE = ((9, 2, 4, 3, 7), (3, 2, 2, 2, 2), ([1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1))
TRANSPOSED = ((3, 4, 5, 4), (4, 3, 3, 3), ([2, 2], [1, 1], [1, 1], True, [1, 0], 2))
POINTS = ((30, 4, 1, 1), (7, 4, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
TILES = ((2, 1, 21, 20), (131, 1, 2, 2), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1))  # several along each axis
GEOMETRIES = [ONE, TWO, THREE, TRANSPOSED, POINTS]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
CASES = [  # geometry, whether channels_last, (dtype of x, of parameters)
    *((case, last, DTYPES[0]) for case in GEOMETRIES for last in (False, True)[: len(case[0]) - 2]),
    *((TWO, last, dtypes) for last in (False, True) for dtypes in DTYPES[1:]),
]
PLACE = (2**32 - 3, 300, 2**32 - 1)  # row offset, channels of the whole layer, sample


def conv_inputs(parameterization, case, dtype=F32, param_dtype=F32, channels_last=False):
    """(x, weight, scale, bias) in one memory format."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)
    outputs = case[1][0] if not case[2][3] else case[1][1] * case[2][5]
    scale_shape = {"layer": (1,), "neuron": (outputs,)}.get(parameterization, case[1])
    weight = None if parameterization == "variance" else draw(*case[1]).mul(0.3).to(param_dtype)
    inputs = [draw(*case[0]).to(dtype), weight, (draw(*scale_shape) - 1).to(param_dtype), draw(outputs).to(param_dtype)]
    if channels_last:
        in_format = lambda t: t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if t is not None and t.dim() > 1 else t
        inputs = [in_format(t) for t in inputs]
    return inputs


def both_ways(inputs, seed, *rest):
    """(y, var) of the kernel, of eager and in float64."""
    actual = lrt_conv_triton.lrt_conv_triton(*to_device(inputs), seed.to(DEVICE), *rest)
    eager = lrt_conv.lrt_conv_reference(*inputs, seed, *rest)
    return actual, eager, lrt_conv.lrt_conv_reference(*double(inputs), seed, *rest)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv(parameterization):
    """As good as eager in every dtype, in the memory format that eager has."""
    for case, last, dtypes in CASES:
        inputs = conv_inputs(parameterization, case, *dtypes, last)
        ways = both_ways(inputs, torch.tensor(5), parameterization, *case[2], *PLACE)
        for actual, eager, exact in zip(*ways, strict=True):
            assert_as_good_as_eager(actual.cpu(), eager, exact)
            assert actual.stride() == eager.stride()


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_backward(parameterization):
    """Every gradient is as good as eager's and lies in memory as its tensor does."""
    seed = torch.tensor(5)
    for case, last, dtypes in CASES:
        inputs = conv_inputs(parameterization, case, *dtypes, last)
        rest = (seed, parameterization, *case[2], *PLACE)
        var = lrt_conv.lrt_conv_reference(*inputs, *rest)[1]
        exact_var = lrt_conv.lrt_conv_reference(*double(inputs), *rest)[1]
        grad = torch.randn(var.shape).to(inputs[0].dtype)
        rest = (parameterization, [t is not None for t in inputs], *case[2], *PLACE)
        eager = lrt_conv.lrt_conv_backward_reference(grad, *inputs[:3], True, var, seed, *rest)
        exact = lrt_conv.lrt_conv_backward_reference(grad.double(), *double(inputs[:3]), True, exact_var, seed, *rest)
        grads = lrt_conv_triton.lrt_conv_backward_triton(
            *to_device((grad, *inputs[:3])), True, *to_device((var, seed)), *rest
        )
        for actual, e, x in zip(grads, eager, exact, strict=True):
            if actual.numel() == 1:  # a maximum over one number says nothing
                torch.testing.assert_close(actual.cpu(), e)
            else:
                assert_as_good_as_eager(actual.cpu(), e, x)
        for actual, t in zip(grads[:3], inputs[:3], strict=True):
            assert t is None or actual.stride() == t.stride()


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_backward_needed(parameterization):
    """Any subset of the gradients is that of all of them, whatever the memory format of grad."""
    inputs = to_device(conv_inputs(parameterization, TWO, channels_last=True))
    seed, rest = seed_tensor(), (*TWO[2], *PLACE)
    var = lrt_conv_triton.lrt_conv_triton(*inputs, seed, parameterization, *rest)[1]
    grad = torch.randn(6, 1, 1, device=DEVICE).expand(var.shape)
    possible = [t is not None for t in inputs]
    backward = lambda grad, needed: lrt_conv_triton.lrt_conv_backward_triton(
        grad, *inputs[:3], True, var, seed, parameterization, needed, *rest
    )
    everything = backward(grad.contiguous(), possible)
    for needed in itertools.product(*[(False, True) if p else (False,) for p in possible]):
        for actual, full, need in zip(backward(grad, needed), everything, needed, strict=True):
            assert torch.equal(actual, full) if need else actual.shape == (0,)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", [*GEOMETRIES[1:], TILES])
def test_lrt_conv_draws_the_noise(case, channels_last):
    """With mean 0 and variance 1, y is the noise, bit for bit, of every channel's row."""
    x, _, _, _ = conv_inputs("variance", case, channels_last=channels_last)
    shape = lrt_conv.lrt_conv_reference(*conv_inputs("variance", case), seed_tensor().cpu(), "variance", *case[2])[
        0
    ].shape
    total = 300
    expected = philox_normal_reference(seed_tensor().cpu(), shape[0] * total, shape[2:].numel(), 2**32 - 3, 0, 1, F32)
    expected = expected.view(shape[0], total, *shape[2:])[:, : shape[1]]
    y = torch.ones(shape, device=DEVICE)
    if channels_last:
        y = y.contiguous(memory_format=CHANNELS_LAST[y.dim()])
    view = lrt_conv_triton.channels_view(y, total)
    lrt_sample_triton.sample_pass(None, y, None, None, seed_tensor(), y, view, "none", 2**32 - 3, 0, 1)
    assert torch.equal(y.cpu(), expected)


def test_lrt_conv_shards():
    """A shard of the batch and of the channels draws what the whole layer draws, in either memory format."""
    forward = lambda *inputs, place: lrt_conv_triton.lrt_conv_triton(*inputs, seed_tensor(), "neuron", *rest, *place)[0]
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    for last in (False, True):
        x, weight, scale, bias = to_device(
            conv_inputs("neuron", ((3, 4, 6, 5), (9, 4, 3, 3), rest), channels_last=last)
        )
        whole = forward(x, weight, scale, bias, place=(0, 0, 0))
        part = forward(x[1:].contiguous(), weight[5:], scale[5:], bias[5:], place=(9 + 5, 9, 0))
        torch.testing.assert_close(part, whole[1:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_lrt_conv_of_slices(channels_last):
    """Inputs that are not dense."""
    inputs = to_device(conv_inputs("additive", TWO, channels_last=channels_last))
    wide = [torch.cat([t, t], dim=-1) for t in inputs]
    slices = [t[..., : t.shape[-1] // 2] for t in wide]  # made here: on its way to a device a slice becomes dense
    rest = (seed_tensor(), "additive", *TWO[2], *PLACE)
    y, var = lrt_conv_triton.lrt_conv_triton(*inputs, *rest)
    part = lrt_conv_triton.lrt_conv_triton(*slices, *rest)
    torch.testing.assert_close(part, (y, var))
    rest = (True, var, *rest[:2], [True] * 4, *rest[2:])
    grads = lrt_conv_triton.lrt_conv_backward_triton(y, *inputs[:3], *rest)
    torch.testing.assert_close(lrt_conv_triton.lrt_conv_backward_triton(y, *slices[:3], *rest), grads)


def test_lrt_conv_parameters_in_two_formats():
    """scale may lie in memory otherwise than weight; its gradient lies as it does."""
    x, weight, scale, bias = to_device(conv_inputs("weight", TWO))
    rest = (seed_tensor(), "weight", *TWO[2], *PLACE)
    other = scale.contiguous(memory_format=torch.channels_last)
    y, var = lrt_conv_triton.lrt_conv_triton(x, weight, scale, bias, *rest)
    torch.testing.assert_close(lrt_conv_triton.lrt_conv_triton(x, weight, other, bias, *rest), (y, var))
    rest = (True, var, *rest[:2], [True] * 4, *rest[2:])
    expected = lrt_conv_triton.lrt_conv_backward_triton(y, x, weight, scale, *rest)
    actual = lrt_conv_triton.lrt_conv_backward_triton(y, x, weight, other, *rest)
    torch.testing.assert_close(actual, expected)
    assert actual[1].stride() == weight.stride() and actual[2].stride() == other.stride()


@pytest.mark.parametrize("magnitude", [400.0, 1e-4])
def test_lrt_conv_fp16_range(magnitude):
    """Squares of fp16 inputs neither overflow nor vanish, forward and backward."""
    x, weight, scale, _ = to_device(conv_inputs("additive", TWO, F16, F16))
    x, scale = x.sign() * magnitude, torch.full_like(scale, -9.0)
    rest = (seed_tensor(), "additive", *TWO[2])
    y, var = lrt_conv_triton.lrt_conv_triton(x, weight, scale, None, *rest)
    exact = torch.convolution(x.double().square(), scale.double().exp(), None, *TWO[2])
    torch.testing.assert_close(var.double(), exact, rtol=2e-3, atol=0)
    grads = lrt_conv_triton.lrt_conv_backward_triton(
        torch.ones_like(y), x, weight, scale, False, var, *rest[:2], [True, True, True, False], *rest[2:]
    )
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_lrt_conv_extremes():
    """Negative sums of squares count as 0, with gradient 0; NaN stays NaN."""
    y = torch.tensor([-1.0, torch.nan, 0.0, 4.0], device=DEVICE).view(1, 4, 1, 1)
    view = lrt_conv_triton.channels_view(y, 0)
    sample = lrt_sample_triton.sample_pass(None, y, None, None, seed_tensor(), y.clone(), view, "none", 0, 0, 0)
    assert (sample[0, [0, 2]].abs() < 1e-7).all() and sample[0, 1].isnan().all() and sample[0, 3].isfinite().all()
    grad_var, _, _ = lrt_sample_triton.sample_backward_pass(
        torch.ones_like(y), y, None, seed_tensor(), view, F32, torch.finfo(F32).max, "none", 0, 0, 0,
        needs_var=True, needs_bias=False, needs_alpha=False,
    )  # fmt: skip
    assert grad_var[0, 0] == 0 and grad_var[0, 1].isnan().all() and grad_var[0, 2:].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_many_tiles(channels_last, monkeypatch):
    """Sums for bias and alpha over several programs are those of torch, and twice the same bits."""
    monkeypatch.setattr(lrt_sample_triton, "PROGRAMS", 1)  # 20 tiles: 16 for one program, the rest for another
    grad, var = torch.randn(10, 4, 12, 30), torch.rand(10, 4, 12, 30)
    if channels_last:
        grad, var = (t.contiguous(memory_format=torch.channels_last) for t in (grad, var))
    grad, var = to_device((grad, var))
    scale = torch.randn(4, device=DEVICE)
    view = lrt_conv_triton.channels_view(var, 0)
    backward = lambda: lrt_sample_triton.sample_backward_pass(
        grad, var, scale, seed_tensor(), view, F32, torch.finfo(F32).max, "neuron", 0, 0, 0,
        needs_var=True, needs_bias=True, needs_alpha=True,
    )  # fmt: skip
    grad_var, grad_bias, grad_alpha = backward()
    torch.testing.assert_close(grad_bias, grad.double().sum([0, 2, 3]).float())
    torch.testing.assert_close(grad_alpha, (grad_var.double() * var.double()).sum([0, 2, 3]).float())
    for first, second in zip((grad_var, grad_bias, grad_alpha), backward(), strict=True):
        assert torch.equal(first, second)


def test_lrt_conv_empty():
    case = ((0, 4, 7, 6), *TWO[1:])
    inputs = conv_inputs("weight", case)
    rest = (seed_tensor(), "weight", *case[2])
    y, var = lrt_conv_triton.lrt_conv_triton(*to_device(inputs), *rest)
    torch.testing.assert_close((y, var), lrt_conv.lrt_conv_reference(*to_device(inputs), *rest))
    rest = (True, var, *rest[:2], [True] * 4, *rest[2:])
    grads = lrt_conv_triton.lrt_conv_backward_triton(y, *to_device(inputs[:3]), *rest)
    torch.testing.assert_close(grads, lrt_conv.lrt_conv_backward_reference(y, *to_device(inputs[:3]), *rest))


def test_lrt_conv_fp64_is_the_reference():
    inputs = double(conv_inputs("neuron", TWO))
    rest = (seed_tensor(), "neuron", *TWO[2])
    y, var = lrt_conv_triton.lrt_conv_triton(*to_device(inputs), *rest)
    torch.testing.assert_close((y, var), lrt_conv.lrt_conv_reference(*to_device(inputs), *rest))
    assert y.dtype == F64


# ---- lrt_sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_lrt_sample_of_channels(place):
    """Rows of channel shards, forward and backward, also where a column offset starts inside a quad."""
    seed, place = torch.tensor(7), (*place, 3, 11)
    for dtype, var_dtype in DTYPES:
        inputs = torch.randn(6, 70).to(dtype), torch.rand(6, 70).to(var_dtype)
        y = lrt_sample_triton.lrt_sample_triton(*to_device(inputs), seed.to(DEVICE), *place)
        eager, exact = (lrt_sample_reference(*t, seed, *place) for t in (inputs, double(inputs)))
        assert_as_good_as_eager(y.cpu(), eager, exact)
        grad_var = lrt_sample_triton.lrt_sample_backward_triton(*to_device(inputs), seed.to(DEVICE), *place)
        eager, exact = (lrt_sample_backward_reference(*t, seed, *place) for t in (inputs, double(inputs)))
        assert_as_good_as_eager(grad_var.cpu(), eager, exact)


def test_lrt_sample_of_channels_draws_the_noise():
    y = lrt_sample_triton.lrt_sample_triton(
        torch.zeros(6, 70, device=DEVICE), torch.ones(6, 70, device=DEVICE), seed_tensor(), 5, 2, 1, 3, 11
    )
    noise = philox_normal_reference(seed_tensor().cpu(), 30, 70, 0, 2, 1, F32)
    assert torch.equal(y.cpu(), noise[[5, 6, 7, 16, 17, 18]])


# ---- tiles and dispatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 64, 100, 1000])
@pytest.mark.parametrize("positions", [1, 4, 49, 3136])
def test_tiles(channels, positions):
    """A tile has 1024 elements where there are as many, and 64 neighbours in memory where there are."""
    for memory_format in ("contiguous", "channels_last"):
        view = lrt_sample_triton.View(2, channels, positions, memory_format, channels)
        tiles = view.tiles(0, 4)
        height, width = tiles["BLOCK_M"], tiles["BLOCK_N"]
        assert width % 4 == 0 and height * width <= 1024
        neighbours, size = (width, positions) if memory_format == "contiguous" else (height, channels)
        assert neighbours >= min(size, 64)
        assert height * width == 1024 or (height >= channels and width >= positions)


def test_kernels_are_attached():
    for op in ("lrt_conv", "lrt_conv_backward"):
        assert lsf.kernel_for(op, "cuda") == "Triton"


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_operator_on_a_gpu(parameterization, channels_last):
    """The operator's fakes have the strides of what the library's convolutions return, in both memory formats."""
    for dtypes in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)):
        inputs = to_device(conv_inputs(parameterization, TWO, *dtypes, channels_last))
        inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
        arguments = (*inputs, seed_tensor(), parameterization, *TWO[2], *PLACE)
        torch.library.opcheck(torch.ops.losssurf_fast.lrt_conv.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_lrt_conv_in_a_cuda_graph(channels_last):
    """Forward and backward can be captured, and a replay draws with the seed that is in memory then."""
    case = ((4, 16, 9, 7), (32, 16, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    inputs = [t.cuda().requires_grad_() for t in conv_inputs("additive", case, BF16, BF16, channels_last)]
    seed = torch.tensor(1, device="cuda")

    def step():
        y = lsf.ops.lrt_conv2d(*inputs, padding=1, parameterization="additive", seed=seed)
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
