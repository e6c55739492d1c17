"""curve_weights as users call it: autograd's bookkeeping, transforms, compile, optimizers, refusals."""

import copy
import io
import weakref

import pytest
import torch
from common import BF16, F32, F64
from test_curve import OP, assert_equal, bends_of, flat

from losssurf_fast.ops.curve import (
    curve_coefficients,
    curve_weights,
    curve_weights_backward_reference,
    curve_weights_reference,
)

SHAPES = [(3, 2), (), (0, 2), (5,)]


def trainable(bends, *which):
    """The bends, of which those numbered require grad."""
    return [[b.detach().clone().requires_grad_(j in which) for b in bend] for j, bend in enumerate(bends)]


def in_lists(function, tensors, num_bends=3):
    """``function(bends, coefficients)`` of the flat ``tensors``, coefficients last."""
    *bends, coefficients = tensors
    size = len(bends) // num_bends
    return function([bends[j * size : (j + 1) * size] for j in range(num_bends)], coefficients)


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [(0, 1, 2, "t"), (1,), (0, 2), ("t",), (2, "t")])
def test_gradcheck_and_gradgradcheck(which):
    bends = trainable(bends_of(F64, 3, SHAPES), *which)
    t = torch.tensor(0.3, dtype=F64, requires_grad="t" in which)
    function = lambda t, *tensors: tuple(in_lists(curve_weights, (*tensors, curve_coefficients(t, 3))))
    assert torch.autograd.gradcheck(function, (t, *flat(bends)))
    assert torch.autograd.gradgradcheck(function, (t, *flat(bends)))


def test_third_derivative_along_a_curve():
    bends = bends_of(F64, 4, [(5,)])
    t = torch.tensor(0.3, dtype=F64, requires_grad=True)
    derivative = lambda f: torch.autograd.grad(f, t, create_graph=True)[0]
    loss = lambda weight: (weight**3).sum()
    ours, plain = (
        derivative(derivative(derivative(loss(f(bends, curve_coefficients(t, 4))[0]))))
        for f in (curve_weights, lambda b, c: curve_weights_reference(flat(b), c))
    )
    torch.testing.assert_close(ours, plain)


def test_a_weight_that_was_not_used_gives_its_bends_no_gradient():
    bends = trainable(bends_of(F32, 3, SHAPES), 1, 2)
    c = curve_coefficients(0.3, 3).requires_grad_()
    weights = curve_weights(bends, c)
    (weights[0].sum() + weights[3].square().sum()).backward()
    for bend in bends[1:]:
        assert [b.grad is None for b in bend] == [False, True, True, False]
    torch.testing.assert_close(bends[1][0].grad, c[1].detach().expand(3, 2))
    grads = [torch.ones(3, 2), 2 * weights[3].detach()]
    *_, expected = curve_weights_backward_reference(
        grads, [b[p].detach() for b in bends for p in (0, 3)], c.detach(), [False] * 6, True
    )
    torch.testing.assert_close(c.grad, expected)


def test_only_the_gradients_that_are_asked_for_are_made():
    bends, c = trainable(bends_of(F32, 3), 0, 1, 2), curve_coefficients(0.3, 3).requires_grad_()
    weights = curve_weights(bends, c)
    grads = [torch.randn_like(w) for w in weights]
    every = torch.autograd.grad(weights, [*flat(bends), c], grads, retain_graph=True)
    size = len(weights)
    for part in ([size + 3], [0, 2 * size + 1], [3 * size], [1, 3 * size]):
        inputs = [(*flat(bends), c)[i] for i in part]
        assert_equal(torch.autograd.grad(weights, inputs, grads, retain_graph=True), [every[i] for i in part])


def test_frozen_bends_have_no_edge_and_bends_are_not_kept_without_need():
    bends = trainable(bends_of(F32, 3, SHAPES), 1)
    node = curve_weights(bends, curve_coefficients(0.3, 3))[0].grad_fn
    assert len(node.next_functions) == len(SHAPES)
    with torch.no_grad():
        assert curve_weights(bends, curve_coefficients(0.3, 3))[0].grad_fn is None
    assert not curve_weights(trainable(bends), curve_coefficients(0.3, 3))[0].requires_grad

    made = [b * 1 for b in bends[1]]
    references = [weakref.ref(b) for b in made]
    weights = curve_weights([bends[0], made, bends[2]], curve_coefficients(0.3, 3))
    del made
    assert all(r() is None for r in references)
    torch.autograd.backward(weights, [torch.ones_like(w) for w in weights])
    assert all(b.grad is not None for b in bends[1])


