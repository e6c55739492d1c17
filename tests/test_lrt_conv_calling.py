"""lrt_conv as users call it: shapes and strides, padding, autocast, transforms, torch.compile, and what is refused."""

import pytest
import torch
from common import BF16, F64, lrt_conv_inputs, with_grad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from losssurf_fast import ops
from losssurf_fast.ops import lrt, lrt_conv

PLAIN = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
CASE = ((4, 3, 6, 5), (4, 3, 3, 2), PLAIN)
SMALL = ((2, 2, 4, 3), (3, 2, 2, 2), PLAIN)


def conv(inputs, *geometry, parameterization="additive", **options):
    return ops.lrt_conv2d(*inputs, *geometry, parameterization=parameterization, **options)


# ---- ways of calling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_lrt_conv_is_the_library_convolution_where_there_is_no_noise(dims, transposed):
    """Every argument means what it means in torch.nn.functional: variance 0 gives its result."""
    x = torch.randn(2, 4, *[7] * dims)
    weight, bias = torch.randn(4, 3 if transposed else 2, *[3] * dims), torch.randn(6 if transposed else 4)
    scale = torch.full_like(weight, -1e4)
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    if transposed:
        options["output_padding"] = 1
    name = f"conv{'_transpose' if transposed else ''}{dims}d"
    layer = lambda x: getattr(ops, f"lrt_{name}")(x, weight, scale, bias, parameterization="additive", **options)
    expected = getattr(F, name)(x, weight, bias, **options)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])  # unbatched
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("kernel", [(4, 3), (2, 2), (1, 1)])
def test_lrt_conv_same_padding(kernel):
    x, weight = torch.randn(2, 3, 8, 9), torch.randn(4, 3, *kernel)
    scale = torch.full_like(weight, -1e4)
    for padding in ("same", "valid"):
        y = ops.lrt_conv2d(x, weight, scale, None, 1, padding, (2, 1), parameterization="additive")
        torch.testing.assert_close(y, F.conv2d(x, weight, None, 1, padding, (2, 1)))


def test_lrt_conv_strides_do_not_matter():
    """Slices, expanded inputs and parameters in another memory format give what contiguous ones give."""
    x, weight, scale, bias = lrt_conv_inputs("weight", CASE)
    expected = with_grad((x, weight, scale, bias))
    y = conv(expected, parameterization="weight", seed=2)
    y.square().sum().backward()
    wide = torch.zeros(4, 6, 6, 10)
    wide[:, ::2, :, ::2] = x
    reorder = lambda t: t.contiguous(memory_format=torch.channels_last)
    variants = {
        "slice": (wide[:, ::2, :, ::2], weight, scale, bias),
        "channels_last x": (reorder(x), weight, scale, bias),
        "channels_last weight": (x, reorder(weight), scale, bias),
        "channels_last scale": (x, weight, reorder(scale), bias),
        "transposed weight": (x, weight.transpose(2, 3).contiguous().transpose(2, 3), scale, bias),
    }
    for name, tensors in variants.items():
        tensors = [t.detach().requires_grad_() for t in tensors]
        actual = conv(tensors, parameterization="weight", seed=2)
        torch.testing.assert_close(actual, y, msg=name)
        grads = torch.autograd.grad(actual.square().sum(), tensors)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_lrt_conv_expanded_gradient_and_input():
    inputs = with_grad(lrt_conv_inputs("additive", CASE))
    y = conv(inputs, seed=2)
    expanded = torch.autograd.grad(y, inputs, torch.ones(()).expand_as(y), retain_graph=True)
    for got, want in zip(expanded, torch.autograd.grad(y, inputs, torch.ones_like(y)), strict=True):
        torch.testing.assert_close(got, want)
    x, *rest = (t.detach() for t in inputs)
    one = x[:1]
    torch.testing.assert_close(
        conv((one.expand(3, -1, -1, -1), *rest), seed=2), conv((one.repeat(3, 1, 1, 1), *rest), seed=2)
    )


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_conv_autocast(parameterization):
    """Under autocast the convolutions' operands and the result are bf16, gradients of fp32 parameters fp32."""
    inputs = with_grad(lrt_conv_inputs(parameterization, CASE))
    present = [t for t in inputs if t is not None]
    with torch.autocast("cpu", dtype=BF16):
        y = conv(inputs, parameterization=parameterization, seed=1)
        inside = torch.autograd.grad(y.sum(), present, retain_graph=True)
    assert y.dtype == BF16
    outside = torch.autograd.grad(y.sum(), present)
    explicit = conv((inputs[0].bfloat16(), *inputs[1:]), parameterization=parameterization, seed=1)
    assert torch.equal(y, explicit)
    for grad, again, tensor in zip(inside, outside, present, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad, again)


def test_lrt_conv_meta():
    inputs = [t.to("meta").requires_grad_() for t in lrt_conv_inputs("additive", CASE)]
    y = conv(inputs)
    assert y.device.type == "meta" and y.shape == (4, 4, 4, 4)
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [t.shape for t in inputs]


