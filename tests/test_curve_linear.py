"""curve_linear on the CPU: every way it runs against the reference, its gradients, and what it refuses."""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, assert_as_good_as_eager, instruction_set
from curve_linear import curve_inputs, each, everything, flatten, unflatten
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast import _C, ops
from losssurf_fast.ops.curve_linear import curve_linear_backward_reference, curve_linear_reference

OP = torch.ops.losssurf_fast
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]  # activations, bends
WAYS = list(itertools.product((False, True), (0, 1, 3)))  # a t for each row, biases
SHAPES = [(1, 1, 1), (17, 33, 63), (64, 12, 16), (200, 50, 70)]  # M, O, I
# Large enough a weight to be multiplied on the fly: rows in registers, one and several vectors of rows, odd groups of
# outputs, several strips and chunks of columns.
HALF_ON_THE_FLY = [(13, 263, 4100), (3, 137, 8300), (4, 5, 63)]
ON_THE_FLY = [(1, 263, 4100), (47, 260, 2050), (64, 257, 2049), *HALF_ON_THE_FLY, (2, 60, 2100)]
EMPTY = [(0, 4, 3), (5, 0, 3), (5, 3, 0), (2, 0, 3), (2, 3, 0)]


def public(x, bends, coefficients, biases):
    """The operator as users call it."""
    return ops.curve_linear(x, bends, coefficients, biases[0] if len(biases) == 1 else biases or None)


# ---- against the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize(("dtype", "bend_dtype"), DTYPES)
def test_curve_linear_forward_and_backward(dtype, bend_dtype, isa):
    """As good as eager at every shape, with every kind of t and bias, forward and every gradient."""
    with instruction_set(isa) as available:
        if not available:
            pytest.skip(f"this CPU has no {isa}")
        on_the_fly = {F64: [], F32: ON_THE_FLY}.get(dtype, HALF_ON_THE_FLY)
        assert all(_C.curve_linear_on_the_fly(m, o * i, dtype.itemsize) for m, o, i in on_the_fly)
        large = [
            (shape, (False, biases)) for shape, biases in zip(on_the_fly, itertools.cycle((3, 1, 0)), strict=False)
        ]
        for shape, (per_row, biases) in [*itertools.product(SHAPES, WAYS), *large]:
            inputs = curve_inputs(shape, dtype, bend_dtype, biases=biases, per_row=per_row)
            wide = each(inputs, torch.Tensor.double)
            y = OP.curve_linear(*inputs)
            assert_as_good_as_eager(y, curve_linear_reference(*inputs), curve_linear_reference(*wide))
            grad, flags = torch.randn(y.shape).to(dtype), everything(biases)
            eager = curve_linear_backward_reference(grad, *inputs, *flags)
            exact = curve_linear_backward_reference(grad.double(), *wide, *flags)
            ours = OP.curve_linear_backward(grad, *inputs, *flags)
            for i, (actual, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
                if i == 4:  # few numbers, each a long sum: the error of eager's may happen to be none
                    error = (actual.double() - x).abs().max()
                    scale = torch.finfo(F32 if dtype == F32 else dtype).eps * sum_scale(grad, *inputs)
                    assert error <= scale, f"error {error:.3g}, scale {scale:.3g}"
                else:
                    assert_as_good_as_eager(actual, e, x)


def sum_scale(grad, x, bends, coefficients, biases):
    """The size of the coefficients' gradients if none of their terms cancelled."""
    grad, x = grad.double().abs(), x.double().abs()
    totals = [(grad * (x @ bend.double().abs().t())).sum() for bend in bends]
    return max(totals) + sum((grad @ b.double().abs()).sum() for b in biases)


@pytest.mark.parametrize("shape", EMPTY)
def test_curve_linear_empty(shape):
    for (dtype, bend_dtype), (per_row, biases) in itertools.product(DTYPES, WAYS):
        inputs = curve_inputs(shape, dtype, bend_dtype, biases=biases, per_row=per_row)
        y = OP.curve_linear(*inputs)
        torch.testing.assert_close(y, curve_linear_reference(*inputs))
        grads = OP.curve_linear_backward(torch.ones_like(y), *inputs, *everything(biases))
        expected = curve_linear_backward_reference(torch.ones_like(y), *inputs, *everything(biases))
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(("per_row", "biases"), WAYS)
def test_curve_linear_backward_reference_is_the_gradient(per_row, biases):
    """The written-out backward reference equals autograd of the forward reference in float64."""
    inputs = curve_inputs((9, 7, 5), F64, biases=biases, per_row=per_row)
    inputs = each(inputs, lambda t: t.clone().requires_grad_())
    y = curve_linear_reference(*inputs)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, flatten(*inputs), grad)
    actual = curve_linear_backward_reference(grad, *inputs, *everything(biases))
    torch.testing.assert_close(actual, list(expected))


