"""The lrt family as users call it: shapes and strides, autocast, checkpoints, torch.func, torch.compile."""

import warnings

import pytest
import torch
from common import BF16, F64, lrt_inputs, with_grad
from torch.utils.checkpoint import checkpoint

from losssurf_fast import ops
from losssurf_fast.ops import lrt

# ---- ways of calling -----------------------------------------------------------------------------------------------


def test_lrt_linear_leading_dimensions_and_strides():
    x, weight, scale, bias = lrt_inputs("weight", (24, 10, 7))
    flat = ops.lrt_linear(x, weight, scale, bias, parameterization="weight", seed=2)
    call = lambda x: ops.lrt_linear(x, weight, scale, bias, parameterization="weight", seed=2)
    assert torch.equal(call(x.reshape(2, 3, 4, 7)), flat.view(2, 3, 4, 10))
    torch.testing.assert_close(call(x[0]), flat[0])  # a matrix of one row takes another GEMM
    assert call(x.new_empty(2, 0, 7)).shape == (2, 0, 10)
    strided = torch.empty(7, 24).t().copy_(x)
    torch.testing.assert_close(call(strided), flat)
    transposed = ops.lrt_linear(
        x, weight.t().contiguous().t(), scale.t().contiguous().t(), bias, parameterization="weight", seed=2
    )
    torch.testing.assert_close(transposed, flat)


def test_lrt_linear_expanded_gradient_and_input():
    x, weight, scale, bias = with_grad(lrt_inputs("additive"))
    y = ops.lrt_linear(x, weight, scale, bias, parameterization="additive", seed=2)
    expanded = torch.autograd.grad(y, weight, torch.ones(()).expand_as(y), retain_graph=True)
    torch.testing.assert_close(expanded, torch.autograd.grad(y, weight, torch.ones_like(y)))
    row = x[:1].detach()
    wide = ops.lrt_linear(row.expand(6, -1), weight, scale, bias, parameterization="additive", seed=2)
    torch.testing.assert_close(
        wide, ops.lrt_linear(row.repeat(6, 1), weight, scale, bias, parameterization="additive", seed=2)
    )


def test_lrt_sample_broadcast_and_spatial():
    mean, seed = torch.randn(2, 3, 4, 5), 6
    var = torch.rand(3, 1, 1, requires_grad=True)
    y = ops.lrt_sample(mean, var, seed, spatial_dims=2)
    eps = ops.philox_normal((6, 20), seed).view(2, 3, 4, 5)
    torch.testing.assert_close(y, mean + (var + 1e-16).sqrt() * eps)
    (grad,) = torch.autograd.grad(y.sum(), var)
    expected = (eps * 0.5 / var.sqrt()).sum((0, 2, 3)).view(3, 1, 1)
    torch.testing.assert_close(grad, expected)
    assert ops.lrt_sample(torch.tensor(1.0), torch.tensor(0.0), 0) == 1.0


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_autocast(parameterization):
    """Under autocast the GEMM operands and the result are bf16, gradients of fp32 parameters fp32."""
    x, weight, scale, bias = with_grad(lrt_inputs(parameterization))
    with torch.autocast("cpu", dtype=BF16):
        y = ops.lrt_linear(x, weight, scale, bias, parameterization=parameterization, seed=1)
        present = [t for t in (x, weight, scale, bias) if t is not None]
        inside = torch.autograd.grad(y.sum(), present, retain_graph=True)
    assert y.dtype == BF16
    outside = torch.autograd.grad(y.sum(), present)
    explicit = ops.lrt_linear(x.bfloat16(), weight, scale, bias, parameterization=parameterization, seed=1)
    assert torch.equal(y, explicit)
    for grad, again, tensor in zip(inside, outside, present, strict=True):
        assert grad.dtype == tensor.dtype and torch.equal(grad, again)


def test_lrt_linear_checks_under_autocast_too():
    _, weight, scale, bias = lrt_inputs("additive")
    with torch.autocast("cpu", dtype=BF16):
        with pytest.raises(TypeError, match="lrt_linear: x must have one of the dtypes .* torch.int64"):
            ops.lrt_linear(torch.ones(2, 63, dtype=torch.int64), weight, scale, bias, parameterization="additive")
        with pytest.raises(TypeError, match="lrt_linear: x must be a tensor, got list"):
            ops.lrt_linear([1.0], weight, scale, bias, parameterization="additive")


def test_lrt_linear_meta():
    inputs = [t.to("meta").requires_grad_() for t in lrt_inputs("additive")]
    y = ops.lrt_linear(*inputs, parameterization="additive")
    assert y.device.type == "meta" and y.shape == (17, 33)
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [t.shape for t in inputs]


def test_lrt_linear_saves_little():
    """Kept for backward besides the parameters: x, one tensor of the output's size and the seed."""
    rows, out_features, in_features = 64, 256, 128
    x, weight, scale, bias = with_grad(lrt_inputs("additive", (rows, out_features, in_features)))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.lrt_linear(x, weight, scale, bias, parameterization="additive")
    parameters = {t.untyped_storage().data_ptr() for t in (weight, scale, bias)}
    sizes = sorted(t.untyped_storage().nbytes() for p, t in kept.items() if p not in parameters)
    assert sizes == sorted([8, x.untyped_storage().nbytes(), 4 * rows * out_features])


# ---- transforms ----------------------------------------------------------------------------------------------------


