"""gaussian_weights on the CPU: draws, KL and gradients against the reference, for every instruction set and dtype."""

import itertools
import math

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, assert_as_good_as_eager, double, instruction_set, scale_shape

from losssurf_fast import ops
from losssurf_fast.ops.gaussian_weights import (
    MULTIPLICATIVE,
    PRIORS,
    gaussian_weights_backward_reference,
    gaussian_weights_reference,
)
from losssurf_fast.ops.lrt import PARAMETERIZATIONS

OP = torch.ops.losssurf_fast
SEED = torch.tensor(20261125)
SHAPES = [(17, 33), (1, 1), (3, 700), (700, 3), (2, 3, 5, 5), (0, 4), (4, 0)]
WITH_KL = [prior for prior in PRIORS if prior != "none"]


def sample(parameterization, shape, dtype=F32, scale_dtype=None, seed=0):
    """(weights, scales) of one tensor; the weight is a slice of a wider one, so its rows are not adjacent."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)
    weight = draw(*shape[:-1], shape[-1] + 3)[..., 1 : shape[-1] + 1].mul(0.3).to(dtype)
    scale_size = {"layer": (1,), "neuron": shape[:1]}.get(parameterization, shape)
    scale = (draw(*scale_size) - 2).to(scale_dtype or dtype)
    return ([] if parameterization == "variance" else [weight]), [scale]


def arguments(parameterization, prior, row_offset=3, number=2):
    return [parameterization], SEED, row_offset, number, prior, 0.7


def assert_close_to_exact(actual, eager, exact):
    """As good as eager; a single number in a few units of the last place, for eager's own error of it is luck."""
    if actual.numel() == 1 and actual.dtype != F64:
        assert actual.dtype == eager.dtype and actual.shape == exact.shape
        few = 8 * torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.double(), exact, rtol=few, atol=few)
    else:
        assert_as_good_as_eager(actual, eager, exact)


def splitter(count, options):
    """function(weights, scales, *options) -> a function of one list, of which ``count`` are weights."""
    return lambda function: lambda tensors: function(list(tensors[:count]), list(tensors[count:]), *options)


