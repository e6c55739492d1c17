"""swag_collect_ and swag_sample on the CPU: kernels against the reference bit for bit, golden values, statistics."""

import itertools
import math

import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, instruction_set

from losssurf_fast import ops
from losssurf_fast.ops import swag
from losssurf_fast.ops.swag import Place

OP = torch.ops.losssurf_fast
SHAPES = [(3, 5), (), (0,), (2049,), (4, 0, 2), (64,), (7, 163), (1,)]


def bits(tensors):
    return [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors]


def assert_same_bits(actual, expected):
    assert [(t.dtype, t.shape) for t in actual] == [(t.dtype, t.shape) for t in expected]
    assert all(map(torch.equal, bits(actual), bits(expected)))


def state(shapes=SHAPES, columns=3, dtype=F32, deviation_dtype=F32):
    """[mean, m2, deviations] as swag_collect_ takes them; without deviations where columns is 0."""
    slots = [torch.zeros(columns, math.prod(s), dtype=deviation_dtype) for s in shapes] if columns else []
    return [torch.zeros(s, dtype=dtype) for s in shapes], [torch.zeros(s, dtype=dtype) for s in shapes], slots


def weights(count, shapes=SHAPES, dtype=F32, seed=0):
    """``count`` models' tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(count)]


def collected(count=5, shapes=SHAPES, columns=3, collect=ops.swag_collect_, dtype=F32, deviation_dtype=F32, values=F32):
    moments = state(shapes, columns, dtype, deviation_dtype)
    for n, model in enumerate(weights(count, shapes, values)):
        collect(*moments, model, n)
    return moments


def sample_by(function, moments, n, out, *, scale=0.5, cov=True, block=False, sample=3, places=None, num_params=None):
    """The operator or its reference, into ``out``; seed 5."""
    mean = moments[0]
    places = [Place(i) for i in range(len(mean))] if places is None else places
    flat = [x for p, t in zip(places, mean, strict=True) for x in swag._check_place("", p, t.numel())]
    count = next((o.shape[0] for o, a in zip(out, mean, strict=True) if o.dim() > a.dim()), 1)
    num_params = num_params or len(mean)
    function(out, *moments, torch.tensor(5), n, scale, cov, block, sample, count, flat, num_params)
    return out


def outputs(count=None, dtype=F32, shapes=SHAPES):
    return [torch.empty(s if count is None else (count, *s), dtype=dtype) for s in shapes]


# ---- the kernels are the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_swag_collect_is_the_reference(name):
    with instruction_set(name):
        for columns, deviation, value in ((3, F32, F32), (3, BF16, F16), (2, F16, BF16), (1, F32, F64), (0, F32, F32)):
            arguments = dict(columns=columns, deviation_dtype=deviation, values=value)
            actual = collected(**arguments)
            expected = collected(collect=swag.swag_collect_reference, **arguments)
            for ours, theirs in zip(actual, expected, strict=True):
                assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_swag_sample_is_the_reference(name):
    with instruction_set(name):
        for deviation, out, count in (
            (F32, F32, None),
            (BF16, F32, 7),
            (F16, BF16, 2),
            (F32, F16, 6),
            (F32, F64, None),
        ):
            moments = collected(deviation_dtype=deviation)
            ours, theirs = (
                sample_by(function, moments, 5, outputs(count, out))
                for function in (OP.swag_sample_, swag.swag_sample_reference)
            )
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [dict(cov=False), dict(block=True), dict(scale=0.0), dict(scale=2.5), dict(n=1), dict(n=2), dict(columns=1)],
    ids=str,
)
def test_swag_sample_options_are_the_reference(options):
    options = dict(options)
    n, columns = options.pop("n", 5), options.pop("columns", 3)
    moments = collected(n, columns=columns)
    ours, theirs = (
        sample_by(function, moments, n, outputs(7), **options)
        for function in (OP.swag_sample_, swag.swag_sample_reference)
    )
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("value", [F64, F32, BF16, F16])
def test_swag_in_float64(value):
    """torch's fp64 square root is not correctly rounded, so samples agree to the last place only."""
    actual, expected = (
        collected(dtype=F64, deviation_dtype=F64, values=value, collect=collect)
        for collect in (ops.swag_collect_, swag.swag_collect_reference)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_bits(ours, theirs)
    for dtype, count in itertools.product((F64, F32), (None, 2)):
        ours, theirs = (
            sample_by(function, actual, 5, outputs(count, dtype))
            for function in (OP.swag_sample_, swag.swag_sample_reference)
        )
        rtol, atol = (1e-14, 1e-15) if dtype == F64 else (1e-6, 1e-7)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_swag_mixed_precisions_in_one_call():
    shapes = [(70,), (33,), (5, 4)]
    double, single = (collected(shapes=shapes, dtype=t, deviation_dtype=t) for t in (F64, F32))
    mixed = [[a[0], b[1], a[2]] for a, b in zip(double, single, strict=True)]
    whole = [
        sample_by(OP.swag_sample_, m, 5, outputs(dtype=t, shapes=shapes)) for m, t in ((double, F64), (single, F32))
    ]
    out = [torch.empty(s, dtype=t) for s, t in zip(shapes, (F64, F32, F64), strict=True)]
    sample_by(OP.swag_sample_, mixed, 5, out)
    assert_same_bits(out, [whole[0][0], whole[1][1], whole[0][2]])


def test_swag_does_not_depend_on_threads():
    shapes = [(40000,), (3, 5), (129, 257)]
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        moments = collected(shapes=shapes)
        results.append(
            [
                *itertools.chain(*moments),
                *ops.swag_sample(*moments, 5, 1),
                *ops.swag_sample(*moments, 5, 1, num_samples=7),
            ]
        )
    torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("deviation", [F32, BF16])
def test_swag_many_samples_are_single_ones(block, deviation):
    moments = collected(shapes=[(1500,), (3, 7), (0,)], columns=20, count=30, deviation_dtype=deviation)
    batch = ops.swag_sample(*moments, 30, 9, num_samples=13, sample=4, block=block)
    for s in range(13):
        single = ops.swag_sample(*moments, 30, 9, sample=4 + s, block=block)
        assert_same_bits([t[s] for t in batch], single)
    assert len({t.sum().item() for t in batch[0]}) == 13


def test_swag_large_results_past_the_caches_are_the_same():
    """More than 4 MiB, rows that start anywhere in a cache line."""
    moments = collected(shapes=[(40003,)], columns=2)
    for dtype in (F32, BF16):
        out = [torch.empty(60, 40003, dtype=dtype)]
        ops.swag_sample(*moments, 5, 0, num_samples=60, out=out)
        for s in (0, 1, 7, 59):
            assert_same_bits(
                [out[0][s].clone()], ops.swag_sample(*moments, 5, 0, sample=s, out=[torch.empty(40003, dtype=dtype)])
            )


# ---- shards ---------------------------------------------------------------------------------------------------------


def part(moments, index, cut):
    """The moments of parameter ``index`` at the elements that ``cut`` takes from its shape."""
    mean, m2, slots = (tensors[index] for tensors in moments)
    columns = slots.view(-1, *mean.shape)
    local = cut(mean).contiguous()
    return [[local], [cut(m2).contiguous()], [torch.stack([cut(c) for c in columns]).view(len(columns), -1)]]


@pytest.mark.parametrize("count", [None, 7])
@pytest.mark.parametrize("block", [False, True])
def test_swag_shards_draw_what_the_whole_draws(count, block):
    shapes = [(9,), (6, 50, 11)]
    moments = collected(shapes=shapes)
    whole = ops.swag_sample(*moments, 5, 3, num_samples=count, block=block)[1]
    lead = () if count is None else (slice(None),)
    cuts = [
        ((slice(1, 3),), Place(1, 550)),
        ((slice(5, 6),), Place(1, 5 * 550)),
        ((slice(None), slice(7, 20)), Place(1, 7 * 11, 13 * 11, 550)),
        ((slice(2, 4), slice(49, 50)), Place(1, 2 * 550 + 49 * 11, 11, 550)),
        ((slice(None), slice(None), slice(3, 4)), Place(1, 3, 1, 11)),
        ((slice(1, 6), slice(None), slice(4, 9)), Place(1, 550 + 4, 5, 11)),
        ((slice(3, 3),), Place(1)),
    ]
    for where, place in cuts:
        local = part(moments, 1, lambda t, where=where: t[where])
        ours = ops.swag_sample(*local, 5, 3, num_samples=count, block=block, places=[place], num_params=2)
        assert_same_bits(ours, [whole[lead + where].contiguous()])


def test_swag_shards_of_float64_and_the_reference():
    shapes = [(4, 30)]
    moments = collected(shapes=shapes, dtype=F64, deviation_dtype=F64)
    whole = ops.swag_sample(*moments, 5, 3)[0]
    local, place = part(moments, 0, lambda t: t[:, 5:12]), [Place(0, 5, 7, 30)]
    torch.testing.assert_close(ops.swag_sample(*local, 5, 3, places=place)[0], whole[:, 5:12])
    narrow = [[t.float() for t in tensors] for tensors in local]
    ours, theirs = (
        sample_by(function, narrow, 5, outputs(3, shapes=[(4, 7)]), places=place)
        for function in (OP.swag_sample_, swag.swag_sample_reference)
    )
    assert_same_bits(ours, theirs)


# ---- meaning --------------------------------------------------------------------------------------------------------


def test_swag_golden_values():
    """Weights 0 to 4 with 20 columns: peers' mean and deviations, the variance of the rank that is held."""
    moments = state([(1000,)], 20)
    for n in range(5):
        ops.swag_collect_(*moments, [torch.full((1000,), float(n))], n)
    (mean,), (m2,), (slots,) = moments
    assert torch.equal(mean, torch.full((1000,), 2.0)) and torch.equal(m2 / 5, torch.full((1000,), 2.0))
    assert slots[:, 0].tolist() == [0, 0.5, 1, 1.5, 2] + [0] * 15
    draws = ops.swag_sample(*moments, 5, 0, num_samples=4000)[0][:, :50]
    # Over samples, so that the coefficients vary; elements of a sample share their low-rank part.
    variance = draws.double().var(0).mean().item()
    assert math.sqrt(0.5 * (2 + 7.5 / 4)) == pytest.approx(1.392, abs=5e-4)
    assert variance == pytest.approx(0.5 * (2 + 7.5 / 4), rel=5 * math.sqrt(2 / 4000))


def test_swag_ring_buffer_wraps_around():
    moments = state([(40,)], 3)
    kept = []
    for n, (value,) in enumerate(weights(8, [(40,)])):
        ops.swag_collect_(*moments, [value], n)
        kept.append(value - moments[0][0])
    assert_same_bits([moments[2][0]], [torch.stack([kept[6], kept[7], kept[5]])])


def test_swag_collects_by_welford():
    """Weights of 1 and a spread of 1e-5: raw moments in fp32 lose it, the two-pass variance does not."""
    models = [[1 + 1e-5 * torch.randn(2000)] for _ in range(30)]
    moments = state([(2000,)], 0)
    for n, model in enumerate(models):
        ops.swag_collect_(*moments, model, n)
    exact = torch.stack([m[0].double() for m in models])
    variance = exact.var(0, unbiased=False)
    assert ((moments[1][0] / 30 - variance).abs() / variance).mean() < 0.02
    torch.testing.assert_close(moments[0][0].double(), exact.mean(0), rtol=0, atol=1e-6)


def test_swag_statistics():
    """Mean, variance and covariance between elements over 20000 samples, within 5 standard errors."""
    shapes, count = [(2, 3), (4,)], 20000
    moments = collected(12, shapes, columns=6)
    flat = lambda tensors: torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1).double()
    mean, m2 = (flat([t.unsqueeze(0) for t in tensors])[0] for tensors in moments[:2])
    d = flat(moments[2])
    for scale, cov, block in ((0.5, True, False), (1.0, True, True), (0.5, False, False)):
        draws = flat(ops.swag_sample(*moments, 12, 7, scale=scale, cov=cov, block=block, num_samples=count))
        low_rank = d.T @ d / 5 * cov
        if block:
            low_rank[:6, 6:] = low_rank[6:, :6] = 0
        expected = scale * (torch.diag(m2 / 12) + low_rank)
        variance = expected.diag()
        assert ((draws.mean(0) - mean).abs() <= 5 * (variance / count).sqrt()).all()
        error = ((variance[:, None] * variance + expected**2) / count).sqrt()
        assert ((draws.T.cov() - expected).abs() <= 5 * error).all()


