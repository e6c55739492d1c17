"""lrt_conv on the CPU: every instruction set, dtype and memory format against the reference."""

import itertools

import pytest
import torch
from common import (
    BF16,
    CHANNELS_LAST,
    F16,
    F32,
    F64,
    INSTRUCTION_SETS,
    assert_as_good_as_eager,
    double,
    instruction_set,
    lrt_conv_inputs,
    with_grad,
)

from losssurf_fast import ops
from losssurf_fast.ops import lrt, lrt_conv

DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]  # activations, parameters
OP = torch.ops.losssurf_fast

# x, weight, (stride, padding, dilation, transposed, output_padding, groups)
ONE = ((3, 3, 33), (5, 3, 3), ([2], [1], [1], False, [0], 1))
TWO = ((2, 4, 9, 8), (6, 2, 3, 2), ([1, 2], [1, 0], [2, 1], False, [0, 0], 2))
THREE = ((2, 2, 4, 3, 7), (3, 2, 2, 2, 2), ([1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1))
TRANSPOSED = ((3, 4, 5, 4), (4, 3, 3, 3), ([2, 2], [1, 1], [1, 1], True, [1, 0], 2))
DEPTHWISE = ((2, 5, 6, 7), (5, 1, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 5))
POINTS = ((60, 4, 1, 1), (7, 4, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
EMPTY = ((0, 4, 5, 5), (6, 4, 3, 3), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
CASES = (ONE, TWO, THREE, TRANSPOSED, DEPTHWISE, POINTS, EMPTY)
# Several tiles along each axis: planes longer than a tile, more channels than a strip of columns.
LONG = ((2, 1, 51, 47), (3, 1, 2, 2), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
WIDE = ((2, 3, 7, 5), (530, 3, 2, 2), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1))
MULTIPLICATIVE = ("layer", "neuron", "weight")
PLACE = (2**32 - 3, 531, 2**32 - 1)  # row offset, channels of the whole layer, sample


def same_order(t, like) -> bool:
    """Whether elements follow each other in memory as those of ``like``."""
    return all(a == b for a, b, n in zip(t.stride(), like.stride(), t.shape, strict=True) if n != 1 and t.numel())


def formats(case):
    """Whether channels_last."""
    return (False, True) if len(case[0]) in CHANNELS_LAST else (False,)


def all_cases():
    for case, dtypes in itertools.product(CASES, DTYPES):
        for channels_last in formats(case):
            yield case, dtypes, channels_last
    for case, channels_last in itertools.product((LONG, WIDE), (False, True)):
        yield case, (F32, F32), channels_last


# ---- forward and backward against the reference --------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_lrt_conv_forward_and_backward(parameterization, isa):
    """As good as eager, forward and every gradient, in the memory formats that eager has."""
    seed = torch.tensor(5)
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        for case, dtypes, channels_last in all_cases():
            if isa != "avx512" and dtypes[0] == F64:
                continue  # plain torch in every set
            inputs = lrt_conv_inputs(parameterization, case, *dtypes, channels_last)
            place = (seed, parameterization, *case[2], *PLACE)
            exact_y, exact_var = lrt_conv.lrt_conv_reference(*double(inputs), *place)
            eager_y, eager_var = lrt_conv.lrt_conv_reference(*inputs, *place)
            y, var = OP.lrt_conv(*inputs, *place)
            assert_as_good_as_eager(y, eager_y, exact_y)
            assert_as_good_as_eager(var, eager_var, exact_var)
            assert same_order(y, eager_y) and same_order(var, eager_var)

            grad = torch.randn(y.shape).to(dtypes[0])
            rest = (parameterization, [t is not None for t in inputs], *case[2], *PLACE)
            backward = lrt_conv.lrt_conv_backward_reference
            grads = OP.lrt_conv_backward(grad, *inputs[:3], True, var, seed, *rest)
            eager = backward(grad, *inputs[:3], True, eager_var, seed, *rest)
            exact = backward(grad.double(), *double(inputs[:3]), True, exact_var, seed, *rest)
            for i, (actual, like) in enumerate(zip(grads, inputs, strict=True)):
                assert like is None or i == 3 or (actual.dtype == like.dtype and same_order(actual, like))
                if i != 2 or parameterization not in MULTIPLICATIVE:  # long sums, tested over many draws below
                    assert_as_good_as_eager(actual, eager[i], exact[i])


@pytest.mark.parametrize("parameterization", MULTIPLICATIVE)
def test_lrt_conv_alpha_gradient_error(parameterization):
    """The numbers d log_alpha are long sums: their error over 40 draws is at most twice eager's."""
    errors = []
    for draw, channels_last in itertools.product(range(20), (False, True)):
        case = ((8, 4, 12, 12), *TWO[1:])
        inputs = lrt_conv_inputs(parameterization, case, channels_last=channels_last, seed=draw)
        place = (parameterization, *TWO[2])
        seed, needed = torch.tensor(draw), [False, False, True, False]
        var = OP.lrt_conv(*inputs, seed, *place)[1]
        exact_var = lrt_conv.lrt_conv_reference(*double(inputs), seed, *place)[1]
        grad, rest = torch.randn(var.shape), (parameterization, needed, *TWO[2])
        backward = lrt_conv.lrt_conv_backward_reference
        ours = OP.lrt_conv_backward(grad, *inputs[:3], True, var, seed, *rest)[2]
        eager = backward(grad, *inputs[:3], True, var, seed, *rest)[2]
        exact = backward(grad.double(), *double(inputs[:3]), True, exact_var, seed, *rest)[2]
        errors.append((ours - exact, eager - exact))
    ours, eager = (torch.cat(e).square().mean().sqrt() for e in zip(*errors, strict=True))
    assert ours <= 2 * eager


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_backward_reference_is_the_gradient(parameterization):
    """The written-out backward reference equals autograd of the forward reference in float64."""
    for case in (ONE, TWO, TRANSPOSED):
        inputs = with_grad(lrt_conv_inputs(parameterization, case, F64))
        seed, rest = torch.tensor(5), (*case[2], 3, 8, 1)
        y, var = lrt_conv.lrt_conv_reference(*inputs, seed, parameterization, *rest)
        grad = torch.randn_like(y)
        needed = [t is not None for t in inputs]
        expected = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], grad))
        actual = lrt_conv.lrt_conv_backward_reference(
            grad, *inputs[:3], True, var, seed, parameterization, needed, *rest
        )
        for got, need in zip(actual, needed, strict=True):
            if need:
                torch.testing.assert_close(got, next(expected))


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_gradcheck(parameterization):
    small = ((2, 2, 4, 3), (2, 2, 2, 2), ([1, 2], [1, 0], [1, 1], False, [0, 0], 1))
    turned = ((2, 2, 2, 2), (2, 1, 2, 2), ([2, 1], [0, 0], [1, 1], True, [1, 0], 2))
    for case, channels_last in ((small, False), (small, True), (turned, False)):
        inputs = with_grad(lrt_conv_inputs(parameterization, case, F64, channels_last=channels_last))
        present = [t for t in inputs if t is not None]

        def layer(*tensors, inputs=inputs, geometry=case[2]):
            tensors = iter(tensors)
            x, weight, scale, bias = (t if t is None else next(tensors) for t in inputs)
            return OP.lrt_conv(x, weight, scale, bias, torch.tensor(3), parameterization, *geometry, 1, 5, 2)[0]

        assert torch.autograd.gradcheck(layer, present, fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, present, fast_mode=True)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_every_subset_of_gradients(parameterization):
    """A gradient does not depend on which others are asked for: parameters may be frozen, x may be data."""
    inputs = lrt_conv_inputs(parameterization, TWO)
    present = [i for i, t in enumerate(inputs) if t is not None]

    def grads(wanted):
        tensors = [t if i not in wanted else t.detach().clone().requires_grad_() for i, t in enumerate(inputs)]
        y, _ = OP.lrt_conv(*tensors, torch.tensor(7), parameterization, *TWO[2])
        return dict(zip(wanted, torch.autograd.grad(y.sum(), [tensors[i] for i in wanted]), strict=True))

    everything = grads(present)
    for size in range(1, len(present)):
        for wanted in itertools.combinations(present, size):
            for i, grad in grads(wanted).items():
                torch.testing.assert_close(grad, everything[i])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lrt_conv_backward_in_parts(dtype, channels_last):
    """The variance gradient of a large output (20 MiB in fp32) is made in parts: the sum of its shards."""
    case = ((23, 2, 160, 160), (9 if dtype == F32 else 18, 2, 1, 1), POINTS[2])
    x, weight, scale, _ = lrt_conv_inputs("neuron", case, dtype, F32, channels_last)
    outputs, place = weight.shape[0], (torch.tensor(3), "neuron", [True] * 4, *POINTS[2])
    var, grad = (torch.randn(23, outputs, 160, 160).to(dtype) for _ in range(2))
    call = lambda n, row_offset: OP.lrt_conv_backward(
        grad[n], x[n], weight, scale, True, var[n].abs(), *place, row_offset
    )
    whole = call(slice(0, 23), 0)
    shards = [call(slice(i, i + 8), outputs * i) for i in (0, 8, 16)]
    tolerance = 2e-2 if dtype == BF16 else 1e-5  # of the largest: bf16 products are rounded in every shard
    assert torch.equal(whole[0], torch.cat([s[0] for s in shards]))
    for i in (1, 2, 3):
        atol = tolerance * whole[i].abs().max().item()
        torch.testing.assert_close(whole[i], sum(s[i] for s in shards), rtol=0, atol=atol)


def test_lrt_conv_computes_needed_gradients_alone():
    """Where x needs no gradient, as in a network's first layer, no convolution computes one."""

    class Masks(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OP.lrt_conv_backward.default:
                seen.append(args[8])
            return func(*args, **(kwargs or {}))

    x, weight, scale, bias = lrt_conv_inputs("additive", TWO)
    for frozen in itertools.product((False, True), repeat=4):
        seen = []
        tensors = [t.clone().requires_grad_(not f) for t, f in zip((x, weight, scale, bias), frozen, strict=True)]
        if all(frozen):
            continue
        with Masks():
            OP.lrt_conv(*tensors, torch.tensor(7), "additive", *TWO[2])[0].sum().backward()
        assert seen == [[not f for f in frozen]]
        for tensor, f in zip(tensors, frozen, strict=True):
            assert (tensor.grad is None) == f


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_opcheck(parameterization):
    for case, channels_last, grad in (
        (TWO, False, True),
        (TWO, True, True),
        (TRANSPOSED, True, False),
        (THREE, True, False),
    ):
        inputs = lrt_conv_inputs(parameterization, case, channels_last=channels_last)
        inputs = with_grad(inputs) if grad else inputs
        torch.library.opcheck(OP.lrt_conv, (*inputs, torch.tensor(3), parameterization, *case[2], 1, 7, 3))


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F32)])
def test_lrt_conv_opcheck_half(dtypes):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for channels_last in (False, True):
        inputs = lrt_conv_inputs("additive", TWO, *dtypes, channels_last)
        arguments = (*inputs, torch.tensor(3), "additive", *TWO[2])
        torch.library.opcheck(OP.lrt_conv, arguments, test_utils=tests)


