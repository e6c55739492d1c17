"""The CUDA kernels of gaussian_weights without a GPU (cuda_on_cpu.py): against the reference and the CPU's kernels."""

import ctypes
import itertools
import math

import pytest
import torch
from common import BF16, F16, F32, F64, double, scale_shape
from cuda_on_cpu import assert_same, build
from test_gaussian_weights import OP, SEED, arguments

import losssurf_fast as lsf
from losssurf_fast import ops as public
from losssurf_fast.ops.gaussian_weights import (
    PRIORS,
    gaussian_weights_backward_reference,
    gaussian_weights_reference,
)
from losssurf_fast.ops.lrt import PARAMETERIZATIONS

SHARED = ("layer", "neuron")
# Runs that end at a chunk's end, cross one or several, or are many in one; (1,) and (9,) have none in "neuron".
SHAPES = [(17, 33), (1, 1), (1,), (9,), (700, 3), (2, 2731), (4, 1024), (2, 3, 5, 5), (0, 4), (4, 0), (2, 6001)]
DTYPES = [(F32, F32), (BF16, F32), (F16, F16), (F32, BF16)]  # of weights and scales


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build("tests/gaussian_weights_glue.cpp", tmp_path_factory.mktemp("glue"), with_torch=True)


@pytest.fixture(scope="module")
def ops(path):
    """The operators of the CUDA build, on CPU tensors."""
    torch.ops.load_library(path)
    return torch.ops.losssurf_gaussian_on_cpu


def tensors_of(parameterizations, shapes=SHAPES, dtype=F32, scale_dtype=F32, seed=0):
    """(weights, scales, grads) of a list; every second tensor starts between two 16-byte words."""
    generator = torch.Generator().manual_seed(seed)
    place = itertools.count()

    def draw(shape, dtype):
        n, shift = math.prod(shape), next(place) % 2
        return torch.randn(n + shift, generator=generator).to(dtype)[shift:].view(shape)

    weights, scales, grads = [], [], []
    for name, shape in zip(parameterizations, shapes, strict=True):
        if name != "variance":
            weights.append(draw(shape, dtype) * 0.3)
        scales.append(draw(scale_shape(name, shape[0], 0) if name in SHARED else shape, scale_dtype) - 2)
        grads.append(draw(shape, scale_dtype if name == "variance" else dtype))
    return weights, scales, grads


def both(module, tensors, options, grads, grad_kl, needed=None):
    """(draws, KL, gradients to weights and scales) by the operators of a module."""
    weights, scales = tensors
    names, *rest = options
    drawn, kl = module.gaussian_weights(weights, scales, names, *rest)
    needed = [True] * (len(weights) + len(scales)) if needed is None else needed
    found = module.gaussian_weights_backward(grads, grad_kl, weights, scales, names, needed, *rest)
    return drawn, kl, found


class reference:
    gaussian_weights = staticmethod(gaussian_weights_reference)
    gaussian_weights_backward = staticmethod(gaussian_weights_backward_reference)


def assert_near(actual, exact, terms=1):
    """Within a few units of the largest element's last place; a sum of that many terms, also of its partial sums'."""
    if actual.numel():
        few, largest = 4 * torch.finfo(actual.dtype).eps, exact.abs().max().item()
        torch.testing.assert_close(actual.double(), exact.double(), rtol=0, atol=few * largest + 1e-7 * terms**0.5)


def assert_right(ops, tensors, names, prior, grads):
    """All results are right; draws and gradients of a weight's own have the bits of the CPU's kernels, whose sums over
    weights are in another order.
    """
    weights, scales = tensors
    options = names, *arguments("", prior)[1:]
    grad_kl = torch.tensor(1.5)
    drawn, kl, found = both(ops, tensors, options, grads, grad_kl)
    on_cpu, _, cpu_found = both(OP, tensors, options, grads, grad_kl)
    exact = both(reference, (double(weights), double(scales)), options, double(grads), grad_kl.double())
    assert_same(drawn, on_cpu)
    assert kl.dtype == F32
    assert_near(kl, exact[1])
    for draw, truth in zip(drawn, exact[0], strict=True):
        assert_near(draw, truth)
    sums = [None] * len(weights) + [g.numel() if name in SHARED else None for name, g in zip(names, grads, strict=True)]
    for ours, cpu, truth, terms in zip(found, cpu_found, exact[2], sums, strict=True):
        assert ours.is_contiguous() and ours.dtype == cpu.dtype
        if terms is None:
            assert_same([ours], [cpu])
        assert_near(ours, truth, terms or 1)


# ---- draws and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype, scale_dtype", DTYPES)
def test_kernels_equal_reference(ops, parameterization, prior, dtype, scale_dtype):
    names = [parameterization] * len(SHAPES)
    *tensors, grads = tensors_of(names, SHAPES, dtype, scale_dtype)
    assert_right(ops, tensors, names, prior, grads)


