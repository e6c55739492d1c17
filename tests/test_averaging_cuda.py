"""The CUDA kernels of the averaging family without a GPU (cuda_on_cpu.py): their source, against the references."""

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch
from common import BF16, F16, F32, F64
from cuda_on_cpu import LONG, POINTER, SIZES, TYPES, assert_same, build, draw, pointer

import losssurf_fast as lsf
from losssurf_fast.ops.averaging import lerp_reference
from losssurf_fast.ops.swag import swag_collect_reference, swag_sample_reference


class LerpTensors(ctypes.Structure):
    _fields_ = [("numel", LONG), ("value", POINTER), ("averages", POINTER * 4)]


class CollectTensors(ctypes.Structure):
    _fields_ = [("numel", LONG)] + [(name, POINTER) for name in ("mean", "m2", "deviation", "value")]


class SampleTensors(ctypes.Structure):
    _fields_ = [("numel", LONG)]
    _fields_ += [(name, POINTER) for name in ("mean", "m2", "deviations", "out")]
    _fields_ += [(name, LONG) for name in ("row", "offset", "run", "stride")]


class SampleOptions(ctypes.Structure):
    _fields_ = [("seed", POINTER), ("rank", ctypes.c_int), ("block", ctypes.c_bool), ("first_sample", ctypes.c_uint32)]
    _fields_ += [("samples", LONG), ("num_params", LONG)]
    _fields_ += [("variance_scale", ctypes.c_double), ("coefficient", ctypes.c_double)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = ctypes.CDLL(build("tests/averaging_cuda.cpp", tmp_path_factory.mktemp("cuda")))
    found.visits.restype = found.losssurf_swag_max_rank.restype = LONG
    return found


def clones(tensors):
    return [torch.empty(t.numel() + 4, dtype=t.dtype)[4:].copy_(t) for t in tensors]  # as aligned as 4 elements are


# ---- lerp_, ema_ -----------------------------------------------------------------------------------------------------


def lerp(library, lists, values, weights):
    """``lists``: one list of averages for each weight; None where a value has no average."""
    rows = [
        LerpTensors(v.numel(), pointer(v), (POINTER * 4)(*map(pointer, averages)))
        for v, *averages in zip(values, *lists, strict=True)
    ]
    dtype = next(t.dtype for tensors in lists for t in tensors if t is not None)
    types = TYPES.index(dtype), TYPES.index(values[0].dtype)
    weights = (ctypes.c_double * len(weights))(*weights)
    library.losssurf_lerp(*types, (LerpTensors * len(rows))(*rows), LONG(len(rows)), weights, len(weights), None)


@pytest.mark.parametrize("value_dtype", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_lerp_equals_reference(library, dtype, value_dtype):
    for shift, weight in itertools.product((0, 1), (0.1, 1 / 3, 0.5, 0.9, 1.0, -0.7)):
        averages, values = draw(dtype, 1, shift=shift), draw(value_dtype, 2)
        expected = clones(averages)
        lerp_reference(expected, values, weight)
        lerp(library, [averages], values, [weight])
        assert_same(averages, expected)


@pytest.mark.parametrize("count", (2, 3, 4))
def test_lerp_of_several_weights(library, count):
    weights = [0.5, 0.25, 1.0, 0.0][:count]
    lists, values = [draw(F32, k) for k in range(count)], draw(BF16, 9)
    expected = [clones(averages) for averages in lists]
    for k, weight in enumerate(weights):
        lists[k][k + 1] = None  # of another dtype, for another launch
        lerp_reference(expected[k], values, weight)
    lerp(library, lists, values, weights)
    for averages, wanted in zip(lists, expected, strict=True):
        assert_same(*zip(*((a, w) for a, w in zip(averages, wanted, strict=True) if a is not None), strict=True))


def test_lerp_of_more_tensors_than_a_launch_takes(library):
    averages, values = draw(F32, 1, [5] * 2100), draw(F32, 2, [5] * 2100)
    expected = clones(averages)
    lerp_reference(expected, values, 0.1)
    lerp(library, [averages], values, [0.1])
    assert_same(averages, expected)


# ---- swag_collect_ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_dtype", TYPES)
@pytest.mark.parametrize("dtype, deviation", [(F32, F32), (F32, BF16), (F32, F16), (F32, None), (F64, F64)])
def test_collect_equals_reference(library, dtype, deviation, value_dtype):
    mean, m2 = draw(dtype, 1), [t.abs() for t in draw(dtype, 2)]
    slots = [torch.zeros(3, n, dtype=deviation) for n in SIZES] if deviation else []
    expected = clones(mean), clones(m2), [t.clone() for t in slots]
    for n in range(5):
        values = draw(value_dtype, n)
        rows = [
            CollectTensors(v.numel(), pointer(a), pointer(b), pointer(slots[i][n % 3] if slots else None), pointer(v))
            for i, (v, a, b) in enumerate(zip(values, mean, m2, strict=True))
        ]
        types = [TYPES.index(d) for d in (dtype, deviation or F32, value_dtype)]
        library.losssurf_swag_collect(*types, (CollectTensors * len(rows))(*rows), LONG(len(rows)), LONG(n), None)
        swag_collect_reference(*expected, values, n)
    for actual, wanted in zip((mean, m2, slots), expected, strict=True):
        assert_same(actual, wanted)


# ---- swag_sample -----------------------------------------------------------------------------------------------------


def sample(library, out, mean, m2, deviations, seed, n, scale, cov, block, first, count, places, num_params):
    held = min(n, deviations[0].shape[0]) if deviations and cov else 0
    rank = held if held > 1 else 0
    rows = [
        SampleTensors(a.numel(), *map(pointer, (a, b, deviations[i] if rank else None, o)), *places[4 * i : 4 * i + 4])
        for i, (a, b, o) in enumerate(zip(mean, m2, out, strict=True))
    ]
    coefficient = math.sqrt(scale / (rank - 1)) if rank else 0
    options = SampleOptions(pointer(seed), rank, block, first, count, num_params, scale / n, coefficient)
    types = [TYPES.index(d) for d in (mean[0].dtype, deviations[0].dtype if rank else F32, out[0].dtype)]
    rows = (SampleTensors * len(rows))(*rows)
    library.losssurf_swag_sample(*types, rows, LONG(len(rows)), ctypes.byref(options), None)


def whole(sizes):
    return [x for i, n in enumerate(sizes) for x in (i, 0, n, 0)]


@pytest.mark.parametrize(
    "dtype, deviation, out_dtype, rank, n, count, block",
    [
        (F32, F32, F32, 5, 9, 1, False),
        (F32, F32, BF16, 20, 30, 11, False),
        (F32, BF16, F32, 7, 4, 8, True),
        (F32, F16, F16, 4, 2, 3, True),
        (F32, F32, F64, 3, 1, 2, False),
        (F32, None, F32, 0, 6, 2, False),
        (F32, F32, F32, 600, 700, 9, False),  # coefficients of six samples fit into shared memory
        (F64, F64, F64, 6, 5, 7, False),
        (F64, F64, F32, 3, 3, 1, True),
    ],
)
def test_sample_equals_reference(library, dtype, deviation, out_dtype, rank, n, count, block):
    sizes = (4, 1, 1028) if rank > 100 else (1, 6, 4, 0, 1024, 1031, 3000)
    shift = 2 if dtype == F64 else 0  # aligned to 16 bytes and to no more
    mean, m2 = draw(dtype, 1, sizes, shift), [t.abs() for t in draw(dtype, 2, sizes)]
    deviations = [t.view(rank, -1) for t in draw(deviation, 3, [rank * k for k in sizes])] if deviation else []
    out = [torch.empty(count, k, dtype=out_dtype) for k in sizes]
    expected = [torch.empty_like(t) for t in out]
    rest = mean, m2, deviations, torch.tensor(-5), n, 0.5, True, block, 2**32 - 20, count, whole(sizes), len(sizes)
    sample(library, out, *rest)
    swag_sample_reference(expected, *rest)
    tolerance = 1e-14 if dtype == F64 else 0  # torch.sqrt need not round fp64 correctly
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shift", (0, 1))
def test_sample_of_parts(library, shift):
    """Shards that start inside a quad, and columns of a matrix: runs of 5, 4, 3, 2 and 1 elements."""
    sizes = [1003, 40, 16, 33, 8, 7]
    places = [2, 5, 1003, 0, 0, 3, 5, 6, 1, 2**34 - 64, 4, 16, 7, 2, 3, 3, 4, 2, 2, 7, 9, 1, 1, 4]
    mean, m2 = draw(F32, 1, sizes, shift), [t.abs() for t in draw(F32, 2, sizes)]
    deviations = [t.view(3, -1) for t in draw(F32, 3, [3 * k for k in sizes])]
    out = [torch.empty(2, k) for k in sizes]
    expected = [torch.empty(2, k) for k in sizes]
    rest = mean, m2, deviations, torch.tensor(7), 3, 0.7, True, False, 0, 2, places, 11
    sample(library, out, *rest)
    swag_sample_reference(expected, *rest)
    assert_same(out, expected)


def test_largest_rank(library):
    assert library.losssurf_swag_max_rank(TYPES.index(F32)) == 4096
    assert library.losssurf_swag_max_rank(TYPES.index(F64)) == 2048


@pytest.mark.parametrize("op", ["lerp_", "ema_", "swag_collect_", "swag_sample_"])
def test_kernel_for(op):
    compiled = hasattr(torch.ops.losssurf_fast, "philox_normal_cuda")  # which the CUDA sources define
    expected = "CUDA C++" if compiled else "reference (plain torch): this build has no CUDA C++ kernels"
    assert lsf.kernel_for(op, "cuda") == expected


# ---- tables of tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", (1, 7, 2000))
def test_every_element_is_visited_once(library, blocks):
    numels = [0, 3 * 2**31 + 5, 8192, 1, 8193, 0, 2**31, *range(3000), 0, 2**20]
    sizes, rows = (LONG * len(numels))(*numels), LONG()
    count = library.visits(sizes, LONG(len(numels)), LONG(blocks), None, ctypes.byref(rows))
    visits = np.zeros((count, 4), np.int64)
    library.visits(sizes, LONG(len(numels)), LONG(blocks), POINTER(visits.ctypes.data), ctypes.byref(rows))
    launch, tensor, first, n = visits[np.lexsort((visits[:, 2], visits[:, 1]))].T
    assert rows.value > 1000 and n.min() >= 1 and n.max() == 8192
    assert np.unique(launch).tolist() == [0, 1, 2]  # for 3005 tensors with elements
    begins, ends = tensor[:-1] != tensor[1:], first + n
    assert np.array_equal(first[1:], np.where(begins, 0, ends[:-1])) and first[0] == 0
    totals = np.bincount(tensor, n, minlength=len(numels))
    assert totals.tolist() == numels


@pytest.mark.parametrize("aligned", (False, True))
def test_every_element_of_a_chunk_is_visited_once(library, aligned):
    for n in (1, 3, 4, 255, 256, 257, 1023, 1024, 1030, 8191, 8192):
        counts = np.zeros(n + 8, np.int32)
        library.packs(n, aligned, POINTER(counts.ctypes.data))
        assert np.array_equal(counts, np.arange(n + 8) < n)