@pytest.mark.parametrize("channels_last", [False, True])
def test_lrt_conv_saves_little(channels_last):
    """Kept for backward besides the parameters: x, one tensor of the output's size and the seed."""
    case = ((8, 3, 16, 16), (5, 3, 3, 3), PLAIN)
    x, weight, scale, bias = with_grad(lrt_conv_inputs("additive", case, channels_last=channels_last))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        conv((x, weight, scale, bias))
    parameters = {t.untyped_storage().data_ptr() for t in (weight, scale, bias)}
    sizes = sorted(t.untyped_storage().nbytes() for p, t in kept.items() if p not in parameters)
    assert sizes == sorted([8, x.untyped_storage().nbytes(), 4 * 8 * 5 * 14 * 14])


def test_lrt_conv_draws_its_own_seed():
    inputs = lrt_conv_inputs("additive", CASE)
    torch.manual_seed(3)
    first, second = conv(inputs), conv(inputs)
    torch.manual_seed(3)
    assert torch.equal(conv(inputs), first) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own about reentrant checkpoints and autograd.grad
def test_lrt_conv_checkpoint_replays_its_noise(reentrant):
    inputs = with_grad(lrt_conv_inputs("additive", CASE))
    layer = lambda x: conv((x, *inputs[1:])).square()
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(layer(inputs[0]).sum(), inputs[2])
    torch.manual_seed(1)
    checkpoint(layer, inputs[0], use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(inputs[2].grad, plain)


# ---- transforms ----------------------------------------------------------------------------------------------------


def test_lrt_conv_torch_func():
    """grad, jvp and vmap agree with plain autograd of the operator."""
    x, weight, scale, bias = lrt_conv_inputs("neuron", SMALL, F64)
    seed = torch.tensor(3)
    layer = lambda x, w, s: conv((x, w, scale, bias), parameterization="neuron", seed=s)
    loss = lambda w, s=seed: layer(x, w, s).square().sum()
    w = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    direction = torch.randn_like(weight)
    _, tangent = torch.func.jvp(loss, (weight,), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    per_seed = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, torch.tensor([3, 4]))
    torch.testing.assert_close(per_seed[0], expected)
    assert not torch.equal(per_seed[0], per_seed[1])
    mapped = torch.func.vmap(lambda x: layer(x, weight, seed))(torch.stack([x, x + 1]))
    torch.testing.assert_close(mapped[1], layer(x + 1, weight, seed))


def test_lrt_conv_vmap_randomness():
    x, *rest = lrt_conv_inputs("additive", SMALL)
    layer, batch = lambda x: conv((x, *rest)), x.expand(3, *x.shape)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(batch)
    different = torch.func.vmap(layer, randomness="different")(batch)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(layer, randomness="same")(batch)
    assert torch.equal(same[0], same[1])


def test_lrt_conv_forward_mode():
    """Dual tensors give the right tangent, not a silent zero."""
    x, weight, scale, bias = lrt_conv_inputs("additive", SMALL, F64)
    direction = torch.randn_like(scale)
    layer = lambda s: conv((x, weight, s, bias), seed=3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scale, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    step = 1e-6
    numeric = (layer(scale + step * direction) - layer(scale - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)


def test_lrt_conv_third_order():
    """Three derivatives by autograd equal those of the reference."""
    x, _, scale, bias = lrt_conv_inputs("variance", SMALL, F64)

    def third(function):
        s = scale.clone().requires_grad_()
        value = function(s).pow(3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, s, create_graph=True)
            value = grad.sum()
        return value

    ours = third(lambda s: conv((x, None, s, bias), parameterization="variance", seed=2))
    reference = third(lambda s: lrt_conv.lrt_conv_reference(x, None, s, bias, torch.tensor(2), "variance", *PLAIN)[0])
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("parameterization", ["layer", "additive", "variance"])
def test_lrt_conv_compile(parameterization, channels_last):
    """torch.compile(fullgraph=True) gives eager's values and gradients, and one graph for any batch and image size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x, weight, scale, bias = with_grad(lrt_conv_inputs(parameterization, CASE, channels_last=channels_last))
    layer = lambda x, seed: conv((x, weight, scale, bias), 1, 1, parameterization=parameterization, seed=seed)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    present = [t for t in (weight, scale, bias) if t is not None]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for size in ((7, 3, 8, 9), (5, 3, 10, 12), (6, 3, 12, 11)):
        x, seed = torch.randn(size).contiguous(memory_format=memory_format), torch.tensor(size[0])
        y, expected = compiled(x, seed), layer(x, seed)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for got, want in zip(
            torch.autograd.grad(y.sum(), present), torch.autograd.grad(expected.sum(), present), strict=True
        ):
            torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lrt_conv_inductor():
    """Inductor checks the strides that the fake kernels promise; with fallback_random it draws eager's seeds."""
    torch._dynamo.reset()
    inputs = with_grad(lrt_conv_inputs("additive", CASE, channels_last=True))
    layer = lambda *inputs: conv(inputs, 1, 1).relu()
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer, fullgraph=True)
        torch.manual_seed(4)
        actual = compiled(*inputs)
        torch.manual_seed(4)
        expected = layer(*inputs)
        torch.testing.assert_close(actual, expected)
        for got, want in zip(
            torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(got, want)


# ---- refusals ------------------------------------------------------------------------------------------------------

X, W, B = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        (("x", W, W), {}, TypeError, "lrt_conv2d: x must be a tensor, got str"),
        ((X.int(), W, W), {}, TypeError, "lrt_conv2d: x must have one of the dtypes .* got torch.int32"),
        ((X[0, 0], W, W), {}, ValueError, r"lrt_conv2d: x must be \[N, C, 2 sizes\] or \[C, 2 sizes\], got \(5, 5\)"),
        ((X, W, W), {"parameterization": "full"}, ValueError, "parameterization must be one of .* got 'full'"),
        ((X, None, W), {}, ValueError, "lrt_conv2d: weight is missing for parameterization 'additive'"),
        ((X, W, W), {"parameterization": "variance"}, ValueError, "weight must be None for parameterization"),
        ((X, W.double(), W), {}, TypeError, "lrt_conv2d: weight must be torch.float32 beside x"),
        ((X, W, W.to("meta")), {}, ValueError, "lrt_conv2d: scale must be on x's device cpu, got meta"),
        ((X, W[0], W[0]), {}, ValueError, r"weight must be \[O, C / groups, 2 kernel sizes\], got \(4, 3, 3\)"),
        ((X, W, W), {"groups": None}, TypeError, "groups must be an int, got None"),
        ((X, W, W), {"groups": 4}, ValueError, r"groups=4 must divide the channels of weight \(6, 4, 3, 3\)"),
        ((X, W, W), {"groups": 2}, ValueError, "x must have 8 channels for weight .* groups=2, got"),
        ((X, W, W[:2]), {}, ValueError, r"scale must be \(6, 4, 3, 3\) for parameterization 'additive', got \(2,"),
        ((X, W, W), {"parameterization": "neuron"}, ValueError, r"scale must be \(6,\) for parameterization 'neuron'"),
        ((X, W, W, B[:2]), {}, ValueError, r"lrt_conv2d: bias must be \(6,\), got \(2,\)"),
        ((X, W, W, B.double()), {}, TypeError, "lrt_conv2d: bias must be torch.float32 beside x"),
        ((X, W, W), {"stride": (1, 2, 3)}, ValueError, "lrt_conv2d: stride must be an int or 2 of them"),
        ((X, W, W), {"stride": 0}, ValueError, "lrt_conv2d: stride must be at least 1, got 0"),
        ((X, W, W), {"stride": True}, ValueError, "lrt_conv2d: stride must be an int or 2 of them, got True"),
        ((X, W, W), {"dilation": (1, -1)}, ValueError, r"lrt_conv2d: dilation must be at least 1, got \(1, -1\)"),
        ((X, W, W), {"padding": -1}, ValueError, "lrt_conv2d: padding must be at least 0, got -1"),
        ((X, W, W), {"dilation": 50}, ValueError, "lrt_conv2d: x must be larger for kernel sizes"),
        ((X, W, W), {"stride": 1.5}, ValueError, "lrt_conv2d: stride must be an int or 2 of them, got 1.5"),
        ((X, W, W), {"dilation": (1.5, 1)}, ValueError, "lrt_conv2d: dilation must be an int or 2 of them"),
        ((X, W, W), {"padding": "full"}, ValueError, "padding must be 'same', 'valid' or ints, got 'full'"),
        ((X, W, W), {"padding": "same", "stride": 2}, ValueError, "padding='same' is for stride 1, got stride"),
        (
            (X, W, W),
            {"channel_offset": 1},
            ValueError,
            r"channel_offset must lie in \[0, channels_total - 6\], got 1 of 6",
        ),
        ((X, W, W), {"channels_total": 5}, ValueError, "channel_offset must lie in .* got 0 of 5"),
        ((X, W, W), {"channels_total": 7.0}, TypeError, "lrt_conv2d: channels_total must be an int, got float"),
        ((X, W, W), {"row_offset": -1}, ValueError, "lrt_conv2d: row_offset must lie in"),
        ((X, W, W), {"sample": 2**32}, ValueError, "lrt_conv2d: sample must lie in"),
        ((X, W, W), {"seed": 1.5}, TypeError, "lrt_conv2d: seed must be an int or a 0-d int64 tensor, got float"),
    ],
)
def test_lrt_conv_bad_inputs(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.lrt_conv2d(*arguments, **{"parameterization": "additive", **options})