def gradients(function, tensors, grads):
    """(draws, KL, gradients) of a function of leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    drawn, kl = function(leaves)
    outputs = [*drawn, kl] if kl.requires_grad else drawn
    found = torch.autograd.grad(outputs, leaves, grads[: len(outputs)])
    return [t.detach() for t in (*drawn, kl)], found


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_gaussian_weights_as_good_as_eager(parameterization, prior):
    """Forward and backward, each instruction set, dtype and shape; half-precision weights beside fp32 scales too."""
    for shape, (dtype, scale_dtype) in itertools.product(SHAPES, [(F64, F64), (F32, F32), (BF16, F32), (F16, F16)]):
        weights, scales = sample(parameterization, shape, dtype, scale_dtype)
        tensors = [*weights, *scales]
        split = splitter(len(weights), arguments(parameterization, prior))
        grad = torch.randn(shape).to(weights[0].dtype if weights else scale_dtype)
        wide = [grad.double(), torch.tensor(1.5, dtype=F64)]
        exact, exact_grads = gradients(split(gaussian_weights_reference), double(tensors), wide)
        kl_grad = torch.tensor(1.5, dtype=F64 if dtype == F64 else F32)
        eager, eager_grads = gradients(split(gaussian_weights_reference), tensors, [grad, kl_grad])
        for name in INSTRUCTION_SETS:
            with instruction_set(name) as available:
                if not available:
                    continue
                ours, our_grads = gradients(split(OP.gaussian_weights), tensors, [grad, kl_grad])
            results = zip((*ours, *our_grads), (*eager, *eager_grads), (*exact, *exact_grads), strict=True)
            for actual, plain, truth in results:
                assert_close_to_exact(actual, plain, truth)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_gaussian_weights_backward_reference_is_the_gradient(parameterization, prior):
    weights, scales = sample(parameterization, (4, 5), F64)
    options = arguments(parameterization, prior)
    tensors = [*weights, *scales]
    grad, kl_grad = torch.randn(4, 5, dtype=F64), torch.tensor(1.5, dtype=F64)
    split = lambda t: gaussian_weights_reference(t[: len(weights)], t[len(weights) :], *options)
    _, expected = gradients(split, tensors, [grad, kl_grad])
    names, *rest = options
    found = gaussian_weights_backward_reference([grad], kl_grad, weights, scales, names, [True] * len(tensors), *rest)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_gaussian_weights_noise_is_philox_normal(dtype):
    """Bit for bit: means of 0 and variances of 1. Row = place in the list, column = flat index."""
    shapes = [(3, 5), (2, 1500), (7,), (2, 2, 3, 3)]
    scales = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    for name in INSTRUCTION_SETS:
        with instruction_set(name) as available:
            if not available:
                continue
            drawn, kl = ops.gaussian_weights([None] * 4, scales, ["variance"] * 4, SEED, row_offset=5, sample=9)
        for row, (draw, shape) in enumerate(zip(drawn, shapes, strict=True), 5):
            noise = ops.philox_normal(math.prod(shape), SEED, row_offset=row, sample=9, dtype=dtype)
            assert torch.equal(draw, noise.view(shape))
        assert kl == 0


def test_gaussian_weights_noise_does_not_depend_on_the_list():
    pairs = [sample("additive", shape, seed=i) for i, shape in enumerate([(9, 7), (5, 300), (1, 3)])]
    weights, scales = [w[0] for w, _ in pairs], [s[0] for _, s in pairs]
    together, kl = ops.gaussian_weights(weights, scales, ["additive"] * 3, 1, prior="normal")
    alone = [
        ops.gaussian_weights([w], [s], ["additive"], 1, prior="normal", row_offset=i)
        for i, (w, s) in enumerate(zip(weights, scales, strict=True))
    ]
    assert all(torch.equal(a, b[0]) for a, (b, _) in zip(together, alone, strict=True))
    torch.testing.assert_close(kl, sum(part for _, part in alone))


def test_gaussian_weights_does_not_depend_on_threads_or_memory_format():
    weights, scales = sample("neuron", (16, 8, 9, 9))
    channels_last = [t.to(memory_format=torch.channels_last) for t in weights]
    before = torch.get_num_threads()
    results = []
    try:
        for threads, means in ((1, weights), (2, channels_last)):
            torch.set_num_threads(threads)
            grads = [torch.ones_like(weights[0]), torch.tensor(2.0)]
            call = lambda t: OP.gaussian_weights(list(t[:1]), list(t[1:]), ["neuron"], SEED, 0, 0, "normal", 1.0)
            results.append(gradients(call, [*means, *scales], grads))
    finally:
        torch.set_num_threads(before)
    (one, one_grads), (two, two_grads) = results
    assert all(map(torch.equal, (*one, *one_grads), (*two, *two_grads)))


@pytest.mark.parametrize("prior", WITH_KL)
def test_gaussian_weights_instruction_sets_agree_on_sums(prior):
    """The KL and the gradients of shared scales are summed in an order that no set changes."""
    weights, scales = sample("neuron", (5, 1000))
    found = []
    for name in INSTRUCTION_SETS:
        with instruction_set(name) as available:
            if available:
                call = lambda t: OP.gaussian_weights(list(t[:1]), list(t[1:]), *arguments("neuron", prior))
                found.append(gradients(call, [*weights, *scales], [torch.ones(5, 1000), torch.tensor(1.0)]))
    for results, grads in found[1:]:
        assert all(map(torch.equal, (*results, *grads), (*found[0][0], *found[0][1])))


def test_gaussian_weights_statistics():
    """Mean and variance over a million draws, within five standard errors."""
    n = 10**6
    for parameterization, mean, log_value, variance in [
        ("additive", 0.5, math.log(0.09), 0.09),
        ("weight", -0.5, math.log(0.16), 0.04),
    ]:
        weight, scale = torch.full((n,), mean), torch.full((n,), log_value)
        (drawn,), _ = ops.gaussian_weights([weight], [scale], [parameterization], 7)
        assert abs(drawn.mean().item() - mean) < 5 * math.sqrt(variance / n)
        assert abs(drawn.var().item() - variance) < 5 * variance * math.sqrt(2 / n)


# ---- KL -------------------------------------------------------------------------------------------------------------


def divergence(prior, parameterization, weight, scale):
    """By the functions of the kl family."""
    multiplicative = parameterization in MULTIPLICATIVE
    if prior == "normal":
        spread = scale.view(-1, *[1] * (weight.dim() - 1)) if parameterization == "neuron" else scale
        log_sigma2 = spread + weight.square().log() if multiplicative else scale
        return ops.kl_normal(None if parameterization == "variance" else weight, log_sigma2, 0.7)
    function = {
        "log_uniform": ops.kl_log_uniform,
        "log_uniform_approximate": lambda *a, **k: ops.kl_log_uniform(*a, exact=False, **k),
        "ard": ops.kl_ard,
    }[prior]
    if multiplicative:
        return function(scale, weight.numel())
    return function(scale, weight=weight) if parameterization == "additive" else torch.zeros((), dtype=scale.dtype)


@pytest.mark.parametrize("prior", WITH_KL)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_gaussian_weights_kl_is_that_of_the_kl_family(parameterization, prior, dtype):
    weights, scales = sample(parameterization, (13, 700), dtype)
    leaves = [t.clone().requires_grad_() for t in (*weights, *scales)]
    weight = leaves[0] if weights else None
    _, kl = ops.gaussian_weights([weight], leaves[-1:], [parameterization], 1, prior=prior, prior_std=0.7)
    expected = divergence(prior, parameterization, weight, leaves[-1])
    torch.testing.assert_close(kl, expected)
    if expected.requires_grad:
        found = torch.autograd.grad(kl, leaves, allow_unused=True)
        for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, allow_unused=True), strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@pytest.mark.parametrize("dtype", [F64, F32, F16])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("parameterization", ("layer", "neuron", "weight", "additive"))
def test_gaussian_weights_of_zero_and_of_no_noise(parameterization, prior, dtype):
    """A weight of 0, one near it, and a variance of 0: finite draws and finite gradients."""
    weight = torch.tensor([[0.0, -0.0, torch.finfo(dtype).tiny, 1.0]], dtype=dtype, requires_grad=True)
    value = -math.inf if prior == "none" else -12.0
    scale = torch.full(scale_shape(parameterization, 1, 4), value, dtype=dtype, requires_grad=True)
    (drawn,), kl = ops.gaussian_weights([weight], [scale], [parameterization], 1, prior=prior)
    grads = torch.autograd.grad(drawn.float().sum() + kl, [weight, scale])
    assert all(torch.isfinite(t).all() for t in (drawn, kl, *grads))
    if prior == "none":
        assert torch.equal(drawn, weight) and torch.equal(grads[0], torch.ones_like(weight))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
def test_gaussian_weights_gradcheck(prior):
    """All parameterizations in one list; once and twice."""
    pairs = [sample(name, (2, 3), F64, seed=i) for i, name in enumerate(PARAMETERIZATIONS)]
    weights = [w[0].contiguous() if w else None for w, _ in pairs]
    leaves = [t.clone().requires_grad_() for t in (*(w for w in weights if w is not None), *(s[0] for _, s in pairs))]

    def function(*tensors):
        found = iter(tensors[: len(tensors) - 5])
        means = [None if name == "variance" else next(found) for name in PARAMETERIZATIONS]
        drawn, kl = ops.gaussian_weights(means, tensors[-5:], PARAMETERIZATIONS, SEED, prior=prior)
        return *drawn, kl

    assert torch.autograd.gradcheck(function, leaves)
    # exp is the only nonlinearity in half of these directions: a coarser step than the default finds it
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4)


def test_gaussian_weights_gradients_only_where_they_are_needed():
    (weight,), (scale,) = sample("additive", (5, 7))
    grad = torch.randn(5, 7)
    full = torch.autograd.grad(
        ops.gaussian_weights([weight.requires_grad_()], [scale.requires_grad_()], ["additive"], SEED, prior="normal")[
            0
        ],
        [weight, scale],
        grad,
    )
    for trained in range(2):
        tensors = [weight.detach(), scale.detach()]
        tensors[trained].requires_grad_()
        (drawn,), kl = ops.gaussian_weights(tensors[:1], tensors[1:], ["additive"], SEED, prior="normal")
        assert torch.equal(torch.autograd.grad(drawn, tensors[trained], grad)[0], full[trained])
    weight, scale = weight.detach(), scale.detach()
    (drawn,), kl = ops.gaussian_weights([weight], [scale], ["additive"], SEED, prior="normal")
    assert not drawn.requires_grad and not kl.requires_grad


def test_gaussian_weights_unused_draws_and_unused_kl():
    pairs = [sample("additive", (5, 7), seed=i) for i in range(2)]
    weights, scales = [w[0].requires_grad_() for w, _ in pairs], [s[0].requires_grad_() for _, s in pairs]
    drawn, kl = ops.gaussian_weights(weights, scales, ["additive"] * 2, SEED, prior="normal")
    grads = torch.autograd.grad(drawn[1].sum(), [*weights, *scales], retain_graph=True)
    assert not grads[0].any() and not grads[2].any() and torch.equal(grads[1], torch.ones(5, 7))
    expected = torch.autograd.grad(ops.kl_normal(weights, scales), [*weights, *scales])
    for ours, theirs in zip(torch.autograd.grad(kl, [*weights, *scales]), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gaussian_weights_saves_parameters_and_seed_alone():
    pairs = [sample("additive", (50, 70), seed=i) for i in range(2)]
    weights, scales = [w[0].contiguous().requires_grad_() for w, _ in pairs], [s[0].requires_grad_() for _, s in pairs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.gaussian_weights(weights, scales, ["additive"] * 2, SEED, prior="normal")
    assert set(saved) == {t.data_ptr() for t in (*weights, *scales, SEED)}


@pytest.mark.parametrize("prior", ["none", "normal", "ard"])
@pytest.mark.parametrize("parameterization", ["neuron", "additive", "variance"])
def test_gaussian_weights_batched_and_second_gradients(parameterization, prior):
    weights, scales = sample(parameterization, (3, 4), F64)
    leaves = [t.clone().requires_grad_() for t in (*weights, *scales)]
    drawn, _ = OP.gaussian_weights(leaves[: len(weights)], leaves[-1:], *arguments(parameterization, prior))
    grads = torch.randn(2, 3, 4, dtype=F64)
    batch = torch.autograd.grad(drawn, leaves, [grads], is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        single = torch.autograd.grad(drawn, leaves, grad, create_graph=True)
        for ours, theirs in zip(batch, single, strict=True):
            torch.testing.assert_close(ours[i], theirs)
    assert single[-1].requires_grad
