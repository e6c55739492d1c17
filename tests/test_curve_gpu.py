"""The CUDA kernels of the curve family on a GPU: the bits of the CPU's, no synchronisation, CUDA graphs.

test_curve_cuda.py has what needs no GPU.
"""

import pytest
import torch
from common import BF16, F16, F32, F64

import losssurf_fast as lsf
from losssurf_fast.ops import curve_coefficients, curve_weights

pytestmark = pytest.mark.gpu
DTYPES = (F64, F32, BF16, F16)
SHAPES = [(), (1,), (7,), (17, 63), (0, 3), (4096,), (3, 2731), (2, 3, 5, 7), (300, 257), *[(k,) for k in range(1500)]]


def bends_of(count, shapes=SHAPES):
    """K lists of tensors on the CPU, whose dtypes take turns."""
    generator = torch.Generator().manual_seed(count)
    draw = lambda p, shape: torch.randn(shape, generator=generator).to(DTYPES[p % len(DTYPES)])
    return [[draw(p, shape) for p, shape in enumerate(shapes)] for _ in range(count)]


def cuda(bends):
    return [[t.cuda() for t in tensors] for tensors in bends]


def trained(bends, *which):
    for j in which:
        bends[j] = [t.requires_grad_() for t in bends[j]]
    return [t for j in which for t in bends[j]]


def gradients(bends, coefficients, wanted):
    """Of a sum that weights every element differently."""
    weights = curve_weights(bends, coefficients)
    loss = sum((w.double() * torch.arange(w.numel(), device=w.device).view_as(w)).mean() for w in weights if w.numel())
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.is_cuda and a.dtype == b.dtype
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize("count", (2, 3, 5, 9, 700))
def test_weights_equal_cpu(count, dtype):
    bends, coefficients = bends_of(count, shapes=SHAPES[: 20 if count > 9 else None]), torch.randn(count, dtype=dtype)
    assert_same(curve_weights(cuda(bends), coefficients.cuda()), curve_weights(bends, coefficients))


@pytest.mark.parametrize("kind", ("bezier", "polychain"))
def test_bends_of_coefficient_0_are_not_read(kind):
    bends = bends_of(5)
    for t in (0.0, 0.3, 0.5, 1.0):
        coefficients = curve_coefficients(torch.tensor(t, device="cuda"), 5, kind)
        torch.testing.assert_close(coefficients.cpu(), curve_coefficients(t, 5, kind))
        expected = curve_weights(bends, coefficients.cpu())
        unread = [c == 0 for c in coefficients.tolist()]
        on_gpu = [
            [torch.full_like(x, torch.nan) if skip else x for x in tensors]
            for tensors, skip in zip(cuda(bends), unread, strict=True)
        ]
        assert_same(curve_weights(on_gpu, coefficients), expected)


@pytest.mark.parametrize("count", (2, 3, 5, 9))
def test_gradients_of_bends_equal_cpu(count):
    bends, coefficients = bends_of(count), torch.randn(count)
    on_gpu, which = cuda(bends), range(1, count)
    expected = gradients(bends, coefficients, trained(bends, *which))
    assert_same(gradients(on_gpu, coefficients.cuda(), trained(on_gpu, *which)), expected)


@pytest.mark.parametrize("count", (2, 3, 5, 9))
def test_gradients_of_coefficients(count):
    bends, coefficients = bends_of(count), torch.randn(count, dtype=F64)
    expected, on_gpu = gradients(bends, coefficients.requires_grad_(), coefficients), cuda(bends)
    found = [gradients(on_gpu, c := coefficients.detach().cuda().requires_grad_(), c)[0] for _ in range(2)]
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(*found)


def test_any_memory_format():
    bends = bends_of(3, shapes=[(4, 6, 5, 7)] * 5)
    for j, p in ((0, 0), (1, 0), (1, 1), (2, 2)):
        bends[j][p] = bends[j][p].to(memory_format=torch.channels_last)
    bends[0][4] = bends[0][4].mT.contiguous().mT
    on_gpu = cuda(bends)
    for each in (bends, on_gpu):
        each[1][3] = each[1][3][:1].expand(4, 6, 5, 7)
    coefficients = torch.randn(3)
    weights = curve_weights(on_gpu, coefficients.cuda())
    assert_same(weights, curve_weights(bends, coefficients))
    assert [w.stride() for w in weights] == [t.stride() for t in bends[0]]
    expected = gradients(bends, coefficients, trained(bends, 1))
    assert_same(gradients(on_gpu, coefficients.cuda(), trained(on_gpu, 1)), expected)