def test_lrt_conv_backward_opcheck():
    """Also where only some gradients are needed: what is not needed comes as empty tensors that share no memory."""
    x, weight, scale, bias = lrt_conv_inputs("neuron", TWO, channels_last=True)
    _, var = OP.lrt_conv(x, weight, scale, bias, torch.tensor(3), "neuron", *TWO[2])
    for needed in itertools.product((False, True), repeat=4):
        arguments = (torch.randn(var.shape), x, weight, scale, True, var, torch.tensor(3), "neuron", list(needed))
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(OP.lrt_conv_backward, (*arguments, *TWO[2]), test_utils=tests)


def test_lrt_conv_operators_refuse_what_their_pointers_cannot_take():
    """Called past the public functions, the C++ kernels still read nothing out of bounds."""
    x, weight, scale, bias = lrt_conv_inputs("additive", TWO)
    seed, geometry = torch.tensor(3), TWO[2]
    with pytest.raises(ValueError, match=r"lrt_conv: bias must be \[6\]"):
        OP.lrt_conv(x, weight, scale, bias[:1], seed, "additive", *geometry)
    with pytest.raises(ValueError, match="lrt_conv: scale must have 72 elements"):
        OP.lrt_conv(x, weight, scale[:2], bias, seed, "additive", *geometry)
    with pytest.raises(ValueError, match="lrt_conv: weight is missing"):
        OP.lrt_conv(x, None, scale, bias, seed, "additive", *geometry)
    with pytest.raises(ValueError, match="lrt_conv: channels_total must be at least 6, got 5"):
        OP.lrt_conv(x, weight, scale, bias, seed, "additive", *geometry, 0, 5)
    var = OP.lrt_conv(x, weight, scale, bias, seed, "additive", *geometry)[1]
    with pytest.raises(ValueError, match="lrt_conv_backward: grad must have var's shape"):
        OP.lrt_conv_backward(var[:1], x, weight, scale, True, var, seed, "additive", [True] * 4, *geometry)


