"""Block floating point: kernels against the reference bit for bit, hand-computed values, statistics, refusals."""

import itertools
import math

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, instruction_set

import losssurf_fast as lsf
from losssurf_fast import ops
from losssurf_fast.ops.block_float import block_float_dequantize_reference, block_float_quantize_reference

OP = torch.ops.losssurf_fast
TINY, HUGE = 2.0**-149, torch.finfo(F32).max


def hostile():
    """Rows whose exponents are the smallest, the largest, shared by signs, absent, and lost."""
    x = torch.randn(12, 300) * 2.0 ** torch.randint(-20, 20, (12, 300))
    x[0], x[1] = 0, torch.randint(-9, 9, (300,)) * TINY
    x[2], x[3] = HUGE * torch.linspace(-1, 1, 300), torch.tensor([1.0, -1, 0] * 100)
    x[4, 7], x[5, 299], x[6, 0] = math.nan, math.inf, -math.inf
    x[7, 1:] = TINY
    x[8] = -HUGE
    return x


def both(x, word_length, per_row, *rest):
    seed = torch.tensor(11)
    ours = OP.block_float_quantize(x, seed, word_length, per_row, *rest)
    theirs = block_float_quantize_reference(x, seed, word_length, per_row, *rest)
    values = OP.block_float_dequantize(*ours, word_length)
    return (*ours, values), (*theirs, block_float_dequantize_reference(*theirs, word_length))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_block_float_is_the_reference(name):
    with instruction_set(name):
        for word_length, per_row in itertools.product((2, 5, 8, 9, 16), (False, True)):
            assert_same(*both(hostile(), word_length, per_row, 2**40 + 3, 2**32 - 1, 5))
        for dtype, stochastic in itertools.product((F64, F32, BF16, F16), (True, False)):
            assert_same(*both(torch.randn(7, 1500).to(dtype), 8, True, 1, 2, 0, stochastic))
            assert_same(*both(torch.randn(5003).to(dtype), 8, False, 1, 7, 0, stochastic))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (1,), (5,), (2, 3, 4)], ids=str)
def test_block_float_shapes(shape):
    for word_length, per_row in itertools.product((4, 12), (False, True)):
        ours, theirs = both(torch.randn(shape), word_length, per_row)
        assert_same(ours, theirs)
        assert ours[0].shape == shape and ours[1].shape == (shape[:1] if per_row else ())
    assert ops.block_float(torch.tensor(1.3), 8).shape == ()


def test_block_float_by_hand():
    """W = 4, the largest is 5: e = 2, steps of 2^(2 - 4 + 2) = 1, mantissas -8 to 7."""
    x = torch.tensor([5.0, -5.0, 0.4, 0.6, -0.4, -0.5, 2.5, 0.0])
    mantissa, exponent = ops.block_float_quantize(x, 4, stochastic=False)
    assert exponent == 2 and mantissa.tolist() == [5, -5, 0, 1, 0, 0, 3, 0]
    x = torch.tensor([7.9, -7.9, 3.0])  # 7.9 rounds up out of the range, -8 is inside
    assert ops.block_float(x, 4, stochastic=False).tolist() == [7, -8, 3]
    rows = torch.tensor([[5.0, 0.6], [0.5, 0.06]])
    mantissa, exponent = ops.block_float_quantize(rows, 4, block="row", stochastic=False)
    assert exponent.tolist() == [2, -1] and mantissa.tolist() == [[5, 1], [4, 0]]
    assert ops.block_float_dequantize(mantissa, exponent, 4).tolist() == [[5, 1], [0.5, 0]]


def test_block_float_uses_the_words_of_the_contract():
    x = torch.full((9,), 1.0) + torch.rand(9) / 4
    counters = torch.tensor([[q, 7, 3, 5] for q in range(3)])
    u = (OP.philox_words(torch.tensor(2), counters).view(-1)[:9] >> 8).double() / 2**24
    expected = (x.double() * 2**4 + u).floor() / 2**4
    assert torch.equal(ops.block_float(x, 6, 2, row_offset=3 * 2**32 + 7, sample=5).double(), expected)


def test_block_float_rounds_parts_as_the_whole():
    x, place = torch.randn(9, 5003), {"row_offset": 3, "sample": 2}
    mantissa, exponent = ops.block_float_quantize(x, 8, 1, block="row", **place)
    value = ops.block_float(x, 8, 1, block="row", **place)
    for first, last in ((0, 4), (4, 9), (5, 6)):
        rows, col_offset = slice(first, last), first * x.shape[1]
        part = ops.block_float_quantize(x[rows], 8, 1, block="row", col_offset=col_offset, **place)
        assert_same(part, (mantissa[rows], exponent[rows]))
        assert torch.equal(ops.block_float(x[rows], 8, 1, block="row", col_offset=col_offset, **place), value[rows])
    assert not torch.equal(ops.block_float_quantize(x[4:], 8, 1, block="row", **place)[0], mantissa[4:])


