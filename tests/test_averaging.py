"""lerp_ and ema_: the kernels against their reference, bit for bit, and against torch's own."""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, instruction_set

from losssurf_fast.ops import ema_, lerp_
from losssurf_fast.ops.averaging import ema_reference, lerp_reference

DTYPES = (F64, F32, BF16, F16)
WEIGHTS = (0.0, 1 / 11, 0.499, 0.5, 0.9, 1.0, -0.7, 1.5)
SHAPES = ((), (1,), (7,), (17, 63), (0, 3), (4096,), (3, 2731), (2, 3, 5, 7))


def tensors(dtype, seed, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def clones(list_of_tensors):
    return [t.clone() for t in list_of_tensors]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_lerp_equals_reference_bit_for_bit(name, weight):
    with instruction_set(name) as available:
        if not available:
            pytest.skip(f"this CPU lacks {name}")
        for average_dtype, value_dtype in itertools.product(DTYPES, DTYPES):
            averages, values = tensors(average_dtype, 0), tensors(value_dtype, 1)
            expected = clones(averages)
            lerp_reference(expected, values, weight)
            lerp_(averages, values, weight)
            assert_equal(averages, expected)


def test_lerp_equals_foreach_lerp():
    averages, values = tensors(F32, 0), tensors(F32, 1)
    expected = clones(averages)
    torch._foreach_lerp_(expected, values, 0.3)
    lerp_(averages, values, 0.3)
    assert_equal(averages, expected)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_result_does_not_depend_on_threads(threads):
    values, averages = [torch.randn(100_003)], [torch.randn(100_003)]
    expected = clones(averages)
    lerp_reference(expected, values, 0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        lerp_(averages, values, 0.1)
    finally:
        torch.set_num_threads(before)
    assert_equal(averages, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ema_of_several_decays_is_that_of_each(dtype):
    values, decays = tensors(dtype, 1), (0.5, 0.9, 1.0, 0.0)
    lists = [tensors(F32, k + 2) for k in range(len(decays))]
    expected = [clones(a) for a in lists]
    for averages, decay in zip(expected, decays, strict=True):
        ema_(averages, values, decay)
    ema_(lists, values, decays)
    for averages, wanted in zip(lists, expected, strict=True):
        assert_equal(averages, wanted)
    reference = [tensors(F32, k + 2) for k in range(len(decays))]
    ema_reference(list(itertools.chain(*reference)), values, decays)
    assert_equal(itertools.chain(*lists), itertools.chain(*reference))


def test_many_uneven_tensors_leave_their_neighbours_alone():
    sizes = [i * 37 % 5000 for i in range(400)]
    memory, values = torch.zeros(sum(sizes) + len(sizes)), [torch.full((n,), i + 1.0) for i, n in enumerate(sizes)]
    averages, at = [], 0
    for n in sizes:  # one element between any two averages
        averages.append(memory[at : at + n])
        at += n + 1
    lerp_(averages, values, 1.0)
    assert_equal(averages, values)
    assert memory.count_nonzero() == sum(sizes)


@pytest.mark.parametrize("weight", (0.25, 1.0))
def test_memory_order_does_not_matter(weight):
    image = torch.randn(2, 3, 4, 5)
    for average, value in (
        (image.to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5)),
        (image.to(memory_format=torch.channels_last), torch.randn(2, 4, 5, 3, dtype=BF16).permute(0, 3, 1, 2)),
        (image.permute(3, 1, 0, 2), torch.randn(5, 3, 2, 4)),
        (torch.randn(6, 9)[:, 2:7], torch.randn(5, 6).t()),
        (torch.randn(6, 9)[::2, ::3], torch.randn(3).expand(3, 3)),
        (torch.randn(4), torch.randn(1).expand(4)),
    ):
        expected = average.clone()
        lerp_reference([expected], [value], weight)
        whole = average._base
        outside = whole.clone() if whole is not None else None
        lerp_([average], [value], weight)
        assert_equal([average], [expected])
        if outside is not None:  # only the view has changed
            assert (whole != outside).sum() <= average.numel()


def test_the_same_tensor_as_average_and_value():
    (average,) = tensors(F32, 0, [(1000,)])
    expected = average.clone()
    lerp_([average], [average], 0.3)
    assert_equal([average], [expected])


def test_not_finite_values_are_averaged_as_they_are():
    averages, values = [torch.zeros(3)], [torch.tensor([float("nan"), float("inf"), 1.0])]
    lerp_(averages, values, 0.25)
    assert averages[0].isnan()[0] and averages[0][1] == float("inf") and averages[0][2] == 0.25
    inf = [torch.full((3,), float("inf"))]
    lerp_(inf, [torch.ones(3)], 1.0)  # as torch.lerp: inf - inf is no number
    expected = torch.lerp(torch.full((3,), float("inf")), torch.ones(3), 1.0)
    assert_equal(inf, [expected])


def test_fp32_average_of_bf16_values_moves_where_a_bf16_one_stands_still():
    """Decay 0.9999 from 1 towards 2 in 10000 steps: 2 - 0.9999^10000."""
    wide, narrow, value = [torch.ones(1)], [torch.ones(1, dtype=BF16)], [torch.full((1,), 2.0, dtype=BF16)]
    for _ in range(10_000):
        ema_(wide, value, 0.9999)
        ema_(narrow, value, 0.9999)
    assert wide[0].item() == pytest.approx(1.632139, abs=2e-5)
    assert narrow[0].item() == 1.0


# ---- autograd, compile, dispatcher ----------------------------------------------------------------------------------


def test_version_counters_tell_autograd():
    average = torch.randn(5)
    scale = torch.randn(5, requires_grad=True)
    product = scale * average
    lerp_([average], [torch.randn(5)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_values_that_require_grad_leave_no_graph():
    average, value = torch.zeros(3), torch.ones(3, requires_grad=True)
    lerp_([average], [value], 0.5)
    assert not average.requires_grad and average.grad_fn is None


def test_leaves_are_refused_only_where_gradients_are_recorded():
    parameter = torch.nn.Parameter(torch.zeros(3))
    for call in (lambda: lerp_([parameter], [torch.ones(3)], 1.0), lambda: ema_([parameter], [torch.ones(3)], 0.0)):
        with pytest.raises(RuntimeError, match="averages are changed in place and must not require grad"):
            call()
        assert not parameter.any()
    with torch.no_grad():
        lerp_([parameter], [torch.ones(3)], 1.0)
    assert parameter.all()


@pytest.mark.parametrize("dtype", (F64, F32, BF16))
def test_opcheck(dtype):
    averages, values = tensors(F32, 0), tensors(dtype, 1)
    torch.library.opcheck(torch.ops.losssurf_fast.lerp_.default, (averages, values, 0.3))
    torch.library.opcheck(torch.ops.losssurf_fast.ema_.default, (averages + clones(averages), values, [0.9, 0.5]))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_fullgraph(backend):
    averages, values = tensors(F32, 0), tensors(BF16, 1)
    expected = clones(averages)
    lerp_reference(expected, values, 0.25)
    compiled = torch.compile(lambda a, v: lerp_(a, v, 0.25), fullgraph=True, backend=backend)
    compiled(averages, values)
    assert_equal(averages, expected)


def test_autocast_changes_nothing():
    averages, values = tensors(F32, 0), tensors(BF16, 1)
    expected = clones(averages)
    lerp_reference(expected, values, 0.25)
    with torch.autocast("cpu", dtype=BF16):
        lerp_(averages, values, 0.25)
    assert_equal(averages, expected)


# ---- errors ---------------------------------------------------------------------------------------------------------

ONE, TWO = [torch.zeros(3)], [torch.zeros(3), torch.zeros(2)]


@pytest.mark.parametrize(
    "averages, values, weight, error, message",
    [
        (torch.zeros(3), ONE, 0.5, TypeError, "lerp_: averages must be a sequence of tensors, got Tensor"),
        (ONE, [1.0], 0.5, TypeError, r"lerp_: values\[0\] must be a tensor, got float"),
        (TWO, ONE, 0.5, ValueError, "lerp_: averages must hold 1 tensors like values, got 2"),
        (ONE, [torch.ones(4)], 0.5, ValueError, r"averages\[0\] must have the value's shape \(4,\), got \(3,\)"),
        (
            [torch.zeros(3, dtype=torch.int64)],
            ONE,
            0.5,
            TypeError,
            r"averages\[0\] must have a floating dtype of .*, got torch.int64",
        ),
        (ONE, [torch.ones(3, dtype=torch.complex64)], 0.5, TypeError, r"values\[0\] must have a floating dtype of"),
        (ONE, [torch.ones(3, device="meta")], 0.5, ValueError, r"averages\[0\] must be on the value's meta, got cpu"),
        (ONE, ONE, "half", TypeError, "lerp_: weight must be a number, got str"),
        (ONE, ONE, float("nan"), ValueError, "lerp_: weight must be finite, got nan"),
        ([torch.zeros(1).expand(3)], ONE, 0.5, ValueError, r"averages\[0\] must not be expanded"),
        (2 * ONE, TWO[:1] * 2, 0.5, ValueError, r"averages\[0\] and averages\[1\] must not share memory"),
    ],
)
def test_lerp_refuses(averages, values, weight, error, message):
    with pytest.raises(error, match=message):
        lerp_(averages, values, weight)
    assert not any(t.any() for t in ONE)


def test_averages_that_overlap_are_refused_and_interleaved_ones_are_not():
    memory = torch.zeros(6)
    with pytest.raises(ValueError, match=r"averages\[0\] and averages\[1\] must not share memory"):
        lerp_([memory[:4], memory[2:]], 2 * [torch.ones(4)], 0.5)
    assert not memory.any()
    lerp_([memory[::2], memory[1::2]], [torch.ones(3), torch.full((3,), 2.0)], 1.0)
    assert memory.tolist() == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("averages", (2 * [torch.zeros(3)], [torch.zeros(1).expand(3), torch.zeros(3)]))
def test_the_reference_refuses_shared_memory_too(averages):
    with pytest.raises(ValueError, match="must not share memory|must not be expanded"):
        lerp_reference(averages, 2 * [torch.ones(3)], 0.5)


def test_nothing_changes_where_a_later_pair_is_refused():
    averages = [torch.zeros(3), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"averages\[1\] must have the value's shape"):
        lerp_(averages, [torch.ones(3), torch.ones(5)], 0.5)
    assert not averages[0].any()


@pytest.mark.parametrize(
    "averages, decay, error, message",
    [
        (ONE, 1.5, ValueError, r"ema_: decay must lie in \[0, 1\], got 1.5"),
        (ONE, -0.1, ValueError, r"ema_: decay must lie in \[0, 1\]"),
        (ONE, float("nan"), ValueError, r"ema_: decay must lie in \[0, 1\]"),
        (ONE, None, TypeError, "ema_: decay must be a number, got NoneType"),
        ([ONE], [0.5, 0.9], ValueError, "ema_: averages must be 2 lists, one for each decay"),
        ([ONE, TWO], [0.5, 0.9], ValueError, r"ema_: averages\[1\] must hold 1 tensors like values, got 2"),
    ],
)
def test_ema_refuses(averages, decay, error, message):
    with pytest.raises(error, match=message):
        ema_(averages, [torch.ones(3)], decay)


def test_empty_lists():
    lerp_([], [], 0.5)
    ema_([], [], 0.5)
    ema_([[], []], [], [0.5, 0.1])
