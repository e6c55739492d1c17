"""The CUDA kernels of the averaging family on a GPU: the bits of the CPU's, no synchronisation, CUDA graphs.

test_averaging_cuda.py has what needs no GPU.
"""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64

import losssurf_fast as lsf
from losssurf_fast.ops import ema_, lerp_, swag_collect_, swag_sample
from losssurf_fast.ops.swag import Place

pytestmark = pytest.mark.gpu
DTYPES = (F64, F32, BF16, F16)
SHAPES = [(), (1,), (7,), (17, 63), (0, 3), (4096,), (3, 2731), (2, 3, 5, 7), (300, 257), *[(k,) for k in range(1500)]]


def tensors(dtype, seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def cuda(list_of_tensors):
    return [t.cuda() for t in list_of_tensors]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.is_cuda and a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


# ---- lerp_, ema_ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lerp_equals_cpu(dtype, value_dtype):
    for weight in (0.1, 0.9, 1.0):
        expected, values = tensors(dtype, 0), tensors(value_dtype, 1)
        averages = cuda(expected)
        lerp_(averages, cuda(values), weight)
        lerp_(expected, values, weight)
        assert_same(averages, expected)


def test_ema_of_several_decays_and_dtypes_equals_cpu():
    decays, shapes = [0.5, 0.9, 0.99, 1.0, 0.0, 0.7], SHAPES[:40]
    values = [v.to(DTYPES[i % 4]) for i, v in enumerate(tensors(F32, 0, shapes))]
    expected = [
        [a.to(DTYPES[(i + k) % 3]) for i, a in enumerate(tensors(F32, k, shapes))] for k in range(1, len(decays) + 1)
    ]
    lists = [cuda(a) for a in expected]
    ema_(lists, cuda(values), decays)
    ema_(expected, values, decays)
    for averages, wanted in zip(lists, expected, strict=True):
        assert_same(averages, wanted)


def test_lerp_of_any_memory_format():
    a, b = tensors(F32, 0, [(4, 6, 5, 7)] * 5), tensors(F32, 1, [(4, 6, 5, 7)] * 5)
    expected = [torch.lerp(x, y, 0.25) for x, y in zip(a, b, strict=True)]
    a, b = cuda(a), cuda(b)
    channels_last = dict(memory_format=torch.channels_last)
    wide = torch.full((4, 6, 5, 14), torch.inf, device="cuda")
    wide[..., ::2] = a[3]
    a[0], b[0] = a[0].to(**channels_last), b[0].to(**channels_last)
    a[1], b[2], a[3], b[4] = (
        a[1].to(**channels_last),
        b[2].to(**channels_last),
        wide[..., ::2],
        b[4][:1].expand(4, 6, 5, 7),
    )
    expected[4] = torch.lerp(a[4], b[4], 0.25).cpu()
    lerp_(a, b, 0.25)
    for x, y in zip(a, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y)
    assert wide[..., 1::2].isinf().all()


def test_lerp_in_a_graph():
    averages, values = cuda(tensors(F32, 0)), cuda(tensors(BF16, 1))
    expected = [t.clone() for t in averages]
    for _ in range(2):
        lerp_(expected, values, 0.1)  # before the capture: loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lerp_(averages, values, 0.1)
    for _ in range(2):
        graph.replay()
    assert_same(averages, [t.cpu() for t in expected])


def test_versions_go_up():
    average, value = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    before = average._version
    lerp_([average], [value], 0.5)
    assert average._version > before


@pytest.mark.parametrize("op", ["lerp_", "ema_", "swag_collect_", "swag_sample_"])
def test_kernel_for(op):
    assert lsf.kernel_for(op, "cuda") == "CUDA C++"


def test_lists_on_several_devices():
    average, value = [torch.zeros(3, device="cuda"), torch.zeros(3)], [torch.ones(3, device="cuda"), torch.ones(3)]
    with pytest.raises(ValueError, match=r"lerp_: averages must all be on GPUs or all on the CPU, got averages\[1\]"):
        lerp_(average, value, 0.5)
    assert not average[0].any()


@pytest.mark.slow  # 13 GB
def test_lerp_past_int32():
    n = 2**31 + 10
    average, value = torch.zeros(n, device="cuda", dtype=BF16), torch.ones(n, device="cuda", dtype=F32)
    lerp_([average], [value], 0.5)
    assert average.min() == average.max() == 0.5


# ---- SWAG ------------------------------------------------------------------------------------------------------------


def collected(dtype, deviation, shapes, models=6, rank=4):
    """(mean, m2, deviations) on the CPU after several models, and the same on the GPU."""
    state = [torch.zeros(s, dtype=dtype) for s in shapes], [torch.zeros(s, dtype=dtype) for s in shapes]
    state += ([torch.zeros(rank, t.numel(), dtype=deviation) for t in state[0]] if deviation else [],)
    on_gpu = tuple(cuda(t) for t in state)
    for n in range(models):
        values = tensors(DTYPES[n % 4], n, shapes)
        swag_collect_(*on_gpu, cuda(values), n)
        swag_collect_(*state, values, n)
    return state, on_gpu


@pytest.mark.parametrize("dtype, deviation", [(F32, F32), (F32, BF16), (F32, F16), (F32, None), (F64, F64)])
def test_swag_equals_cpu(dtype, deviation):
    state, on_gpu = collected(dtype, deviation, SHAPES[:500])
    for actual, wanted in zip(on_gpu, state, strict=True):
        assert_same(actual, wanted)
    for block, count, out_dtype in itertools.product((False, True), (None, 11), (dtype, BF16)):
        sizes = [t.shape if count is None else (count, *t.shape) for t in state[0]]
        out, expected = ([torch.empty(s, dtype=out_dtype, device=d) for s in sizes] for d in ("cuda", "cpu"))
        options = dict(block=block, num_samples=count, sample=3)
        swag_sample(*on_gpu, 6, 5, **options, out=out)
        swag_sample(*state, 6, 5, **options, out=expected)
        assert_same(out, expected)


def test_swag_sample_of_shards():
    (mean, m2, deviations), _ = collected(F32, F32, [(1003,), (5, 8), (4, 4)])
    places = [Place(2, 5), Place(0, 3, 8, 11), Place(1, 1, 2, 3)]
    options = dict(places=places, num_params=7, num_samples=2)
    expected = swag_sample(mean, m2, deviations, 6, 1, **options)
    assert_same(swag_sample(cuda(mean), cuda(m2), cuda(deviations), 6, 1, **options), expected)


def test_swag_sample_in_a_graph():
    state, on_gpu = collected(F32, BF16, SHAPES[:20])
    seed = torch.tensor(1, device="cuda")
    out = swag_sample(*on_gpu, 6, seed, num_samples=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        swag_sample(*on_gpu, 6, seed, num_samples=3, out=out)
    for value in (4, -9):
        seed.fill_(value)
        graph.replay()
        assert_same(out, swag_sample(*state, 6, value, num_samples=3))


def test_nothing_waits_for_the_gpu():
    _, (mean, m2, deviations) = collected(F32, BF16, SHAPES[:20])
    values = [t.clone() for t in mean]
    torch.cuda.set_sync_debug_mode("error")
    try:
        lerp_(mean, values, 0.1)
        ema_([mean, m2], values, [0.9, 0.99])
        swag_collect_(mean, m2, deviations, values, 6)
        swag_sample(mean, m2, deviations, 7, num_samples=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_swag_sample_of_too_many_columns():
    mean, slots = torch.zeros(3, device="cuda"), torch.zeros(5000, 3, device="cuda")
    with pytest.raises(ValueError, match="swag_sample: deviations must hold at most 4096 columns on a GPU, got 5000"):
        swag_sample([mean], [mean.clone()], [slots], 6000, 1)
    with pytest.raises(ValueError, match="swag_sample: seed must be a 0-d tensor on mean's GPU"):
        torch.ops.losssurf_fast.swag_sample_(
            [mean], [mean], [mean], [], torch.tensor(1), 1, 0.5, True, False, 0, 1, [0, 0, 3, 0], 1
        )
