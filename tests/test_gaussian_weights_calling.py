"""gaussian_weights as users call it: transforms, compile, refusals."""

import math

import pytest
import torch
from common import BF16, F32, F64
from test_gaussian_weights import OP, SEED, sample

import losssurf_fast as lsf
from losssurf_fast import ops
from losssurf_fast.ops.gaussian_weights import PRIORS
from losssurf_fast.ops.lrt import PARAMETERIZATIONS


def whole_list(dtype=F32, shape=(3, 4)):
    """(weights without None, scales) with every parameterization."""
    pairs = [sample(name, shape, dtype, seed=i) for i, name in enumerate(PARAMETERIZATIONS)]
    return [w[0].contiguous() for w, _ in pairs if w], [s[0] for _, s in pairs]


def call(tensors, prior="normal"):
    found = iter(tensors[:-5])
    weights = [None if name == "variance" else next(found) for name in PARAMETERIZATIONS]
    return ops.gaussian_weights(weights, tensors[-5:], PARAMETERIZATIONS, SEED, prior=prior)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_gaussian_weights_opcheck(prior, grad):
    for dtype in (F32, BF16):
        weights, scales = whole_list(dtype)
        for t in (*weights, *scales):
            t.requires_grad_(grad)
        arguments = (weights, scales, list(PARAMETERIZATIONS), SEED, 2, 1, prior, 0.7)
        torch.library.opcheck(OP.gaussian_weights, arguments)
        grads = [torch.randn(3, 4).to(dtype) for _ in scales]
        needed = [i % 3 != 1 for i in range(len(weights) + len(scales))]
        names, *rest = arguments[2:]
        with torch.no_grad():
            backward = (grads, torch.tensor(2.0), [t.detach() for t in weights], [t.detach() for t in scales])
            torch.library.opcheck(OP.gaussian_weights_backward, (*backward, names, needed, *rest))