def test_in_a_graph():
    bends, coefficients = bends_of(3, shapes=SHAPES[:200]), torch.zeros(3, device="cuda", requires_grad=True)
    on_gpu = cuda(bends)
    trained(bends, 1), trained(on_gpu, 1)
    weights = curve_weights(on_gpu, coefficients)
    grads = [torch.randn_like(w) for w in weights]
    torch.autograd.grad(weights, [*on_gpu[1], coefficients], grads)  # before the capture: loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = curve_weights(on_gpu, coefficients)
        found = torch.autograd.grad(weights, [*on_gpu[1], coefficients], grads)
    for values in ([1.0, 0.0, 0.0], [0.25, 0.5, 0.25]):
        with torch.no_grad():
            coefficients.copy_(torch.tensor(values))
        graph.replay()
        on_cpu = torch.tensor(values, requires_grad=True)
        expected = curve_weights(bends, on_cpu)
        assert_same(weights, expected)
        *of_bends, of_coefficients = torch.autograd.grad(expected, [*bends[1], on_cpu], [g.cpu() for g in grads])
        assert_same(found[:-1], of_bends)
        torch.testing.assert_close(found[-1].cpu(), of_coefficients, rtol=1e-5, atol=1e-5)


def test_nothing_waits_for_the_gpu():
    bends, t = cuda(bends_of(3)), torch.tensor(0.3, device="cuda", requires_grad=True)
    wanted = [*trained(bends, 1), t]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind in ("bezier", "polychain"):
            weights = curve_weights(bends, curve_coefficients(t, 3, kind))
            torch.autograd.grad(weights, wanted, [torch.ones_like(w) for w in weights])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles():
    bends, t = cuda(bends_of(3, shapes=SHAPES[:20])), torch.tensor(0.3, device="cuda", requires_grad=True)
    wanted = [*trained(bends, 1), t]

    def loss(t):
        weights = curve_weights(bends, curve_coefficients(t, 3))
        return sum(w.double().square().sum() for w in weights)

    expected = torch.autograd.grad(loss(t), wanted)
    for a, b in zip(torch.autograd.grad(torch.compile(loss, fullgraph=True)(t), wanted), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["curve_weights", "curve_weights_backward"])
def test_kernel_for(op):
    assert lsf.kernel_for(op, "cuda") == "CUDA C++"


def test_refuses():
    on_gpu, on_cpu = torch.zeros(3, device="cuda"), torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"curve_weights: bends\[1\]\[0\] must be on the coefficients' cuda:0, got cpu"
    ):
        curve_weights([[on_gpu], [on_cpu]], torch.zeros(2, device="cuda"))
    with pytest.raises(
        ValueError, match=r"curve_weights: bends\[0\]\[0\] must be on the coefficients' cpu, got cuda:0"
    ):
        curve_weights([[on_gpu], [on_gpu]], torch.zeros(2))
    with pytest.raises(ValueError, match="curve_weights: coefficients must be at most 2324 on a GPU, got 3000"):
        curve_weights([[on_gpu]] * 3000, torch.zeros(3000, device="cuda"))


@pytest.mark.slow  # 26 GB
def test_past_int32():
    n = 2**31 + 10
    bends = [torch.full((n,), value, device="cuda", dtype=BF16) for value in (1.0, 2.0)]
    bends[1].requires_grad_()
    coefficients = torch.tensor([1.0, 0.25], device="cuda", requires_grad=True)
    (weight,) = curve_weights([bends[:1], bends[1:]], coefficients)
    assert weight.min() == weight.max() == 1.5
    grad, of_coefficients = torch.autograd.grad(weight, (bends[1], coefficients), torch.full_like(weight, 2))
    assert grad.min() == grad.max() == 0.5
    torch.testing.assert_close(of_coefficients, torch.tensor([2.0 * n, 4.0 * n], device="cuda"))