def test_curve_linear_is_linear_with_the_weight_of_the_curve():
    """The oracle that needs no reference of ours: F.linear in float64, with the weight written out."""
    for rows, kind, t in itertools.product((5, 100), ("bezier", "polychain"), (0.0, 0.3, 1.0)):
        x, bends, _, biases = curve_inputs((rows, 20, 30), F64, biases=3)
        c = [(1 - t) ** 2, 2 * t * (1 - t), t**2]
        if kind == "polychain":
            c = [max(0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0, 2 * t - 1)]
        at = lambda tensors, c=c: sum(a * b for a, b in zip(c, tensors, strict=True))
        expected = F.linear(x, at(bends), at(biases))
        t = torch.tensor(t, dtype=F64)
        torch.testing.assert_close(ops.curve_linear(x, bends, ops.curve_coefficients(t, 3, kind), biases), expected)


@pytest.mark.parametrize("rows", [5, 100])
def test_curve_linear_rows_of_one_t_are_those_of_all(rows):
    x, bends, _, biases = curve_inputs((rows, 20, 30), F64, biases=3)
    t = torch.rand(rows, dtype=F64)
    y = ops.curve_linear(x, bends, ops.curve_coefficients(t, 3), biases)
    for i in range(0, rows, 7):
        one = ops.curve_linear(x[i], bends, ops.curve_coefficients(t[i], 3), biases)
        torch.testing.assert_close(y[i], one)


@pytest.mark.parametrize("bends", [2, 5, 9])
def test_curve_linear_bends(bends):
    for shape, per_row in (((4, 14, 20), False), ((4, 14, 20), True), ((4, 260, 2100), False)):
        inputs = curve_inputs(shape, bends=bends, biases=bends, per_row=per_row)
        torch.testing.assert_close(OP.curve_linear(*inputs), curve_linear_reference(*inputs), rtol=1e-4, atol=1e-4)


def test_curve_linear_does_not_read_bends_of_coefficient_zero():
    """A chain's weight depends on the two bends of its segment alone, in the backward of x too."""
    for shape in ((5, 260, 2100), (3, 260, 2100), (100, 20, 30)):
        x, bends, coefficients, _ = curve_inputs(shape)
        coefficients[1] = 0
        expected = curve_linear_reference(x, bends, coefficients, [])
        grad_x = curve_linear_backward_reference(expected, x, bends, coefficients, [], True, [False] * 3, False, [])
        bends[1].fill_(torch.nan)
        torch.testing.assert_close(OP.curve_linear(x, bends, coefficients, []), expected, rtol=1e-4, atol=1e-4)
        ours = OP.curve_linear_backward(expected, x, bends, coefficients, [], True, [False] * 3, False, [])
        torch.testing.assert_close(ours, grad_x, rtol=1e-4, atol=1e-2)
        assert (OP.curve_linear(x, bends, torch.zeros(3), []) == 0).all()


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_curve_linear_same_bits_for_any_number_of_threads(dtype, rows):
    threads, results = torch.get_num_threads(), []
    inputs = curve_inputs((rows, 520, 2100), dtype, biases=3)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = OP.curve_linear(*inputs)
            results.append([y, *OP.curve_linear_backward(y, *inputs, *everything(3))])
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_curve_linear_rule():
    """On the fly: few rows, in fp32 more of them where the weight has more than 2 MiB; fp64 never."""
    rule = lambda rows, itemsize, numel=2**24: _C.curve_linear_on_the_fly(rows, numel, itemsize)
    assert rule(1, 4) and rule(64, 4) and not rule(65, 4)
    assert rule(1, 2) and rule(16, 2) and not rule(17, 2)
    assert not rule(1, 8)
    assert rule(4, 4, 1) and not rule(5, 4, 2**19) and rule(5, 4, 2**19 + 1)
    assert rule(4, 2, 1) and not rule(5, 2, 2**20) and rule(5, 2, 2**20 + 1)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_row", "biases"), WAYS)