@pytest.mark.parametrize("prior", PRIORS)
def test_lists_of_all_parameterizations_and_dtypes(ops, prior):
    weights, scales, grads, names = [], [], [], []
    for seed, (dtype, scale_dtype) in enumerate(DTYPES):
        some = list(PARAMETERIZATIONS)
        w, s, g = tensors_of(some, [(5, 7), (1, 1), (3, 700), (2, 2731), (700, 3)], dtype, scale_dtype, seed)
        weights += w
        scales += s
        grads += [t.to(F32 if i % 2 else t.dtype) for i, t in enumerate(g)]  # autograd may bring another dtype
        names += some
    assert_right(ops, (weights, scales), names, prior, grads)


def test_noise_is_philox_normal(ops):
    """Bit for bit, also of rows past 2^32 and of negative seeds."""
    shapes = [(3, 5), (2, 1500), (7,), (0,), (2, 2, 3, 3)]
    for dtype, seed, row, sample in [(F32, 5, 0, 0), (BF16, -3, 2**40, 9), (F16, 2**40 + 1, 7, 2**32 - 1)]:
        scales = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        names = ["variance"] * len(shapes)
        drawn, kl = ops.gaussian_weights([], scales, names, torch.tensor(seed), row, sample, "none", 1.0)
        assert kl == 0 and kl.dtype == F32
        for p, (draw, shape) in enumerate(zip(drawn, shapes, strict=True)):
            noise = public.philox_normal(math.prod(shape), seed, row_offset=row + p, sample=sample, dtype=dtype)
            assert torch.equal(draw, noise.view(shape))


@pytest.mark.parametrize("parameterization", ["additive", "neuron"])
def test_more_tensors_than_a_launch_takes(ops, path, parameterization):
    rows = (ctypes.c_int64 * 2)()
    ctypes.CDLL(path).tables(rows, ctypes.byref(rows, 8))
    assert list(rows) == [453, 313]  # as gaussian_weights.h has it
    shapes = [(p % 5, p % 3 + 1) for p in range(1000)]
    names = [parameterization] * len(shapes)
    *tensors, grads = tensors_of(names, shapes)
    assert_right(ops, tensors, names, "normal", grads)


@pytest.mark.parametrize("prior", PRIORS)
def test_long_runs(ops, prior):
    """Many chunks add to one element of scale: several threads add them up."""
    *tensors, grads = tensors_of(SHARED, [(300_001,), (3, 70_000)])
    assert_right(ops, tensors, list(SHARED), prior, grads)


def test_sums_are_accurate(ops):
    """300000 equal terms, fp32 over a few alone: a long fp32 sum of them would be 1e-4 off."""
    found = []
    for n in (1, 300_000):
        tensors = [torch.full((1, n), 0.1)], [torch.ones(1)]
        grads = [torch.zeros(1, n)]
        _, kl, (_, to_scale) = both(ops, tensors, (["layer"], *arguments("", "normal")[1:]), grads, torch.tensor(1.0))
        found.append(torch.stack([kl, to_scale[0]]))
    torch.testing.assert_close(found[1], 300_000 * found[0], rtol=2e-7, atol=0)