def test_lrt_linear_torch_func():
    """grad, jvp and vmap agree with plain autograd of the reference."""
    x, weight, scale, bias = lrt_inputs("neuron", (6, 5, 4), F64)
    seed = torch.tensor(3)
    loss = lambda w, s=seed: ops.lrt_linear(x, w, scale, bias, parameterization="neuron", seed=s).square().sum()
    w = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    direction = torch.randn_like(weight)
    _, tangent = torch.func.jvp(loss, (weight,), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    seeds = torch.tensor([3, 4, 5])
    per_seed = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, seeds)
    torch.testing.assert_close(per_seed[0], expected)
    assert not torch.equal(per_seed[0], per_seed[1])
    batch = torch.stack([x, x + 1])
    mapped = torch.func.vmap(lambda x: ops.lrt_linear(x, weight, scale, bias, parameterization="neuron", seed=3))(batch)
    torch.testing.assert_close(mapped[1], ops.lrt_linear(x + 1, weight, scale, bias, parameterization="neuron", seed=3))


def test_lrt_linear_vmap_randomness():
    x, weight, scale, bias = lrt_inputs("additive", (6, 5, 4))
    layer = lambda x: ops.lrt_linear(x, weight, scale, bias, parameterization="additive")
    batch = x.expand(3, 6, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(batch)
    different = torch.func.vmap(layer, randomness="different")(batch)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(layer, randomness="same")(batch)
    assert torch.equal(same[0], same[1])


def test_lrt_linear_forward_mode():
    """Dual tensors give the right tangent, not a silent zero."""
    x, weight, scale, bias = lrt_inputs("additive", (6, 5, 4), F64)
    direction = torch.randn_like(scale)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scale, direction)
        y = ops.lrt_linear(x, weight, dual, bias, parameterization="additive", seed=3)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    layer = lambda s: ops.lrt_linear(x, weight, s, bias, parameterization="additive", seed=3)
    step = 1e-6
    numeric = (layer(scale + step * direction) - layer(scale - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


def test_lrt_linear_third_order():
    """Three derivatives by autograd equal those of the reference."""
    x, weight, scale, bias = lrt_inputs("variance", (3, 2, 2), F64)

    def third(function):
        s = scale.clone().requires_grad_()
        value = function(s).pow(3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, s, create_graph=True)
            value = grad.sum()
        return value

    seed = torch.tensor(2)
    ours = third(lambda s: ops.lrt_linear(x, None, s, bias, parameterization="variance", seed=seed))
    reference = third(lambda s: lrt.lrt_linear_reference(x, None, s, bias, seed, "variance")[0])
    torch.testing.assert_close(ours, reference)


def test_second_order_of_inputs_that_depend_on_each_other():
    """A double backward counts no path twice where one input was computed from another."""
    x, weight, scale, bias = lrt_inputs("additive", (3, 2, 2), F64)
    seed = torch.tensor(2)

    def second(layer, sample):
        w = weight.clone().requires_grad_()
        y = sample(layer(x * w[0], w, w.square() - scale, bias), w.square().sum().expand(3, 2))
        (grad,) = torch.autograd.grad(y.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), w)[0]

    torch.testing.assert_close(
        second(lambda *t: ops.lrt_linear(*t, parameterization="additive", seed=seed),
               lambda m, v: ops.lrt_sample(m, v, seed)),
        second(lambda *t: lrt.lrt_linear_reference(*t, seed, "additive")[0],
               lambda m, v: lrt.lrt_sample_reference(m, v, seed)),
    )  # fmt: skip


@pytest.mark.parametrize("parameterization", ["layer", "additive", "variance"])
def test_lrt_linear_compile(parameterization):
    """torch.compile(fullgraph=True) gives eager's values and gradients, and one graph for any batch size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, weight, scale, bias = with_grad(lrt_inputs(parameterization, (1, 10, 7)))
    layer = lambda x, seed: ops.lrt_linear(x, weight, scale, bias, parameterization=parameterization, seed=seed)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    present = [t for t in (weight, scale, bias) if t is not None]
    for rows in (3, 5, 9):
        x, seed = torch.randn(rows, 7), torch.tensor(rows)
        y, expected = compiled(x, seed), layer(x, seed)
        assert torch.equal(y, expected)
        for got, want in zip(
            torch.autograd.grad(y.sum(), present), torch.autograd.grad(expected.sum(), present), strict=True
        ):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lrt_linear_compile_draws_its_seed():
    """Inductor with fallback_random draws eager's seeds, so noise is the same; so do torch.func transforms inside."""
    torch._dynamo.reset()
    inputs = lrt_inputs("additive", (6, 5, 4))
    layer = lambda x: ops.lrt_linear(x, *inputs[1:], parameterization="additive")
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True)
        torch.manual_seed(4)
        actual = compiled(inputs[0])
        torch.manual_seed(4)
        torch.testing.assert_close(actual, layer(inputs[0]))
    loss = lambda w: ops.lrt_linear(inputs[0], w, *inputs[2:], parameterization="additive", seed=1).sum()
    torch.testing.assert_close(
        torch.compile(torch.func.grad(loss), fullgraph=True)(inputs[1]), torch.func.grad(loss)(inputs[1])
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_lrt_linear_checkpoint_replays_its_noise(reentrant):
    inputs = with_grad(lrt_inputs("additive"))
    layer = lambda x: ops.lrt_linear(x, *inputs[1:], parameterization="additive").square()
    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(inputs[0]).sum(), inputs[2])
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about reentrant checkpoints and autograd.grad
        y = checkpoint(layer, inputs[0], use_reentrant=reentrant)
    y.sum().backward()
    torch.testing.assert_close(inputs[2].grad, plain[0], rtol=0, atol=0)
