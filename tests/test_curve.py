"""Coefficients of curves, and the weights on them: the kernels against their reference, bit for bit, and gradients."""

import itertools
import math

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, assert_as_good_as_eager, instruction_set
from torch.autograd import gradcheck

from losssurf_fast.ops.curve import (
    KINDS,
    curve_coefficients,
    curve_weights,
    curve_weights_backward_reference,
    curve_weights_reference,
)

DTYPES = (F64, F32, BF16, F16)
SHAPES = ((), (1,), (7,), (17, 63), (0, 3), (4096,), (3, 2731), (2, 3, 5, 7))
OP = torch.ops.losssurf_fast


def bends_of(dtype, num_bends=3, shapes=SHAPES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=draw).to(dtype) for shape in shapes] for _ in range(num_bends)]


def flat(lists):
    return list(itertools.chain(*lists))


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- coefficients ---------------------------------------------------------------------------------------------------


def test_coefficients_of_three_bends_are_those_of_the_talk():
    for t in torch.linspace(0, 1, 21, dtype=F64):
        bezier = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
        torch.testing.assert_close(curve_coefficients(t, 3), bezier)
        # phi(t) = 2 (t theta + (0.5 - t) w1) up to t = 0.5, 2 ((t - 0.5) w2 + (1 - t) theta) from there on
        chain = [1 - 2 * t, 2 * t, 0 * t] if t <= 0.5 else [0 * t, 2 * (1 - t), 2 * t - 1]
        torch.testing.assert_close(curve_coefficients(t, 3, "polychain"), torch.stack(chain))


