"""The CUDA kernels of gaussian_weights on a GPU: the bits of the CPU's, no synchronisation, CUDA graphs.

test_gaussian_weights_cuda.py has what needs no GPU.
"""

import pytest
import torch
from common import BF16, F16, F32, F64
from test_gaussian_weights_cuda import SHAPES, SHARED, tensors_of

import losssurf_fast as lsf
from losssurf_fast.ops import gaussian_weights, philox_normal
from losssurf_fast.ops.gaussian_weights import PRIORS
from losssurf_fast.ops.lrt import PARAMETERIZATIONS

pytestmark = pytest.mark.gpu
NAMES = PARAMETERIZATIONS * 200
LIST = [SHAPES[i % len(SHAPES)] if i < 60 else (i % 7 + 1, i % 5) for i in range(len(NAMES))]


def leaves(device, dtype=F32, scale_dtype=F32, names=NAMES, shapes=LIST):
    """(weights with None, scales, grads) of a list; the parameters are trained."""
    weights, scales, grads = tensors_of(names, shapes, dtype, scale_dtype)
    move = lambda list_of_tensors: [t.to(device) for t in list_of_tensors]
    found = iter([t.requires_grad_() for t in move(weights)])
    scales = [t.requires_grad_() for t in move(scales)]
    return [None if name == "variance" else next(found) for name in names], scales, move(grads)


def step(weights, scales, grads, prior, seed=3, names=NAMES):
    """(draws, KL, gradients to weights, gradients to scales)"""
    drawn, kl = gaussian_weights(weights, scales, names, seed, prior=prior, prior_std=0.7)
    means = [w for w in weights if w is not None]
    outputs = [*drawn, kl] if kl.requires_grad else drawn
    grads = [*grads, torch.full_like(kl, 1.5)][: len(outputs)]
    found = torch.autograd.grad(outputs, [*means, *scales], grads)
    return drawn, kl, found[: len(means)], found[len(means) :]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.is_cuda and a.dtype == b.dtype
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=0, atol=0, equal_nan=True)


def assert_equals_cpu(found, expected, names=NAMES):
    """The bits of draws and of gradients of their own; sums are taken in another order."""
    own = [name not in SHARED for name in names]
    assert_same(found[0], expected[0])
    assert_same(found[2], expected[2])
    for ours, wanted, each in zip(found[3], expected[3], own, strict=True):
        if each:
            assert_same([ours], [wanted])
        else:
            torch.testing.assert_close(ours.cpu(), wanted)
    torch.testing.assert_close(found[1].cpu(), expected[1])


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype, scale_dtype", [(F32, F32), (BF16, F32), (F16, F16), (BF16, BF16)])
def test_equals_cpu(dtype, scale_dtype, prior):
    found, expected = (step(*leaves(device, dtype, scale_dtype), prior) for device in ("cuda", "cpu"))
    assert_equals_cpu(found, expected)


def test_sums_are_deterministic():
    given = leaves("cuda")
    (_, kl, _, scales), (_, again, _, more) = (step(*given, "normal") for _ in range(2))
    assert torch.equal(kl, again) and all(map(torch.equal, scales, more))


def test_double_takes_the_reference():
    names, shapes = PARAMETERIZATIONS, [(5, 7)] * 5
    found, expected = (
        step(*leaves(device, F64, F64, names, shapes), "normal", names=names) for device in ("cuda", "cpu")
    )
    for ours, wanted in zip((*found[0], *found[2], *found[3]), (*expected[0], *expected[2], *expected[3]), strict=True):
        assert ours.dtype == F64
        torch.testing.assert_close(ours.cpu(), wanted)
    torch.testing.assert_close(found[1].cpu(), expected[1])


def test_in_a_graph():
    weights, scales, grads = leaves("cuda")
    seed = torch.tensor(1, device="cuda")
    step(weights, scales, grads, "normal", seed)  # before the capture: loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(weights, scales, grads, "normal", seed)
    for value in (4, -9):
        seed.fill_(value)
        graph.replay()
        assert_equals_cpu(found, step(*leaves("cpu"), "normal", value))


@pytest.mark.parametrize("prior", PRIORS)
def test_nothing_waits_for_the_gpu(prior):
    given, seed = leaves("cuda"), torch.tensor(1, device="cuda")
    step(*given, prior, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given, prior, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles():
    weights, scales, _ = leaves("cuda", names=PARAMETERIZATIONS, shapes=[(5, 7)] * 5)
    parameters = [*(w for w in weights if w is not None), *scales]

    def loss(seed):
        drawn, kl = gaussian_weights(weights, scales, PARAMETERIZATIONS, seed, prior="normal")
        return sum(t.square().sum() for t in drawn) + kl

    seed = torch.tensor(1, device="cuda")
    expected = torch.autograd.grad(loss(seed), parameters)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(seed), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["gaussian_weights", "gaussian_weights_backward"])
def test_kernel_for(op):
    assert lsf.kernel_for(op, "cuda") == "CUDA C++"


def test_refuses():
    on_gpu, on_cpu = torch.zeros(3, device="cuda"), torch.zeros(3)
    with pytest.raises(ValueError, match=r"weights\[0\] must be on the seed's device, cuda:0, got cpu"):
        gaussian_weights([on_cpu], [on_gpu], ["additive"])
    with pytest.raises(ValueError, match="gaussian_weights: weights and scales must be on the seed's cuda:0, got cpu"):
        torch.ops.losssurf_fast.gaussian_weights(
            [on_cpu], [on_gpu], ["additive"], torch.tensor(1, device="cuda"), 0, 0, "none", 1.0
        )


@pytest.mark.slow  # 18 GB
def test_past_int32():
    """The last weights of a long tensor have the noise of their places; one scale sums over all of them."""
    n = 2**31 + 10
    weight = torch.ones(n, device="cuda", dtype=BF16, requires_grad=True)
    scale = torch.zeros(1, device="cuda", requires_grad=True)
    (drawn,), _ = gaussian_weights([weight], [scale], ["layer"], 1)
    noise = philox_normal(10, 1, col_offset=n - 10, device="cuda")
    torch.testing.assert_close(drawn[-10:], (1 + noise).to(BF16), rtol=0, atol=0)
    grad, to_scale = torch.autograd.grad(drawn, [weight, scale], torch.ones_like(drawn))
    torch.testing.assert_close(grad[-10:], (1 + noise).to(BF16), rtol=0, atol=0)
    assert 0 < abs(to_scale.item()) < 2.5 * n**0.5  # five standard deviations