def test_a_bend_changed_before_backward_is_an_error_where_it_is_needed():
    for grad_of_t in (False, True):
        bends = trainable(bends_of(F32, 3, SHAPES), 1)
        weights = curve_weights(bends, curve_coefficients(torch.tensor(0.3).requires_grad_(grad_of_t), 3))
        bends[0][3].add_(1)
        if grad_of_t:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                weights[3].sum().backward()
        else:
            weights[3].sum().backward()
    coefficients = curve_coefficients(0.3, 3)
    (weight,) = curve_weights(trainable(bends_of(F32, 3, [(3,)]), 1), coefficients)
    coefficients.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()


def test_backward_twice_needs_retain_graph():
    bends = trainable(bends_of(F32, 3, SHAPES), 1)
    for c in (curve_coefficients(0.3, 3), curve_coefficients(0.3, 3).requires_grad_()):
        loss = sum(w.sum() for w in curve_weights(bends, c))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_weights_are_tensors_of_their_own():
    """They share allocations, and nothing that a user sees."""
    bends = trainable(bends_of(F32, 3), 1)
    weights = curve_weights(bends, curve_coefficients(0.3, 3))
    for weight in weights:
        assert not weight._is_view() and weight.untyped_storage().nbytes() == weight.nbytes and weight.is_leaf is False
        assert weight.numel() == 0 or weight.data_ptr() % 64 == 0
    before = [w._version for w in weights]
    with torch.no_grad():
        weights[0].add_(1)
    assert [w._version - v for w, v in zip(weights, before, strict=True)] == [1] + [0] * (len(weights) - 1)
    file = io.BytesIO()
    torch.save(weights[1].detach(), file)
    assert file.tell() < 3000  # one element, not the model
    kept = weights[5].detach()
    value = kept.clone()
    del weights
    assert torch.equal(kept, value)
    assert torch.equal(copy.deepcopy(kept), value)
    kept.resize_(5000)
    assert torch.equal(kept[:4096], value)