@pytest.mark.parametrize("prior", ["normal", "ard"])
def test_sums_are_deterministic(ops, prior):
    names = [PARAMETERIZATIONS[i % 5] for i in range(len(SHAPES))]
    *tensors, grads = tensors_of(names)
    options = names, *arguments("", prior)[1:]
    runs = [both(ops, tensors, options, grads, torch.tensor(1.0)) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert_same([a] if isinstance(a, torch.Tensor) else a, [b] if isinstance(b, torch.Tensor) else b)


def test_gradients_only_where_they_are_needed(ops):
    names = [PARAMETERIZATIONS[i % 5] for i in range(len(SHAPES))]
    *tensors, grads = tensors_of(names)
    options = names, *arguments("", "normal")[1:]
    full = both(ops, tensors, options, grads, torch.tensor(1.0))[2]
    for every in (1, 2, 3):
        needed = [i % 4 == every for i in range(len(full))]
        found = both(ops, tensors, options, grads, torch.tensor(1.0), needed)[2]
        assert_same(found, [t for t, need in zip(full, needed, strict=True) if need])
    assert both(ops, tensors, options, grads, torch.tensor(1.0), [False] * len(full))[2] == []


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("parameterization", ("layer", "neuron", "weight", "additive"))
def test_weights_near_zero_and_no_noise(ops, parameterization, prior, dtype):
    weight = torch.tensor([[0.0, -0.0, torch.finfo(dtype).tiny, 3e-6, 1.0]], dtype=dtype)
    for value in (-math.inf if prior == "none" else -12.0, 89.0, -25.0):
        scale = torch.full(scale_shape(parameterization, 1, 5), value, dtype=dtype)
        options = [parameterization], SEED, 0, 0, prior, 1.0
        given = ([weight], [scale]), options, [torch.ones_like(weight)], torch.tensor(1e-4)
        ours, wanted = both(ops, *given), both(OP, *given)
        assert_same(ours[0], wanted[0])
        assert_same(ours[2][:1], wanted[2][:1])
        torch.testing.assert_close(ours[1], wanted[1])
        torch.testing.assert_close(ours[2][1], wanted[2][1], equal_nan=True)


def test_any_memory_format(ops):
    weight, grad = torch.randn(16, 8, 9, 9), torch.randn(16, 8, 9, 9)
    scale, options = torch.randn(16, 8, 9, 9), (["additive"], *arguments("", "normal")[1:])
    expected = both(ops, ([weight], [scale]), options, [grad], torch.tensor(1.0))
    last = lambda t: t.to(memory_format=torch.channels_last)
    for w, s, g in ((last(weight), scale, grad), (weight, last(scale), last(grad))):
        drawn, kl, found = both(ops, ([w], [s]), options, [g], torch.tensor(1.0))
        assert_same((*drawn, kl, *found), (*expected[0], expected[1], *expected[2]))
    expanded = torch.zeros(()).expand(16, 8, 9, 9)
    assert_same(
        ops.gaussian_weights([weight], [expanded], *options)[0],
        OP.gaussian_weights([weight], [expanded.contiguous()], *options)[0],
    )


# ---- operators ------------------------------------------------------------------------------------------------------


def test_double_takes_the_reference(ops):
    names = ["neuron", "additive"]
    weights, scales, grads = tensors_of(names, [(3, 5), (4, 4)])
    for mixed in (
        (double(weights), double(scales), double(grads)),
        ([weights[0].double(), weights[1]], [scales[0].double(), scales[1]], [grads[0].double(), grads[1]]),
    ):
        *tensors, grads = mixed
        options, grad_kl = (names, *arguments("", "normal")[1:]), torch.tensor(1.5, dtype=F64)
        found, expected = (both(m, tensors, options, grads, grad_kl) for m in (ops, reference))
        assert found[1].dtype == F64
        assert_same((*found[0], found[1], *found[2]), (*expected[0], expected[1], *expected[2]))


def test_operators_refuse(ops):
    w, s, rest = torch.zeros(3, 4), torch.zeros(3, 4), (SEED, 0, 0, "none", 1.0)
    with pytest.raises(ValueError, match=r"gaussian_weights: scales\[0\] must have 3 elements, got 12"):
        ops.gaussian_weights([w], [s], ["neuron"], *rest)
    with pytest.raises(ValueError, match="gaussian_weights: parameterizations must hold 1 names like scales, got 2"):
        ops.gaussian_weights([w], [s], ["additive"] * 2, *rest)
    with pytest.raises(ValueError, match="gaussian_weights: weights must hold 1 tensors, got 2"):
        ops.gaussian_weights([w, w], [s], ["additive"], *rest)
    with pytest.raises(TypeError, match="weights and scales must both be float64 or neither"):
        ops.gaussian_weights([w.double()], [s], ["additive"], *rest)
    with pytest.raises(TypeError, match="dtype must be a floating one, got Int"):
        ops.gaussian_weights([w], [s.int()], ["additive"], *rest)
    with pytest.raises(ValueError, match="seed must be a 0-d int64 tensor"):
        ops.gaussian_weights([w], [s], ["additive"], torch.zeros(2), *rest[1:])
    backward = lambda grad, grad_kl, needed: ops.gaussian_weights_backward(
        [grad], grad_kl, [w], [s], ["additive"], needed, *rest
    )
    with pytest.raises(ValueError, match=r"grads\[0\] must have shape \[3, 4\], got \[4, 3\]"):
        backward(w.mT, torch.zeros(()), [True, True])
    with pytest.raises(ValueError, match="grads must hold 1 tensors and needed 2 flags, got 1 and 1"):
        backward(w, torch.zeros(()), [True])
    with pytest.raises(ValueError, match="grad_kl must be a 0-d tensor on cpu"):
        backward(w, torch.zeros(2), [True, True])
    with pytest.raises(TypeError, match=r"grads\[0\] must be float64 where its weight is, got Double"):
        backward(w.double(), torch.zeros(()), [True, True])


@pytest.mark.parametrize("op", ["gaussian_weights", "gaussian_weights_backward"])
def test_kernel_for(op):
    compiled = hasattr(torch.ops.losssurf_fast, "philox_normal_cuda")  # which the CUDA sources define
    expected = "CUDA C++" if compiled else "reference (plain torch): this build has no CUDA C++ kernels"
    assert lsf.kernel_for(op, "cuda") == expected