def test_gaussian_weights_func_transforms_and_forward_mode():
    weights, scales = whole_list(F64)
    inputs = (*weights, *scales)
    loss = lambda *tensors: sum(t.square().sum() for t in call(tensors)[0]) + call(tensors)[1]
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(torch.func.grad(loss, argnums=tuple(range(9)))(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    slope = sum((e * t).sum() for e, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, inputs, tangents)[1], slope)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gaussian_weights_compile(backend):
    leaves = [t.requires_grad_() for tensors in whole_list() for t in tensors]
    loss = lambda *tensors: sum(t.square().sum() for t in call(tensors)[0]) + call(tensors)[1]
    value, expected = torch.compile(loss, fullgraph=True, backend=backend)(*leaves), loss(*leaves)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gaussian_weights_autocast_does_not_touch_it():
    (weight,), (scale,) = sample("additive", (5, 7))
    with torch.autocast("cpu", BF16):
        (drawn,), kl = ops.gaussian_weights([weight], [scale], ["additive"], 1, prior="normal")
    expected, expected_kl = ops.gaussian_weights([weight], [scale], ["additive"], 1, prior="normal")
    assert torch.equal(drawn, expected[0]) and torch.equal(kl, expected_kl)


def test_gaussian_weights_seed_is_drawn_from_the_default_generator():
    scale = torch.zeros(50)
    draw = lambda: ops.gaussian_weights([None], [scale], ["variance"])[0][0]
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(first, second)


def test_gaussian_weights_kernel_for():
    for name in ("gaussian_weights", "gaussian_weights_backward"):
        assert lsf.kernel_for(name, "cpu").startswith("C++")


W, S = torch.randn(3, 4), torch.randn(3, 4)
draw = ops.gaussian_weights


@pytest.mark.parametrize(
    "function,error,message",
    [
        (lambda: draw(W, [S], ["additive"]), TypeError, "weights must be a sequence of tensors, got Tensor"),
        (lambda: draw([W], S, ["additive"]), TypeError, "scales must be a sequence of tensors, got Tensor"),
        (lambda: draw([W], [3], ["additive"]), TypeError, r"scales\[0\] must be a tensor, got int"),
        (lambda: draw([3], [S], ["additive"]), TypeError, r"weights\[0\] must be a tensor, got int"),
        (lambda: draw([], [], []), ValueError, "scales must hold at least one tensor, got none"),
        (
            lambda: draw([W], [S], "additive"),
            TypeError,
            "parameterizations must be a sequence of names, got 'additive'",
        ),
        (lambda: draw([W, W], [S], ["additive"]), ValueError, "weights must hold 1 entries like scales, got 2"),
        (lambda: draw([W], [S], []), ValueError, "parameterizations must hold 1 entries like scales, got 0"),
        (lambda: draw([W], [S], ["other"]), ValueError, r"parameterizations\[0\] must be one of .*, got 'other'"),
        (lambda: draw([W], [S], ["variance"]), ValueError, r"weights\[0\] must be None for 'variance', got Tensor"),
        (
            lambda: draw([None], [S], ["additive"]),
            ValueError,
            r"weights\[0\] must be a tensor for 'additive', got None",
        ),
        (
            lambda: draw([W], [S[0]], ["additive"]),
            ValueError,
            r"scales\[0\] must have the shape \(3, 4\) of 'additive'",
        ),
        (lambda: draw([W], [S[0]], ["neuron"]), ValueError, r"the shape \(3,\) of 'neuron', got \(4,\)"),
        (lambda: draw([W], [S[0]], ["layer"]), ValueError, r"the shape \(1,\) of 'layer', got \(4,\)"),
        (lambda: draw([W[0, 0]], [S[0, 0]], ["neuron"]), ValueError, r"weights\[0\] must have outputs .* got a 0-d"),
        (lambda: draw([W.int()], [S], ["additive"]), TypeError, r"weights\[0\] must have one of the dtypes .*int32"),
        (lambda: draw([W], [S.int()], ["additive"]), TypeError, r"scales\[0\] must have one of the dtypes .*int32"),
        (
            lambda: draw([W.double()], [S], ["additive"]),
            TypeError,
            "must both be float64 or neither, got torch.float64",
        ),
        (
            lambda: draw([W.to("meta")], [S], ["additive"]),
            ValueError,
            r"weights\[0\] must be on the seed's device, cpu",
        ),
        (lambda: draw([W], [S], ["additive"], "1"), TypeError, "seed must be an int or a 0-d int64 tensor, got str"),
        (lambda: draw([W], [S], ["additive"], 1, prior="x"), ValueError, "prior must be one of .*, got 'x'"),
        (lambda: draw([W], [S], ["additive"], 1, prior_std="1"), TypeError, "prior_std must be a number, got str"),
        (lambda: draw([W], [S], ["additive"], 1, prior_std=0.0), ValueError, "prior_std must lie in .*, got 0.0"),
        (lambda: draw([W], [S], ["additive"], 1, prior_std=math.nan), ValueError, "prior_std must lie in .*, got nan"),
        (lambda: draw([W], [S], ["additive"], 1, row_offset=-1), ValueError, "row_offset must lie in .*, got -1"),
        (lambda: draw([W], [S], ["additive"], 1, sample=1.0), TypeError, "sample must be an int, got float"),
    ],
)
def test_gaussian_weights_bad_inputs(function, error, message):
    with pytest.raises(error, match=f"gaussian_weights: .*{message}"):
        function()


@pytest.mark.parametrize("parameterization", ["weight", "additive"])
def test_gaussian_weights_kl_gradient_is_clamped_as_a_product(parameterization):
    """The slope of the KL to a weight near 0 is past float16, its share of an ELBO is not."""
    weight = torch.tensor([[3e-6, 1.0]], dtype=torch.float16, requires_grad=True)
    scale = torch.full((1, 2), -25.0 if parameterization == "additive" else 0.0, dtype=torch.float16)
    prior = "log_uniform" if parameterization == "additive" else "normal"

    def gradient(weight, scale, formula=ops.gaussian_weights):
        _, kl = formula([weight], [scale], [parameterization], 1, prior=prior)
        return torch.autograd.grad(kl, weight, torch.tensor(1e-4, dtype=kl.dtype))[0]

    exact = gradient(weight.detach().double().requires_grad_(), scale.double())
    assert exact[0, 0].abs() > 6.5504  # more than 1e-4 times the largest float16
    torch.testing.assert_close(gradient(weight, scale).double(), exact, rtol=2e-3, atol=1e-6)