def test_swag_sample_without_scale_is_the_mean():
    moments = collected()
    assert all(map(torch.equal, ops.swag_sample(*moments, 5, scale=0), moments[0]))


def test_swag_numbers_that_are_not_finite_stay_visible():
    values = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    moments = state([(4,)], 2)
    for n in range(3):
        ops.swag_collect_(*moments, [values], n)
    sampled = ops.swag_sample(*moments, 3, 0)[0]
    assert sampled[0] == 1 and sampled[1:].isnan().all()


def test_swag_after_very_many_models():
    n = 2**40
    moments = [[torch.ones(30)], [torch.ones(30)], [torch.zeros(7, 30)]]
    before = [[t.clone() for t in tensors] for tensors in moments]
    value = [torch.full((30,), 3.0)]
    ops.swag_collect_(*moments, value, n)
    swag.swag_collect_reference(*before, value, n)
    for ours, theirs in zip(moments, before, strict=True):
        assert_same_bits(ours, theirs)
    assert moments[2][0][n % 7, 0] == 2


def test_swag_of_many_tensors():
    shapes = [(i % 5,) for i in range(300)]
    moments = collected(3, shapes)
    ours, theirs = (
        sample_by(function, moments, 3, outputs(shapes=shapes))
        for function in (OP.swag_sample_, swag.swag_sample_reference)
    )
    assert_same_bits(ours, theirs)