def test_curve_linear_gradcheck(per_row, biases):
    """First and second order, t included."""
    x, bends, _, offsets = curve_inputs((4, 3, 2), F64, biases=biases)
    t = torch.rand(4, dtype=F64) if per_row else torch.rand((), dtype=F64)
    inputs = [i.clone().requires_grad_() for i in flatten(x, bends, t, offsets)]

    def layer(*flat):
        x, bends, t, offsets = unflatten(flat)
        return public(x, bends, ops.curve_coefficients(t, 3), offsets)

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize(("shape", "per_row"), [((5, 260, 2100), False), ((5, 60, 70), True), ((100, 60, 70), False)])
def test_curve_linear_every_gradient_alone(shape, per_row):
    """A gradient does not depend on which others are asked for; one of a frozen bend is not made."""
    inputs = curve_inputs(shape, biases=3, per_row=per_row)
    grad = torch.randn(shape[:2])
    together = OP.curve_linear_backward(grad, *inputs, *everything(3))
    for i in range(len(together)):
        need = [k == i for k in range(len(together))]
        (alone,) = OP.curve_linear_backward(grad, *inputs, need[0], need[1:4], need[4], need[5:])
        assert torch.equal(alone, together[i])
    inputs = each(inputs, lambda t: t.clone())
    inputs[1][1].requires_grad_()
    public(*inputs).backward(grad)
    assert torch.equal(inputs[1][1].grad, together[2])


def test_curve_linear_opcheck():
    for grad, (per_row, biases) in itertools.product((False, True), WAYS):
        inputs = curve_inputs((5, 4, 3), biases=biases, per_row=per_row)
        inputs = each(inputs, lambda t, grad=grad: t.clone().requires_grad_(grad))
        torch.library.opcheck(OP.curve_linear, inputs)


def test_curve_linear_backward_opcheck():
    for (per_row, biases), needed in itertools.product(WAYS[:4], (False, True)):
        inputs = curve_inputs((5, 4, 3), biases=biases, per_row=per_row)
        flags = needed, [True, needed, False], not needed, [needed] * biases
        torch.library.opcheck(OP.curve_linear_backward, (torch.randn(5, 4), *inputs, *flags))


def test_curve_linear_saves_its_inputs_alone():
    x, bends, coefficients, biases = each(curve_inputs(biases=3), lambda t: t.clone().requires_grad_())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        public(x, bends, coefficients, biases)
    given = {t.data_ptr() for t in flatten(x, bends, coefficients, biases)}
    assert {t.data_ptr() for t in kept} == given


# ---- refusals ------------------------------------------------------------------------------------------------------