@pytest.mark.parametrize("word_length", range(2, 17))
def test_block_float_keeps_what_is_representable(word_length):
    largest = 2 ** (word_length - 1) - 1
    mantissas = torch.randint(-largest, largest + 1, (4000,))
    mantissas[0] = largest
    for power in (-60, 0, 90):
        x = mantissas.float() * 2.0**power
        for seed in range(3):
            assert torch.equal(ops.block_float(x, word_length, seed), x)


def test_block_float_is_unbiased():
    """Mean over draws within 5 standard errors for every element; neighbours of a value are its only roundings."""
    x, count = torch.randn(300), 4000
    x[0] = 3.9  # nothing is clamped: mantissas stay under 2^6
    x.clamp_(-3, 3.9)
    step = 2.0 ** (1 - 8 + 2)
    draws = torch.stack([ops.block_float(x, 8, 5, sample=s) for s in range(count)]).double()
    part = (x.double() / step) % 1
    assert ((draws - x).abs() < step).all()
    error = (part * (1 - part) / count).sqrt() * step
    assert ((draws.mean(0) - x).abs() <= 5 * error + 1e-12).all()
    other = torch.stack([ops.block_float(x, 8, 5, row_offset=1, sample=s) for s in range(20)]).double()
    assert not torch.equal(other, draws[:20])


def test_block_float_of_numbers_that_are_not_finite():
    values = ops.block_float(hostile(), 8, 0, block="row")
    lost = torch.tensor([4, 5, 6])
    assert values[lost].isnan().all() and values.isnan().sum() == 3 * 300
    assert values.isinf().sum() == 0 and (values[0] == 0).all()
    assert ops.block_float(hostile(), 8, 0).isnan().all()


def test_block_float_does_not_depend_on_threads_layout_or_calls():
    x, before = torch.randn(60, 501), torch.get_num_threads()
    expected = ops.block_float_quantize(x, 8, 3, block="row")
    torch.set_num_threads(3)
    assert_same(ops.block_float_quantize(x, 8, 3, block="row"), expected)
    torch.set_num_threads(before)
    assert_same(ops.block_float_quantize(x.t().contiguous().t(), 8, 3, block="row"), expected)
    assert_same(ops.block_float_quantize(torch.stack((x, x), -1)[..., 1], 8, 3, block="row"), expected)
    torch.manual_seed(1)
    first, second = ops.block_float(x, 4), ops.block_float(x, 4)
    torch.manual_seed(1)
    assert torch.equal(ops.block_float(x, 4), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_block_float_dtypes(dtype):
    x = torch.randn(100).to(dtype)
    value = ops.block_float(x, 8, 0)
    assert value.dtype == dtype and torch.equal(value.float(), ops.block_float(x.float(), 8, 0))


@pytest.mark.parametrize("dtype, word_length", [(F16, 8), (F16, 16), (BF16, 12)], ids=str)
def test_block_float_of_a_dtypes_extremes_is_finite(dtype, word_length):
    limits = torch.finfo(dtype)
    x = torch.tensor([limits.min, limits.max], dtype=dtype)
    value = ops.block_float(x, word_length, 0)
    assert value.isfinite().all() and value[0] == limits.min
    assert torch.equal(torch.func.vmap(lambda t: ops.block_float(t, word_length, 0))(x[None])[0], value)
    assert ops.block_float(torch.tensor([limits.min, math.nan], dtype=dtype), word_length, 0).isnan().all()


# ---- ways of calling ------------------------------------------------------------------------------------------------


def test_block_float_gradient_passes_straight_through():
    x = torch.randn(40, requires_grad=True)
    value = ops.block_float(x, 4, 1)
    assert torch.equal(value, ops.block_float(x.detach(), 4, 1))
    grad = torch.randn(40)
    assert torch.equal(torch.autograd.grad(value, x, grad)[0], grad)
    assert not ops.block_float_quantize(x, 4, 1)[0].requires_grad
    with torch.no_grad():
        assert not ops.block_float(x, 4, 1).requires_grad


def test_block_float_transforms():
    x, tangent = torch.randn(5, 6), torch.randn(5, 6)
    rounded = lambda t: ops.block_float(t, 6, 1)
    assert torch.equal(torch.func.grad(lambda t: (tangent * rounded(t)).sum())(x), tangent)
    assert torch.equal(torch.func.vmap(rounded)(x), torch.stack([rounded(row) for row in x]))
    value, slope = torch.func.jvp(rounded, (x,), (tangent,))
    assert torch.equal(value, rounded(x)) and torch.equal(slope, tangent)


def test_block_float_compile():
    def step(x, seed):
        return 2 * ops.block_float(x, 8, seed, block="row")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 7, requires_grad=True)
    value, expected = compiled(x, torch.tensor(4)), step(x, torch.tensor(4))
    assert torch.equal(value, expected)
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.full((6, 7), 2.0))