# ---- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", [ONE, TWO, THREE, POINTS, LONG, WIDE])
def test_lrt_conv_noise_is_philox_normal(case, isa):
    """With variance 1 and mean 0, y is the contract's noise bit for bit, in both memory formats, and backward's too."""
    (batch, channels, *sizes), weight_shape, _ = case
    outputs, total, first = weight_shape[0], 531, 2**32 - 3
    geometry = ([1] * len(sizes), [0] * len(sizes), [1] * len(sizes), False, [0] * len(sizes), 1)
    positions = torch.Size(sizes).numel()
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        eps = ops.philox_normal((batch * total, positions), 4, row_offset=first, sample=6)
        eps = eps.view(batch, total, *sizes)[:, :outputs]
        for channels_last in formats(case):
            x, scale = torch.ones(batch, 1, *sizes), torch.zeros(outputs, 1, *[1] * len(sizes))
            if channels_last:
                x = x.repeat(1, 2, *[1] * len(sizes)).mul(0.5**0.5)
                x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
                scale = scale.repeat(1, 2, *[1] * len(sizes))
            y, var = OP.lrt_conv(x, None, scale, None, torch.tensor(4), "variance", *geometry, first, total, 6)
            # Where the library's sum of squares is 1 up to rounding, the noise is found by dividing it out.
            torch.testing.assert_close(y, eps * var.sqrt(), rtol=1e-6, atol=1e-7)
            if not channels_last:
                assert torch.equal(var, torch.ones_like(var)) and torch.equal(y, eps)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_lrt_conv_formats_draw_the_same_bits(isa):
    """The noise of channels_last outputs equals that of contiguous ones bit for bit, forward and backward."""
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        for batch, channels, height, width in (
            (2, 50, 8, 8),
            (3, 5, 7, 9),
            (1, 530, 5, 3),
            (2, 3, 50, 41),
            (5, 64, 1, 2),
        ):
            x = torch.zeros(
                batch, channels, height, width
            )  # mean 0 and var 0: y = sqrt(1e-16) eps exactly in any format
            eye = torch.zeros(channels, channels, 1, 1)
            geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            found = []
            for memory_format in (torch.contiguous_format, torch.channels_last):
                inputs = (x.contiguous(memory_format=memory_format), None, eye, torch.ones(channels))
                y, var = OP.lrt_conv(*inputs, torch.tensor(4), "variance", *geometry, 7)
                assert (var == 0).all() and y.is_contiguous(memory_format=memory_format)
                y = OP.lrt_conv(*inputs[:3], None, torch.tensor(4), "variance", *geometry, 7)[0]
                dx = OP.lrt_conv_backward(
                    torch.ones_like(y), *inputs[:3], True, var, torch.tensor(4), "variance",
                    [False, False, False, True], *geometry, 7,
                )  # fmt: skip
                found.append((y, dx[3]))
            assert torch.equal(found[0][0], found[1][0]) and found[0][0].abs().max() > 0
            eps = ops.philox_normal((batch * channels, height * width), 4, row_offset=7).view_as(y)
            torch.testing.assert_close(found[0][0], eps * 1e-8, rtol=1e-6, atol=0)
            torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_lrt_conv_shards_draw_the_noise_of_the_whole(channels_last):
    x, weight, scale, bias = lrt_conv_inputs("additive", ((6, 3, 5, 7), (9, 3, 2, 2), TWO[2]), F64, None, channels_last)
    call = lambda x, c, row_offset, total: OP.lrt_conv(
        x, weight[c], scale[c], bias[c], torch.tensor(1), "additive", *POINTS[2], row_offset, total
    )[0]
    whole = call(x, slice(None), 0, 0)
    batches = [call(x[i : i + 2], slice(None), 9 * i, 0) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(batches), whole)
    shards = [call(x, c, c.start, 9) for c in (slice(0, 4), slice(4, 5), slice(5, 9))]
    torch.testing.assert_close(torch.cat(shards, dim=1), whole)
    both = call(x[4:], slice(5, 9), 9 * 4 + 5, 9)
    torch.testing.assert_close(both, whole[4:, 5:])
    public = ops.lrt_conv2d(
        x[4:], weight[5:], scale[5:], bias[5:], parameterization="additive", seed=1, row_offset=9 * 4,
        channels_total=9, channel_offset=5,
    )  # fmt: skip
    torch.testing.assert_close(public, whole[4:, 5:])


@pytest.mark.parametrize("channels_last", [False, True])
def test_lrt_conv_same_bits_for_any_number_of_threads(channels_last):
    threads = torch.get_num_threads()
    x, weight, scale, bias = lrt_conv_inputs("neuron", ((6, 4, 40, 30), *TWO[1:]), channels_last=channels_last)
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            mean, var = OP.lrt_conv(x, weight, scale, bias, torch.tensor(1), "neuron", *TWO[2])
            needed = [False, False, True, True]
            grads = OP.lrt_conv_backward(
                mean, x, weight, scale, True, torch.ones_like(var), torch.tensor(1), "neuron", needed, *TWO[2]
            )
            results.append(grads[2:])
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)
