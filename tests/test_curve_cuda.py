"""The CUDA kernels of the curve family without a GPU (cuda_on_cpu.py): their source, against the references."""

import ctypes

import pytest
import torch
from common import BF16, F16, F32, F64
from cuda_on_cpu import LONG, POINTER, SIZES, TYPES, assert_same, build, draw, pointer

import losssurf_fast as lsf
from losssurf_fast.ops.curve import curve_coefficients, curve_weights_backward_reference, curve_weights_reference

PARTIALS = 2048
DANGLING = 16  # whoever reads there dies


class CurveTensors(ctypes.Structure):
    _fields_ = [("numel", LONG), ("weight", POINTER), ("others", POINTER)]


class CurveCoefficients(ctypes.Structure):
    _fields_ = [("values", POINTER), ("count", ctypes.c_int)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(build("csrc/cuda/curve.cu", tmp_path_factory.mktemp("cuda")))


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    """The operators of the CUDA build, on CPU tensors."""
    torch.ops.load_library(build("tests/curve_glue.cpp", tmp_path_factory.mktemp("glue"), with_torch=True))
    return torch.ops.losssurf_cuda_on_cpu


def wide(dtype):
    return torch.promote_types(dtype, F32)


def arguments(weights, others, coefficients):
    """What both kernels are given, and what must outlive the call: ``others`` are addresses, a list for each weight."""
    arrays = [(POINTER * len(addresses))(*addresses) for addresses in others]
    rows = [CurveTensors(w.numel(), pointer(w), ctypes.addressof(a)) for w, a in zip(weights, arrays, strict=True)]
    coefficients = coefficients.to(wide(weights[0].dtype))
    given = TYPES.index(weights[0].dtype), (CurveTensors * len(rows))(*rows), LONG(len(rows))
    return (*given, CurveCoefficients(pointer(coefficients), len(coefficients))), (arrays, coefficients)


def forward(library, bends, coefficients, unread=()):
    """``bends``: K lists; the kernel gets no memory of those in ``unread``."""
    weights = draw(bends[0][0].dtype, 99, [t.numel() for t in bends[0]])
    others = [
        [DANGLING if j in unread else pointer(bend) for j, bend in enumerate(row)] for row in zip(*bends, strict=True)
    ]
    given, alive = arguments(weights, others, coefficients)
    library.losssurf_curve_weights(*given, None)
    del alive
    return weights


def backward(library, grads, bends, coefficients, needed, partials=None):
    """Gradients of the bends where ``needed`` (K lists of flags), others None; adds to ``partials``."""
    out = [
        [torch.full_like(g, torch.nan) if need else None for g, need in zip(grads, flags, strict=True)]
        for flags in needed
    ]
    others = [[pointer(t) for t in row] for row in zip(*out, strict=True)]
    if partials is not None:
        others = [[*row, *map(pointer, more)] for row, more in zip(others, zip(*bends, strict=True), strict=True)]
    given, alive = arguments(grads, others, coefficients)
    library.losssurf_curve_weights_backward(*given, POINTER(pointer(partials)), None)
    del alive
    return out


def total(library, partials, dtype):
    out = torch.full((len(partials),), torch.nan, dtype=dtype)
    library.losssurf_curve_sum(
        POINTER(pointer(partials)), POINTER(pointer(out)), TYPES.index(dtype), len(partials), None
    )
    return out


def flat(lists):
    return [t for tensors in lists for t in tensors]


def some(count, sizes, every=3):
    """Flags of a curve whose first and last bend are fixed, some tensors of the others, too."""
    return [[0 < j < count - 1 and (j + p) % every > 0 for p in range(len(sizes))] for j in range(count)]


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", (0, 1))
@pytest.mark.parametrize("count", (1, 2, 3, 5, 9))
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_equal_reference(library, dtype, count, shift):
    bends = [draw(dtype, j, shift=shift * (j % 2)) for j in range(count)]
    coefficients = torch.randn(count, dtype=F64)
    assert_same(forward(library, bends, coefficients), curve_weights_reference(flat(bends), coefficients))


@pytest.mark.parametrize("kind", ("bezier", "polychain"))
@pytest.mark.parametrize("dtype", TYPES)
def test_bends_of_coefficient_0_are_not_read(library, dtype, kind):
    bends = [draw(dtype, j) for j in range(9)]
    for t in (0.0, 0.3, 0.5, 1.0):
        coefficients = curve_coefficients(t, 9, kind)
        unread = set((coefficients == 0).nonzero().flatten().tolist())
        assert len(unread) == (9 - 2 + (t != 0.3) if kind == "polychain" or t in (0, 1) else 0)
        actual = forward(library, bends, coefficients, unread)
        assert_same(actual, curve_weights_reference(flat(bends), coefficients))


@pytest.mark.parametrize("dtype", TYPES)
def test_ends_keep_their_bits(library, dtype):
    (bend,) = draw(dtype, 0, [4096])
    bend[::3] = -0.0
    bend[1::3] = torch.inf
    for place in range(3):
        coefficients = torch.zeros(3)
        coefficients[place] = 1
        unread = {0, 1, 2} - {place}
        (weight,) = forward(library, [[bend]] * 3, coefficients, unread)
        assert torch.equal(weight, bend) and torch.equal(weight.signbit(), bend.signbit())


def test_without_any_bend_weights_are_0(library):
    (weight,) = forward(library, [draw(F32, 0, [1000])] * 5, torch.zeros(5), range(5))
    assert torch.equal(weight, torch.zeros(1000)) and not weight.signbit().any()


@pytest.mark.parametrize("count, tensors", [(2, 2100), (9, 1100)])
def test_more_tensors_than_a_launch_takes(library, count, tensors):
    sizes = [p % 7 for p in range(tensors)]
    bends = [draw(F32, j, sizes) for j in range(count)]
    coefficients = torch.randn(count)
    assert_same(forward(library, bends, coefficients), curve_weights_reference(flat(bends), coefficients))


def test_most_bends(library):
    count = library.losssurf_curve_max_bends()
    assert count == 2324
    bends = [draw(BF16, j, (5, 17)) for j in range(count)]
    coefficients = torch.randn(count)
    assert_same(forward(library, bends, coefficients), curve_weights_reference(flat(bends), coefficients))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sums", (False, True))
@pytest.mark.parametrize("count", (1, 2, 3, 5, 9))
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_equal_reference(library, dtype, count, sums):
    for shift in (0, 1):
        grads, bends = draw(dtype, 50, shift=shift), [draw(dtype, j) for j in range(count)]
        coefficients = torch.randn(count, dtype=F64)
        coefficients[count // 2] = 0
        needed = some(count, SIZES) if shift else [[True] * len(SIZES)] * count
        partials = torch.zeros(count, PARTIALS, dtype=F64) if sums else None
        found = backward(library, grads, bends, coefficients, needed, partials)
        *expected, exact = curve_weights_backward_reference(grads, flat(bends), coefficients, flat(needed), True)
        assert_same([t for t in flat(found) if t is not None], expected)
        if sums:
            torch.testing.assert_close(total(library, partials, F64), exact, rtol=1e-6, atol=0)
            assert torch.equal(total(library, partials, F32), total(library, partials, F64).float())


def test_gradients_of_coefficients_are_deterministic(library):
    grads, bends = draw(F32, 50), [draw(F32, j) for j in range(3)]
    runs = [torch.zeros(3, PARTIALS, dtype=F64) for _ in range(2)]
    for partials in runs:
        backward(library, grads, bends, torch.ones(3), [[False] * len(grads)] * 3, partials)
    assert torch.equal(*runs) and runs[0].count_nonzero() > 3  # several blocks had a share


def test_gradients_of_coefficients_add_up_over_dtypes(library):
    partials, exact = torch.zeros(5, PARTIALS, dtype=F64), torch.zeros(5, dtype=F64)
    for dtype in TYPES:
        sizes = [p % 5 for p in range(700)] + [3000]
        grads, bends, coefficients = draw(dtype, 50, sizes), [draw(dtype, j, sizes) for j in range(5)], torch.randn(5)
        needed = some(5, sizes)
        found = backward(library, grads, bends, coefficients, needed, partials)
        *expected, sums = curve_weights_backward_reference(
            grads, flat(bends), coefficients.double(), flat(needed), True
        )
        exact += sums
        assert_same([t for t in flat(found) if t is not None], expected)
    torch.testing.assert_close(total(library, partials, F64), exact, rtol=1e-6, atol=0)


def test_gradients_of_long_tensors_are_accurate(library):
    """fp32 over a pack alone: a long fp32 sum of these terms would be 1e-4 off."""
    grads, bends = [torch.full((200_000,), 0.1)], [[torch.full((200_000,), 0.7)]] * 2
    partials = torch.zeros(2, PARTIALS, dtype=F64)
    backward(library, grads, bends, torch.ones(2), [[False]] * 2, partials)
    exact = 200_000 * (grads[0][0].double() * bends[0][0][0].double())
    torch.testing.assert_close(total(library, partials, F64), exact.expand(2), rtol=2e-7, atol=0)


def test_nothing_to_write(library):
    grads, partials = draw(F16, 1, [0, 0]), torch.zeros(2, PARTIALS, dtype=F64)
    backward(library, grads, [draw(F16, j, [0, 0]) for j in range(2)], torch.ones(2), [[True, True]] * 2, partials)
    assert torch.equal(total(library, partials, F32), torch.zeros(2))


# ---- operators -------------------------------------------------------------------------------------------------------


def any_layout(seed, dtypes=TYPES):
    """A bend of tensors of every dtype, among them expanded, permuted, with gaps, 0-d and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for dtype in dtypes:
        x = torch.randn(4, 6, 5, 8, generator=generator, dtype=F64).to(dtype)
        views = [x, x.to(memory_format=torch.channels_last), x[:, :1].expand(4, 6, 5, 8), x.permute(3, 1, 0, 2)]
        views += [x[..., ::2], x[0, 0, 0, 0], x[:0], x.flatten()[1:], x[:1].expand(4, 6, 5, 8).mT]
        tensors += views[seed % 3 :] + views[: seed % 3] if seed else views
    return tensors


def of_shapes(shapes, bend):
    """A bend's tensors where they have those shapes, others elsewhere."""
    return [t if t.shape == s else torch.randn(s).to(t.dtype) for t, s in zip(bend, shapes, strict=True)]


def bends_of(count):
    shapes = [t.shape for t in any_layout(0)]
    return flat(of_shapes(shapes, any_layout(j)) for j in range(count))


def assert_layouts(actual, like):
    assert [t.stride() for t in actual] == [torch.empty_like(t).stride() for t in like]
    assert len({t.untyped_storage().data_ptr() for t in actual if t.numel()}) == sum(t.numel() > 0 for t in actual)


@pytest.mark.parametrize("dtype", (F32, F64))
@pytest.mark.parametrize("count", (1, 3, 6))
def test_operator_equals_reference(ops, count, dtype):
    bends, coefficients = bends_of(count), torch.randn(2 * count, dtype=dtype)[::2]
    weights = ops.curve_weights(bends, coefficients)
    assert_same(weights, curve_weights_reference(bends, coefficients))
    assert_layouts(weights, bends[: len(weights)])
    assert ops.curve_weights([], coefficients) == []


@pytest.mark.parametrize("sums", (False, True))
@pytest.mark.parametrize("count", (1, 3, 6))
def test_operator_of_gradients_equals_reference(ops, count, sums):
    bends, grads, coefficients = (
        bends_of(count),
        of_shapes([t.shape for t in any_layout(0)], any_layout(7)),
        torch.randn(count),
    )
    for bends_given, every in ((bends, 3), (bends, 10**6), ([], 2)):
        if sums and not bends_given:
            continue
        needed = [i % every != 0 and i % len(grads) != 1 for i in range(len(bends))]
        arguments = grads, bends_given, coefficients, needed, sums
        found, expected = ops.curve_weights_backward(*arguments), curve_weights_backward_reference(*arguments)
        if sums:
            actual, exact = found.pop(), expected.pop()
            assert actual.dtype == F32
            torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-6)
        assert_same(found, expected)
        assert_layouts(found, [(bends_given or grads)[i % len(grads)] for i, need in enumerate(needed) if need])


def test_operators_refuse(ops):
    many, bend = torch.zeros(2325), torch.zeros(3)
    with pytest.raises(ValueError, match="curve_weights: coefficients must be at most 2324 on a GPU, got 2325"):
        ops.curve_weights([bend] * 2325, many)
    with pytest.raises(
        ValueError, match="curve_weights_backward: coefficients must be at most 2324 on a GPU, got 2325"
    ):
        ops.curve_weights_backward([bend], [], many, [True] * 2325, False)
    with pytest.raises(
        ValueError, match=r"curve_weights: bends\[1\]\[0\] must have the shape \(3,\) of bends\[0\]\[0\]"
    ):
        ops.curve_weights([bend, torch.zeros(4)], torch.zeros(2))
    with pytest.raises(ValueError, match="curve_weights_backward: needed must hold 2 flags, got 1"):
        ops.curve_weights_backward([bend], [bend, bend], torch.zeros(2), [True], False)


@pytest.mark.parametrize("op", ["curve_weights", "curve_weights_backward"])
def test_kernel_for(op):
    compiled = hasattr(torch.ops.losssurf_fast, "philox_normal_cuda")  # which the CUDA sources define
    expected = "CUDA C++" if compiled else "reference (plain torch): this build has no CUDA C++ kernels"
    assert lsf.kernel_for(op, "cuda") == expected
