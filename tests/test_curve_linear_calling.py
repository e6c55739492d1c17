"""curve_linear as users call it: shapes and strides, autocast, torch.func, torch.compile."""

import pytest
import torch
from common import BF16, F64
from curve_linear import curve_inputs, each, flatten, unflatten

from losssurf_fast import ops
from losssurf_fast.ops.curve_linear import curve_linear_reference

# ---- ways of calling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
def test_curve_linear_leading_dimensions_and_strides(per_row):
    x, bends, c, biases = curve_inputs((24, 10, 7), biases=3, per_row=per_row)
    flat = ops.curve_linear(x, bends, c, biases)
    shaped = c.reshape(2, 3, 4, 3) if per_row else c
    assert torch.equal(ops.curve_linear(x.reshape(2, 3, 4, 7), bends, shaped, biases), flat.view(2, 3, 4, 10))
    torch.testing.assert_close(ops.curve_linear(x[0], bends, c[0] if per_row else c, biases), flat[0])
    empty = ops.curve_linear(x.new_empty(2, 0, 7), bends, c.new_empty(2, 0, 3) if per_row else c, biases)
    assert empty.shape == (2, 0, 10)
    strided = torch.empty(7, 24).t().copy_(x)
    transposed = [bend.t().contiguous().t() for bend in bends]
    assert torch.equal(ops.curve_linear(strided, transposed, c, biases), flat)


def test_curve_linear_expanded_gradient_and_input():
    x, bends, c, biases = each(curve_inputs(biases=3), lambda t: t.clone().requires_grad_())
    y = ops.curve_linear(x, bends, c, biases)
    for tensor in (x, bends[1], c, biases[0]):
        expanded = torch.autograd.grad(y, tensor, torch.ones(()).expand_as(y), retain_graph=True)
        torch.testing.assert_close(expanded, torch.autograd.grad(y, tensor, torch.ones_like(y), retain_graph=True))
    row = x[:1].detach()
    wide = ops.curve_linear(row.expand(6, -1), bends, c.detach().expand(6, 3), biases)
    torch.testing.assert_close(wide, ops.curve_linear(row.repeat(6, 1), bends, c, biases))


def test_curve_linear_autocast():
    """Under autocast the GEMM operands and the result are bf16, gradients of fp32 parameters fp32."""
    for rows, per_row in ((5, False), (100, False), (5, True)):
        inputs = curve_inputs((rows, 33, 63), biases=3, per_row=per_row)
        x, bends, c, biases = each(inputs, lambda t: t.clone().requires_grad_())
        present = flatten(x, bends, c, biases)
        with torch.autocast("cpu", dtype=BF16):
            y = ops.curve_linear(x, bends, c, biases)
            inside = torch.autograd.grad(y.sum(), present, retain_graph=True)
        assert y.dtype == BF16
        outside = torch.autograd.grad(y.sum(), present)
        assert torch.equal(y, ops.curve_linear(x.bfloat16(), bends, c, biases))
        for grad, again, tensor in zip(inside, outside, present, strict=True):
            assert grad.dtype == tensor.dtype and torch.equal(grad, again)
    with torch.autocast("cpu", dtype=BF16), pytest.raises(TypeError, match="x must have one of the dtypes"):
        ops.curve_linear(torch.ones(2, 63, dtype=torch.int64), bends, c, biases)


def test_curve_linear_meta():
    x, bends, c, biases = each(curve_inputs(biases=3), lambda t: t.to("meta").requires_grad_())
    y = ops.curve_linear(x, bends, c, biases)
    assert y.device.type == "meta" and y.shape == (17, 33)
    present = flatten(x, bends, c, biases)
    assert [g.shape for g in torch.autograd.grad(y.sum(), present)] == [t.shape for t in present]


# ---- transforms ----------------------------------------------------------------------------------------------------


def test_curve_linear_torch_func():
    """grad, jvp, vmap over t and over x agree with plain autograd."""
    x, bends, _, biases = curve_inputs((6, 5, 4), F64, biases=3)
    layer = lambda t, x=x: ops.curve_linear(x, bends, ops.curve_coefficients(t, 3), biases)
    loss = lambda t: layer(t).square().sum()
    t = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(t), t)
    torch.testing.assert_close(torch.func.grad(loss)(t.detach()), expected)
    _, tangent = torch.func.jvp(loss, (t.detach(),), (torch.tensor(2.0, dtype=F64),))
    torch.testing.assert_close(tangent, 2 * expected)
    places = torch.tensor([0.1, 0.3, 0.9], dtype=F64)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(places)[1], expected)
    mapped = torch.func.vmap(lambda x: layer(t.detach(), x))(torch.stack([x, x + 1]))
    torch.testing.assert_close(mapped[1], layer(t.detach(), x + 1))


def test_curve_linear_forward_mode():
    """Dual tensors give the right tangent, not a silent zero."""
    x, bends, c, biases = curve_inputs((6, 5, 4), F64, biases=3, per_row=True)
    direction = torch.randn_like(bends[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bends[1], direction)
        y = ops.curve_linear(x, [bends[0], dual, bends[2]], c, biases)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, c[:, 1:2] * (x @ direction.t()))


def test_curve_linear_third_order():
    """Three derivatives by autograd equal those of the reference, also of inputs computed from each other."""
    x, bends, _, biases = curve_inputs((3, 2, 2), F64, biases=3)

    def third(function):
        t = torch.tensor(0.3, dtype=F64, requires_grad=True)
        bend = bends[1] * t.square()
        value = function(x * t, [bends[0], bend, bend + t], ops.curve_coefficients(t, 3), biases).pow(3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, t, create_graph=True)
            value = grad
        return value

    torch.testing.assert_close(third(ops.curve_linear), third(curve_linear_reference))


@pytest.mark.parametrize("per_row", [False, True])
def test_curve_linear_compile(per_row):
    """torch.compile(fullgraph=True) gives eager's values and gradients, and one graph for any batch size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, bends, _, biases = each(curve_inputs((1, 10, 7), biases=3), lambda t: t.clone().requires_grad_())

    def layer(x, t):
        return ops.curve_linear(x, bends, ops.curve_coefficients(t, 3), biases)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 90):
        x = torch.randn(rows, 7, requires_grad=True)
        t = torch.rand(rows if per_row else ()).requires_grad_()
        y, expected = compiled(x, t), layer(x, t)
        torch.testing.assert_close(y, expected)
        wanted = [x, t, *bends, *biases]
        got, want = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected))
        torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_curve_linear_compile_inductor():
    torch._dynamo.reset()
    inputs = each(curve_inputs((6, 5, 4), biases=3), lambda t: t.clone().requires_grad_())
    compiled = torch.compile(lambda *flat: ops.curve_linear(*unflatten(flat)), fullgraph=True)
    flat = flatten(*inputs)
    y, expected = compiled(*flat), ops.curve_linear(*inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), flat), torch.autograd.grad(expected.sum(), flat))