@pytest.mark.parametrize("num_bends", range(2, 10))
def test_coefficients_equal_the_closed_forms_and_sum_to_one(num_bends):
    t, last = torch.linspace(0, 1, 61, dtype=F64), num_bends - 1
    bezier = [math.comb(last, j) * t**j * (1 - t) ** (last - j) for j in range(num_bends)]
    chain = [(1 - (t * last - j).abs()).clamp(min=0) for j in range(num_bends)]
    for kind, expected in (("bezier", bezier), ("polychain", chain)):
        c = curve_coefficients(t, num_bends, kind)
        assert c.shape == (61, num_bends) and c.dtype == F64
        torch.testing.assert_close(c, torch.stack(expected, -1), rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(c.sum(-1), torch.ones(61, dtype=F64))
        ends = torch.eye(num_bends, dtype=F64)[[0, -1]]
        assert torch.equal(c[[0, -1]], ends)  # the end networks themselves, not nearly
    assert (curve_coefficients(t, num_bends, "polychain") != 0).sum(-1).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_take_any_shape_of_t(kind):
    t = torch.rand(2, 3, dtype=F64)
    c = curve_coefficients(t, 4, kind)
    assert c.shape == (2, 3, 4)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(c[i, j], curve_coefficients(t[i, j], 4, kind))
    assert curve_coefficients(t[:0], 4, kind).shape == (0, 3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_have_the_dtype_of_t_but_no_less_than_float32(kind):
    for t, dtype in ((0.3, F32), (1, F32), (torch.tensor(0.3), F32), (torch.tensor(0.3, dtype=F64), F64)):
        assert curve_coefficients(t, 3, kind).dtype == dtype
    for dtype in (BF16, F16):
        t = torch.tensor(0.3, dtype=dtype)
        c = curve_coefficients(t, 3, kind)
        assert c.dtype == F32 and torch.equal(c, curve_coefficients(t.float(), 3, kind))


@pytest.mark.parametrize("num_bends", (2, 3, 5))
def test_coefficients_have_the_right_derivatives_also_at_the_ends(num_bends):
    last = num_bends - 1
    coefficients = lambda t: curve_coefficients(t, num_bends)
    for place in (0.0, 0.3, 0.5, 1.0):
        t = torch.tensor(place, dtype=F64)
        below = torch.nn.functional.pad(curve_coefficients(t, last) if last > 1 else torch.ones(1, dtype=F64), (1, 1))
        first = last * (below[:-1] - below[1:])  # dB_j^n = n (B_(j-1)^(n-1) - B_j^(n-1))
        torch.testing.assert_close(torch.autograd.functional.jacobian(coefficients, t), first)
    # second derivative at 0: n (n - 1) of the differences (1, -2, 1) of the first three bends
    t = torch.zeros((), dtype=F64, requires_grad=True)
    second = [torch.autograd.functional.hessian(lambda t, j=j: coefficients(t)[j], t) for j in range(num_bends)]
    expected = (last * (last - 1) * torch.tensor([1.0, -2.0, 1.0], dtype=F64)).tolist() + num_bends * [0.0]
    assert [s.item() for s in second] == expected[:num_bends]


def test_derivative_of_a_chain_is_that_of_the_segment_after_a_bend():
    chain = lambda t: curve_coefficients(t, 4, "polychain")
    for place, segment in ((0.0, 0), (0.1, 0), (1 / 3, 1), (0.5, 1), (0.9, 2), (1.0, 2)):
        expected = torch.zeros(4, dtype=F64)
        expected[segment], expected[segment + 1] = -3, 3
        t = torch.tensor(place, dtype=F64)
        assert torch.equal(torch.autograd.functional.jacobian(chain, t), expected)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("num_bends", (1, 2, 3, 5, 9))
def test_curve_weights_equals_reference_bit_for_bit(name, num_bends):
    with instruction_set(name) as available:
        if not available:
            pytest.skip(f"this CPU lacks {name}")
        for dtype, c_dtype in itertools.product(DTYPES, (F32, F64)):
            bends = bends_of(dtype, num_bends)
            c = torch.randn(num_bends, dtype=c_dtype)
            assert_equal(curve_weights(bends, c), curve_weights_reference(flat(bends), c))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_curve_weights_backward_equals_reference(name, dtype):
    with instruction_set(name) as available:
        if not available:
            pytest.skip(f"this CPU lacks {name}")
        bends, grads, c = flat(bends_of(dtype, 4)), bends_of(dtype, 1, seed=1)[0], torch.randn(4)
        needed = [i % 3 != 1 for i in range(len(bends))]
        *expected, products = curve_weights_backward_reference(grads, bends, c, needed, True)
        *actual, sums = OP.curve_weights_backward(grads, bends, c, needed, True)
        assert_equal(actual, expected)
        torch.testing.assert_close(sums, products, rtol=1e-5, atol=1e-3)
        assert_equal(OP.curve_weights_backward(grads, [], c, needed, False), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_past_the_caches_are_the_same(dtype):
    """Outputs of 16 MiB and more are written by other instructions."""
    shapes = [((16 << 20) // dtype.itemsize + 3,), (13,), (5, 7)]
    bends, c = bends_of(dtype, 3, shapes), curve_coefficients(0.3, 3)
    bends[1] = [b.requires_grad_() for b in bends[1]]
    weights = curve_weights(bends, c)
    assert_equal([w.detach() for w in weights], curve_weights_reference([b.detach() for b in flat(bends)], c))
    grads = bends_of(dtype, 1, shapes, seed=1)[0]
    torch.autograd.backward(weights, grads)
    needed = [b.requires_grad for b in flat(bends)]
    assert_equal([b.grad for b in bends[1]], curve_weights_backward_reference(grads, [], c, needed, False))


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("kind", KINDS)
def test_curve_weights_and_every_gradient_are_as_good_as_eager(dtype, kind):
    shapes = [(33, 129), (4099,), (2, 3, 5, 7), ()]
    grads = bends_of(dtype, 1, shapes, seed=1)[0]

    def run(function, dtype, c_dtype):
        bends = [[b.to(dtype).requires_grad_() for b in bend] for bend in bends_of(grads[0].dtype, 4, shapes)]
        t = torch.tensor(0.4, dtype=F32).to(c_dtype).requires_grad_()
        weights = function(bends, curve_coefficients(t, 4, kind))
        torch.autograd.backward(weights, [g.to(dtype) for g in grads])
        return [*weights, *[b.grad for b in flat(bends)], t.grad]

    def layer_by_layer(bends, c):
        columns = zip(*bends, strict=True)
        return [sum(c_j.to(w.dtype) * w for c_j, w in zip(c.unbind(), ws, strict=True)) for ws in columns]

    exact = run(layer_by_layer, F64, F64)
    for ours, eager, right in zip(run(curve_weights, dtype, F32), run(layer_by_layer, dtype, F32), exact, strict=True):
        assert_as_good_as_eager(ours, eager, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bend_of_coefficient_zero_is_not_read(dtype):
    bends = bends_of(dtype, 4)
    expected = curve_weights_reference(flat(bends[1:3]), torch.tensor([0.25, 0.75]))
    for j in (0, 3):
        bends[j] = [torch.full_like(b, float("nan")) for b in bends[j]]
    assert_equal(curve_weights(bends, torch.tensor([0.0, 0.25, 0.75, 0.0])), expected)
    assert_equal(curve_weights(bends, torch.zeros(4)), [torch.zeros_like(b) for b in bends[0]])
    for c in (torch.tensor([0.0, 0.25, 0.75, 0.0]), torch.zeros(4)):
        assert_equal(curve_weights_reference(flat(bends), c), curve_weights(bends, c))


def test_a_coefficient_is_zero_where_its_sum_rounds_it_to_zero():
    """1e-60 is 0 in fp32 sums, not in those of fp64 beside them."""
    columns = [[torch.ones(3, dtype=dtype) for dtype in DTYPES] for _ in range(2)]
    columns[1] = [torch.full_like(w, float("inf")) for w in columns[1]]
    c = torch.tensor([1.0, 1e-60], dtype=F64)
    for wide, *others in (curve_weights(columns, c), curve_weights_reference(flat(columns), c)):
        assert wide.isinf().all()
        assert_equal(others, columns[0][1:])


def test_the_reference_has_the_gradient_of_a_coefficient_of_zero():
    bends, c = flat(bends_of(F64, 3, [(7,), (3, 5)])), torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    assert gradcheck(lambda c: tuple(curve_weights_reference(bends, c)), [c.requires_grad_()])


def test_the_ends_of_a_curve_are_its_end_networks():
    for kind, dtype in itertools.product(KINDS, DTYPES):
        bends = bends_of(dtype, 3)
        assert_equal(curve_weights(bends, curve_coefficients(0.0, 3, kind)), bends[0])
        assert_equal(curve_weights(bends, curve_coefficients(1.0, 3, kind)), bends[2])


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_result_does_not_depend_on_threads(threads):
    bends, grads = flat(bends_of(F32, 3, [(100_003,), (77,)])), bends_of(F32, 1, [(100_003,), (77,)], seed=1)[0]
    c, needed = curve_coefficients(0.3, 3), [True] * 6
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = OP.curve_weights(bends, c), OP.curve_weights_backward(grads, bends, c, needed, True)
        torch.set_num_threads(threads)
        actual = OP.curve_weights(bends, c), OP.curve_weights_backward(grads, bends, c, needed, True)
    finally:
        torch.set_num_threads(before)
    assert_equal(flat(actual), flat(expected))


def test_gradients_of_coefficients_have_the_same_bits_on_every_instruction_set():
    bends, grads = flat(bends_of(BF16, 3, [(10_007,)])), bends_of(BF16, 1, [(10_007,)], seed=1)[0]
    sums = []
    for name in INSTRUCTION_SETS:
        with instruction_set(name) as available:
            if available:
                sums.append(OP.curve_weights_backward(grads, bends, torch.ones(3), [False] * 3, True)[0])
    assert_equal(sums, sums[:1] * len(sums))


def test_gradients_of_coefficients_do_not_lose_small_shares_of_a_large_sum():
    """2^25 shares of 1 in fp32 alone would stop at 2^24."""
    one = torch.ones(1).expand(2**13, 2**12)
    (sums,) = OP.curve_weights_backward([one, one], [one, one], torch.ones(1), [False, False], True)
    assert sums.item() == 2**26


def test_memory_order_does_not_matter_and_is_that_of_the_first_bend():
    image = torch.randn(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    for first, second in (
        (last, torch.randn(2, 3, 4, 5)),
        (last, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        (image, last),
        (image.permute(3, 1, 0, 2), torch.randn(5, 3, 2, 4)),
        (torch.randn(6, 9)[:, 2:7], torch.randn(5, 6).t()),
        (torch.randn(6, 9)[::2, ::3], torch.randn(3).expand(3, 3)),
        (torch.randn(1).expand(4), torch.randn(4)),
        (torch.randn(1, 3, 1, 1).to(memory_format=torch.channels_last), torch.randn(1, 3, 1, 1)),
    ):
        c = torch.tensor([0.3, 0.7], requires_grad=True)
        leaves = [first.detach().requires_grad_(), second.detach().requires_grad_()]
        (weight,) = curve_weights([leaves[:1], leaves[1:]], c)
        assert weight.stride() == torch.empty_like(first).stride()
        assert_equal([weight.detach()], curve_weights_reference([first, second], c.detach()))
        for grad in (
            torch.randn_like(weight),
            torch.randn(()).expand_as(weight),
            torch.randn(*weight.shape, 2)[..., 0],
        ):
            *found, sums = torch.autograd.grad(weight, [*leaves, c], grad, retain_graph=True)
            expected = curve_weights_backward_reference([grad], [first, second], c.detach(), [True, True], True)
            assert_equal(found, expected[:2])
            torch.testing.assert_close(sums, expected[2])


def test_many_uneven_tensors_leave_their_neighbours_alone():
    shapes = [(i * 37 % 5000,) for i in range(400)] + [(3 << 20,), (5 << 20,), (7,)]  # some of which share a block
    bends = bends_of(BF16, 2, shapes)
    weights = curve_weights(bends, torch.tensor([1.0, 0.0]))
    for i, weight in enumerate(weights):
        weight.fill_(i)
    for i, weight in enumerate(weights):
        assert (weight == torch.tensor(i).to(BF16)).all()


def test_mixed_dtypes_in_one_list():
    columns = [[torch.randn(5, 3).to(dtype) for dtype in DTYPES] for _ in range(3)]
    c = curve_coefficients(torch.tensor(0.3, dtype=F64), 3)
    assert_equal(curve_weights(columns, c), curve_weights_reference(flat(columns), c))


def test_not_finite_values_are_combined_as_they_are():
    nan, inf = float("nan"), float("inf")
    (weight,) = curve_weights([[torch.tensor([nan, inf, 1.0])], [torch.ones(3)]], torch.tensor([0.5, 0.5]))
    assert weight.isnan().tolist() == [True, False, False] and weight[1:].tolist() == [inf, 1.0]
    (weight,) = curve_weights([[torch.ones(3)], [torch.ones(3)]], torch.tensor([nan, 0.5]))
    assert weight.isnan().all()