def test_optimizers_train_bends_as_they_train_weights():
    for set_to_none in (False, True):
        ours, plain = (trainable(bends_of(F32, 3), 1) for _ in range(2))
        losses = {}
        for bends, function in ((ours, curve_weights), (plain, lambda b, c: curve_weights_reference(flat(b), c))):
            optimizer = torch.optim.SGD(bends[1], lr=0.1, momentum=0.9)
            losses[function] = []
            for step in range(4):
                optimizer.zero_grad(set_to_none=set_to_none)
                for t in (0.2, 0.3 + step / 10):  # the second gradient is added to the first
                    loss = sum((w.square()).sum() for w in function(bends, curve_coefficients(t, 3)))
                    loss.backward()
                optimizer.step()
        for a, b in zip(flat(ours), flat(plain), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_become_grad_without_a_copy():
    image = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    bends = trainable([[torch.randn(3, 4), image]] * 3, 1)
    weights = curve_weights(bends, curve_coefficients(0.3, 3))
    seen = []
    for bend in bends[1]:
        bend.register_hook(lambda grad: seen.append(grad.data_ptr()))
    torch.autograd.backward(weights, [torch.randn_like(w) for w in weights])
    assert [b.grad.data_ptr() for b in bends[1]] == seen
    assert all(b.grad.stride() == b.stride() for b in bends[1])


def test_the_same_tensor_as_several_bends():
    shared = torch.randn(5, requires_grad=True)
    (weight,) = curve_weights([[shared], [shared]], torch.tensor([0.25, 0.5]))
    weight.backward(torch.ones(5))
    assert_equal([weight.detach(), shared.grad], [shared.detach() * 0.75, torch.full((5,), 0.75)])


# ---- transforms, compile, dispatcher --------------------------------------------------------------------------------


def test_func_transforms_and_forward_mode():
    tensors = (*flat(bends_of(F64, 3, SHAPES)), torch.rand(3, dtype=F64))
    numbers = tuple(range(len(tensors)))
    loss = lambda function: lambda *x: sum(w.square().sum() for w in in_lists(function, x))
    reference = loss(lambda b, c: curve_weights_reference(flat(b), c))
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(reference(*leaves), leaves)
    for ours, wanted in zip(torch.func.grad(loss(curve_weights), numbers)(*tensors), expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    slope = sum((e * d).sum() for e, d in zip(expected, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss(curve_weights), tensors, tangents)[1], slope)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        dual = loss(curve_weights)(*duals)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)
        for refused in (duals[:1], tensors[:1]):
            with pytest.raises(NotImplementedError, match="curve_weights: bends and coefficients must have no tangent"):
                OP.curve_weights([*refused, *tensors[1:-1]], duals[-1])
    points = torch.rand(4, 3, dtype=F64)
    rows = torch.func.vmap(lambda c: in_lists(curve_weights, (*tensors[:-1], c)))(points)
    for i, c in enumerate(points):
        for row, wanted in zip(rows, curve_weights_reference(tensors[:-1], c), strict=True):
            torch.testing.assert_close(row[i], wanted)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("grad_of_t", (False, True))
def test_compile_fullgraph(backend, grad_of_t):
    def loss(bends, t):
        return sum((2 * w).square().sum() for w in curve_weights(bends, curve_coefficients(t, 3)))

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    found = []
    for function in (loss, compiled):
        for place in (0.3, 0.7):
            bends = trainable(bends_of(F32, 3, SHAPES), 1)
            t = torch.tensor(place, requires_grad=grad_of_t)
            value = function(bends, t)
            value.backward()
            found.append([value.detach(), *[b.grad for b in bends[1]], *([t.grad] if grad_of_t else [])])
    for ours, wanted in zip(flat(found[2:]), flat(found[:2]), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", (F64, F32, BF16))
def test_opcheck(dtype):
    image = torch.randn(2, 3, 4, 5).to(dtype)
    lists = [[*bend, image.to(memory_format=torch.channels_last), image.mT] for bend in bends_of(dtype, 3, SHAPES)]
    c, grads = curve_coefficients(0.3, 3), [torch.randn_like(b) for b in lists[0]]
    needed = [i % 2 == 0 for i in range(len(flat(lists)))]
    for which, need in (((), False), ((1,), False), ((0, 2), True)):
        bends = flat(trainable(lists, *which))
        torch.library.opcheck(OP.curve_weights.default, (bends, c.clone().requires_grad_(need)))
    bends = flat(lists)
    for arguments in ((grads, [], c, needed, False), (grads, bends, c, needed, True), (grads, bends, c, needed, False)):
        torch.library.opcheck(OP.curve_weights_backward.default, arguments)


def test_autocast_changes_nothing():
    bends = trainable(bends_of(F32, 3), 1)
    c = curve_coefficients(0.3, 3)
    with torch.autocast("cpu", dtype=BF16):
        weights = curve_weights(bends, c)
        torch.autograd.backward(weights, [torch.ones_like(w) for w in weights])
    assert_equal([w.detach() for w in weights], curve_weights_reference([b.detach() for b in flat(bends)], c))
    assert_equal([b.grad for b in bends[1]], [c[1].expand(b.shape) for b in bends[1]])


def test_inference_mode_and_empty_lists():
    with torch.inference_mode():
        bends = bends_of(F32, 3)
        assert_equal(curve_weights(bends, torch.ones(3)), curve_weights_reference(flat(bends), torch.ones(3)))
    assert curve_weights([[], []], torch.ones(2, requires_grad=True)) == []
    assert OP.curve_weights_backward([], [], torch.ones(2), [], True)[0].tolist() == [0, 0]


# ---- errors ---------------------------------------------------------------------------------------------------------

ONE, TWO, C = [torch.zeros(3)], [torch.zeros(3), torch.zeros(2)], torch.ones(2)
DTYPES = r"\(torch.float64, torch.float32, torch.bfloat16, torch.float16\)"


@pytest.mark.parametrize(
    "bends, c, error, message",
    [
        (ONE + ONE, 0.5, TypeError, "curve_weights: coefficients must be a tensor, got float"),
        (torch.ones(2), C, TypeError, "curve_weights: bends must be a sequence of lists of tensors, got Tensor"),
        (ONE, C[:1], TypeError, r"curve_weights: bends\[0\] must be a sequence of tensors, got Tensor"),
        ([ONE, [1.0]], C, TypeError, r"curve_weights: bends\[1\]\[0\] must be a tensor, got float"),
        ([ONE], C, ValueError, "curve_weights: bends must be 2 lists, got 1"),
        ([ONE, TWO], C, ValueError, r"curve_weights: bends\[1\] must hold 1 tensors, got 2"),
        ([ONE, [ONE[0].to_sparse()]], C, TypeError, r"bends\[1\]\[0\] must be a dense tensor, got .* torch.sparse_coo"),
    ],
)
def test_curve_weights_refuses(bends, c, error, message):
    with pytest.raises(error, match=message):
        curve_weights(bends, c)


@pytest.mark.parametrize(
    "bends, c, error, message",
    [
        (ONE, torch.ones(()), ValueError, r"coefficients must be \[K\], one for each bend, got \(\)"),
        (ONE, torch.ones(0), ValueError, r"coefficients must be \[K\], one for each bend, got \(0,\)"),
        (ONE, torch.ones(1, dtype=BF16), TypeError, "coefficients must be float32 or float64, got torch.bfloat16"),
        (3 * ONE, C, ValueError, "bends must be 2 lists of equal length, got 3 tensors"),
        (
            2 * [torch.ones(3, dtype=torch.int64)],
            C,
            TypeError,
            rf"bends\[0\]\[0\] must .* of {DTYPES}, got torch.int64",
        ),
        (TWO, C, ValueError, r"bends\[1\]\[0\] must have the shape \(3,\) of bends\[0\]\[0\], got \(2,\)"),
        ([*ONE, torch.zeros(3, dtype=BF16)], C, TypeError, r"bends\[1\]\[0\] must be torch.float32 as bends\[0\]\[0\]"),
        (
            [*ONE, torch.zeros(3, device="meta")],
            C,
            ValueError,
            r"bends\[1\]\[0\] must be on the coefficients' cpu, got",
        ),
    ],
)
def test_operator_and_reference_refuse_in_the_same_words(bends, c, error, message):
    for function in (curve_weights_reference, OP.curve_weights):
        with pytest.raises(error, match=f"curve_weights: {message}"):
            function(bends, c)


@pytest.mark.parametrize(
    "grads, bends, c, needed, need, error, message",
    [
        (ONE, [], torch.ones(2, 1), [True], False, ValueError, r"coefficients must be \[K\], .*, got \(2, 1\)"),
        (ONE, [], C, [True], False, ValueError, "needed must hold 2 flags, got 1"),
        (ONE, [], C, [True, True], True, ValueError, "bends must hold 2 tensors, got 0"),
        (ONE, ONE, C, [True, True], False, ValueError, "bends must hold 2 tensors, got 1"),
        (
            [torch.ones(3).int()],
            [],
            C,
            [True, True],
            False,
            TypeError,
            rf"grads\[0\] must .* of {DTYPES}, got torch.int32",
        ),
        ([torch.ones(3, device="meta")], [], C, [True, True], False, ValueError, r"grads\[0\] must be on the coeff"),
        (ONE, [b.to(BF16) for b in 2 * ONE], C, [True, True], True, TypeError, r"grads\[0\] must be torch.bfloat16 as"),
        (ONE, TWO, C, [True, True], True, ValueError, r"grads\[0\] must have its bends' shape \(2,\), got \(3,\)"),
        (
            ONE,
            [*ONE, torch.ones(3, device="meta")],
            C,
            [True, True],
            True,
            ValueError,
            r"grads\[0\] must be on its bends' m",
        ),
    ],
)
def test_backward_operator_and_reference_refuse_in_the_same_words(grads, bends, c, needed, need, error, message):
    for function in (curve_weights_backward_reference, OP.curve_weights_backward):
        with pytest.raises(error, match=f"curve_weights_backward: {message}"):
            function(grads, bends, c, needed, need)


@pytest.mark.parametrize(
    "t, num_bends, kind, error, message",
    [
        ("0.5", 3, "bezier", TypeError, "t must be a number or a tensor, got str"),
        (True, 3, "bezier", TypeError, "t must be a number or a tensor, got bool"),
        (-0.1, 3, "bezier", ValueError, r"t must lie in \[0, 1\], got -0.1"),
        (float("nan"), 3, "bezier", ValueError, r"t must lie in \[0, 1\], got nan"),
        (torch.tensor([0.5, 1.5]), 3, "bezier", ValueError, r"t must lie in \[0, 1\], got 0.5 to 1.5"),
        (torch.tensor(float("nan")), 3, "bezier", ValueError, r"t must lie in \[0, 1\], got nan"),
        (torch.tensor(1), 3, "bezier", TypeError, "t must have a floating dtype, got torch.int64"),
        (0.5, 1, "bezier", ValueError, "num_bends counts the two ends and must be at least 2, got 1"),
        (0.5, 3.0, "bezier", TypeError, "num_bends must be an int, got float"),
        (0.5, True, "bezier", TypeError, "num_bends must be an int, got bool"),
        (0.5, 3, "spline", ValueError, r"kind must be one of \('bezier', 'polychain'\), got 'spline'"),
    ],
)
def test_curve_coefficients_refuses(t, num_bends, kind, error, message):
    with pytest.raises(error, match=f"curve_coefficients: {message}"):
        curve_coefficients(t, num_bends, kind)