def test_block_float_opcheck():
    for x, word_length, per_row in (
        (torch.randn(5, 3), 8, True),
        (torch.randn(()), 9, False),
        (torch.randn(0, 3), 2, True),
    ):
        seed = torch.tensor(1)
        torch.library.opcheck(OP.block_float_quantize, (x, seed, word_length, per_row, 3, 5, 4, True))
        parts = OP.block_float_quantize(x, seed, word_length, per_row)
        torch.library.opcheck(OP.block_float_dequantize, (*parts, word_length))


def test_block_float_kernel_for():
    for name in ("block_float_quantize", "block_float_dequantize"):
        assert lsf.kernel_for(name, "cpu").startswith("C++")
        assert lsf.kernel_for(name, "cuda").startswith("reference")


X, I8, E = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int8), torch.zeros((), dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda f: f(1.0, 8), TypeError, "x must be a tensor, got float"),
        (lambda f: f(X.int(), 8), TypeError, "x must have a floating dtype of .* got torch.int32"),
        (lambda f: f(X, 8.0), TypeError, "word_length must be an int, got float"),
        (lambda f: f(X, 1), ValueError, r"word_length must lie in \[2, 16\], got 1"),
        (lambda f: f(X, 17), ValueError, r"word_length must lie in \[2, 16\], got 17"),
        (lambda f: f(X, 8, block="column"), ValueError, 'block must be "tensor" or "row", got \'column\''),
        (lambda f: f(X, 8, stochastic=1), TypeError, "stochastic must be a bool, got int"),
        (lambda f: f(torch.tensor(1.0), 8, block="row"), ValueError, "x must have rows, got a 0-d tensor"),
        (lambda f: f(X, 8, "seed"), TypeError, "seed must be an int or a 0-d int64 tensor, got str"),
        (lambda f: f(X, 8, row_offset=-1), ValueError, "row_offset must lie in"),
        (lambda f: f(X, 8, col_offset=-1), ValueError, r"columns .* must lie in .* got col_offset -1"),
        (lambda f: f(X, 8, col_offset=2**34 - 5), ValueError, r"columns col_offset \+ \[0, 6\) must lie in"),
        (lambda f: f(X, 8, sample=2**32), ValueError, "sample must lie in"),
    ],
)  # fmt: skip
def test_block_float_bad_inputs(call, error, message):
    for function in (ops.block_float, ops.block_float_quantize):
        with pytest.raises(error, match=f"{function.__name__}: {message}"):
            call(function)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X, E, 8), TypeError, "mantissa must be torch.int8 for word_length 8, got torch.float32"),
        ((I8, E, 9), TypeError, "mantissa must be torch.int16 for word_length 9, got torch.int8"),
        ((I8, E.long(), 8), TypeError, "exponent must be torch.int32, got torch.int64"),
        ((I8, E.expand(3), 8), ValueError, r"exponent must be 0-d or .* got \(3,\) for \(2, 3\)"),
        ((I8, E.expand(2, 3), 8), ValueError, r"exponent must be 0-d or .* got \(2, 3\) for \(2, 3\)"),
        ((I8, E.to("meta"), 8), ValueError, "exponent must be on mantissa's cpu, got meta"),
        ((I8, E, 1), ValueError, r"word_length must lie in \[2, 16\], got 1"),
    ],
)
def test_block_float_dequantize_bad_inputs(arguments, error, message):
    for function in (ops.block_float_dequantize, OP.block_float_dequantize):
        with pytest.raises(error, match=f"block_float_dequantize: {message}"):
            function(*arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X.int(), E.long(), 8, False), TypeError, "x must have a floating dtype of .* got torch.int32"),
        ((X, E.long(), 1, False), ValueError, r"word_length must lie in \[2, 16\], got 1"),
        ((X.sum(), E.long(), 8, True), ValueError, "x must have rows, got a 0-d tensor"),
    ],
)
def test_block_float_operator_refuses_the_same(arguments, error, message):
    for function in (OP.block_float_quantize, block_float_quantize_reference):
        with pytest.raises(error, match=f"block_float_quantize: {message}"):
            function(*arguments)
