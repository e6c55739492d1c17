"""Triton kernels of the kl family: on a GPU compiled, elsewhere in Triton's interpreter, which has no bf16."""

import itertools
import math

import pytest
import torch
from common import BF16, F16, F32, assert_as_good_as_eager, double

import losssurf_fast as lsf

pytest.importorskip("triton", reason="triton is not installed")

from test_kl import EXTREMES, NAMES, OPTIONS, PRIORS, functions, sample
from test_triton import DEVICE, ON_GPU, one_rounding_per_fma  # noqa: F401

from losssurf_fast.ops import kl_triton

DTYPES = [F32, F16] + ([BF16] if ON_GPU else [])
SHAPES = [(1,), (17, 33), (2048,), (2049,), (0,)]


def triton_pass(name, params, weights, want_slopes=True):
    prior_std = OPTIONS[name][0] if name == "normal" else 1.0
    params, weights = ([t.to(DEVICE).contiguous() for t in tensors] for tensors in (params, weights))
    value, slopes = kl_triton.kl_pass(name, params, weights, [1] * len(params), want_slopes, prior_std)
    return value.cpu(), [s.cpu() for s in slopes]


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kl_triton_forward_and_slopes(name, weight):
    """As good as eager; the slopes have the C++ kernels' bits."""
    _, _, cpp, reference = functions(name)
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        params, weights = sample(shape, dtype, weight)
        value, slopes = triton_pass(name, params, weights)
        eager_value, eager_slopes = reference(params, weights)
        exact_value, exact_slopes = reference(double(params), double(weights))
        assert_as_good_as_eager(value, eager_value, exact_value)
        for ours, eager, exact in zip(slopes, eager_slopes, exact_slopes, strict=True):
            assert_as_good_as_eager(ours, eager, exact)
        for ours, theirs in zip(slopes, cpp(params, weights)[1], strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(triton_pass(name, params, weights, False)[0], value)


def test_kl_triton_list_and_counts():
    params = [sample(shape, dtype)[0][0] for shape, dtype in (((5000,), F32), ((0,), F32), ((3,), F16))]
    counts = [2, 1, 1000]
    value, _ = kl_triton.kl_pass("exact", [p.to(DEVICE).contiguous() for p in params], [], counts, False)
    expected = functions("exact")[1]
    total = sum(c * expected([p.double()], []) for c, p in zip(counts, params, strict=True))
    torch.testing.assert_close(value.cpu().double(), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PRIORS)
def test_kl_triton_extremes(name):
    log_alpha = torch.tensor([*EXTREMES[1:-1], float("inf"), float("nan")])
    for ours, theirs in zip(triton_pass(name, [log_alpha], [])[1], functions(name)[2]([log_alpha], [])[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    weight = torch.tensor([0.0, -0.0, 1e-7, 1e-38, 1e-40, -1e-45])
    log_sigma2 = torch.tensor([-200.0, 3.0, 0.0, -50.0, -184.0, -207.0])
    value, slopes = triton_pass(name, [log_sigma2], [weight])
    assert torch.isfinite(value) and all(torch.isfinite(s).all() for s in slopes)
    assert all((s[:2] == 0).all() for s in slopes)
    assert torch.equal(slopes[0], functions(name)[2]([log_sigma2], [weight])[1][0])


def test_kl_triton_normal_under_a_narrow_prior():
    zeros = torch.zeros(5, device=DEVICE)
    for weights in ([], [zeros]):
        value, slopes = kl_triton.kl_pass("normal", [zeros], weights, [1], True, 1e-30)
        assert value.item() == math.inf and all(s.isfinite().all() for s in slopes)


def test_kl_triton_backward():
    slopes = [torch.randn(3000).to(DEVICE), torch.randn(5).half().to(DEVICE), torch.zeros(0, device=DEVICE)]
    for grad in (torch.tensor(0.5, device=DEVICE), torch.tensor(1.0, device=DEVICE)):
        counts = [1, 4, 1]
        expected = [(s.float() * (float(grad) * c)).to(s.dtype) for s, c in zip(slopes, counts, strict=True)]
        out = kl_triton.kl_backward_triton(slopes, grad, counts)
        assert all(map(torch.equal, out, expected))


def test_kl_triton_kernel_for():
    for name in ("kl_log_uniform", "kl_log_uniform_slopes", "kl_ard", "kl_normal_slopes", "kl_backward"):
        assert lsf.kernel_for(name, "cuda") == "Triton"