X, B, C = torch.randn(3, 4), [torch.randn(5, 4) for _ in range(3)], torch.rand(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.tolist(), B, C), TypeError, "curve_linear: x must be a tensor, got list"),
        ((X.int(), B, C), TypeError, "curve_linear: x must have one of the dtypes .* got torch.int32"),
        ((X[0, 0], B, C), ValueError, r"curve_linear: x must be \[..., in_features\], got a 0-d tensor"),
        ((X[:, :3], B, C), ValueError, r"curve_linear: x must be \[..., 4\] for bends \(5, 4\), got \(3, 3\)"),
        ((X, B[0], C), TypeError, "curve_linear: bends must be a sequence of tensors, got Tensor"),
        ((X, B[:1], C[:1]), ValueError, "curve_linear: bends must be at least 2, the two ends of the curve, got 1"),
        ((X, [*B[:2], None], C), TypeError, r"curve_linear: bends\[2\] must be a tensor, got NoneType"),
        (
            (X, [*B[:2], B[2].t()], C),
            ValueError,
            r"bends\[2\] must have the shape \(5, 4\) of bends\[0\], got \(4, 5\)",
        ),
        ((X, [b[0] for b in B], C), ValueError, r"bends\[0\] must be \[out_features, in_features\], got \(4,\)"),
        ((X, [b.double() for b in B], C), TypeError, r"bends\[0\] must be torch.float32 beside x .* got torch.float64"),
        (
            (X.half(), [B[0].half(), *B[1:]], C),
            TypeError,
            r"bends\[1\] must be torch.float16 as bends\[0\], got torch.f",
        ),
        ((X, [B[0].to("meta"), *B[1:]], C), ValueError, r"bends\[0\] must be on x's device cpu, got meta"),
        ((X, B, [0.5, 0.5, 0.0]), TypeError, "curve_linear: coefficients must be a tensor, got list"),
        ((X, B, C.half()), TypeError, "coefficients must be float32 or float64, got torch.float16"),
        ((X, B, C.to("meta")), ValueError, "coefficients must be on x's device cpu, got meta"),
        ((X, B, C[:2]), ValueError, r"coefficients must be \(3,\) for all rows or \(3, 3\) for each, got \(2,\)"),
        ((X, B, torch.rand(2, 3)), ValueError, r"for all rows or \(3, 3\) for each, got \(2, 3\)"),
        ((X, B, C, torch.zeros(4)), ValueError, r"curve_linear: bias must be \(5,\), got \(4,\)"),
        ((X, B, C, [torch.zeros(5)] * 2), ValueError, "bias must be one tensor or 3, one for each bend, got 2"),
        ((X, B, C, [torch.zeros(5)] * 2 + [torch.zeros(1)]), ValueError, r"bias\[2\] must be \(5,\), got \(1,\)"),
        ((X, B, C, 1.0), TypeError, "curve_linear: bias must be a sequence of tensors, got float"),
    ],
)
def test_curve_linear_bad_inputs(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.curve_linear(*arguments)


def test_operators_refuse_what_their_pointers_cannot_take():
    """Called past the public function, the C++ kernels still read nothing out of bounds."""
    grad = torch.zeros(3, 5)
    for error, message, x, bends, coefficients, biases in (
        (ValueError, "x must be", X[0], B, C, []),
        (ValueError, "x must be", X, [], C, []),
        (ValueError, "bends must be", X, [*B[:2], B[2][:2]], C, []),
        (TypeError, "bends must have one dtype", X, [*B[:2], B[2].half()], C, []),
        (ValueError, "coefficients must be", X, B, C[:2], []),
        (ValueError, "biases must be none, one or 3", X, B, C, [torch.zeros(5)] * 2),
        (ValueError, "bias must be", X, B, C, [torch.zeros(4)]),
    ):
        with pytest.raises(error, match=message):
            OP.curve_linear(x, bends, coefficients, biases)
        flags = True, [True] * len(bends), True, [True] * len(biases)
        with pytest.raises(error, match=message):
            OP.curve_linear_backward(grad, x, bends, coefficients, biases, *flags)
    with pytest.raises(ValueError, match="grad must be"):
        OP.curve_linear_backward(grad[:2], X, B, C, [], *everything(0))
    with pytest.raises(ValueError, match="a flag is needed for each"):
        OP.curve_linear_backward(grad, X, B, C, [], True, [True], True, [])


def test_curve_linear_kernel_for():
    assert lsf.kernel_for("curve_linear", "cpu").startswith("C++")
    assert lsf.kernel_for("curve_linear_backward", "cpu").startswith("C++")
