"""SWAG's operators as users call them: layouts, versions, compile, refusals."""

import pytest
import torch
from common import BF16, F16, F32, F64
from test_swag import OP, assert_same_bits, collected, state

import losssurf_fast as lsf
from losssurf_fast import ops
from losssurf_fast.ops.swag import Place

# ---- layouts --------------------------------------------------------------------------------------------------------


def test_swag_collects_values_of_any_layout():
    values = [torch.randn(6, 4).t(), torch.randn(1, 5).expand(3, 5), torch.randn(2, 3, 4, 5)[:, 1:, ::2]]
    values.append(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    shapes = [v.shape for v in values]
    ours, theirs = state(shapes), state(shapes)
    for n in range(2):
        ops.swag_collect_(*ours, values, n)
        ops.swag_collect_(*theirs, [v.contiguous() for v in values], n)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_swag_samples_into_any_layout(dtype):
    shapes = [(2, 3, 4, 4), (7, 5)]
    moments = collected(shapes=shapes)
    expected = ops.swag_sample(*moments, 5, 1)
    out = [
        torch.empty(shapes[0], dtype=dtype).to(memory_format=torch.channels_last),
        torch.empty(5, 7, dtype=dtype).t(),
    ]
    assert ops.swag_sample(*moments, 5, 1, out=out)[0] is out[0]
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(out, [t.to(dtype) for t in expected])
    wide = [torch.empty(2 * t.numel(), dtype=dtype)[1::2].view_as(t) for t in expected]
    ops.swag_sample(*moments, 5, 1, out=wide)
    assert_same_bits(wide, [t.to(dtype) for t in expected])


def test_swag_refuses_shared_memory():
    mean, m2, deviations = collected(shapes=[(4,), (6,)])
    before = [t.clone() for t in mean]
    values = [torch.ones(4), torch.ones(6)]
    both = torch.zeros(9)
    draw = lambda out: ops.swag_sample(mean, m2, deviations, 5, 1, out=out)
    for call, message in (
        (lambda: ops.swag_collect_(mean, mean, deviations, values, 5), "must not share memory"),
        (lambda: ops.swag_collect_([mean[1][:4], mean[1]], m2, deviations, values, 5), "must not share memory"),
        (lambda: draw(mean), r"out\[\d\] and mean\[\d\] must not share memory"),
        (lambda: draw([both[:4], both[3:]]), r"out\[0\] and out\[1\]"),
        (lambda: draw([both[:1].expand(4), both[3:]]), "must not be expanded"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same_bits(mean, before)
    assert not both.any()


def test_swag_of_no_tensors():
    ops.swag_collect_([], [], [], [], 3)
    assert ops.swag_sample([], [], [], 3, 0) == []


def test_swag_shapes_of_results():
    moments = collected(shapes=[(2, 3), ()])
    assert [t.shape for t in ops.swag_sample(*moments, 5)] == [(2, 3), ()]
    assert [t.shape for t in ops.swag_sample(*moments, 5, num_samples=1)] == [(1, 2, 3), (1,)]
    assert [t.shape for t in ops.swag_sample(*moments, 5, num_samples=4)] == [(4, 2, 3), (4,)]


def test_swag_seeds():
    moments = collected(shapes=[(200,)])
    draw = lambda seed=None, **options: ops.swag_sample(*moments, 5, seed, **options)
    assert_same_bits(draw(3), draw(torch.tensor(3)))
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert_same_bits(draw(), first)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(draw(3)[0], draw(3, sample=1)[0])


# ---- autograd and compile -------------------------------------------------------------------------------------------


def test_swag_bumps_versions():
    moments, values = collected(shapes=[(5,), (0,)]), [torch.ones(5), torch.ones(0)]
    changed = [t for tensors in moments for t in tensors]
    before = [t._version for t in changed]
    ops.swag_collect_(*moments, values, 5)
    assert all(t._version > v for t, v in zip(changed, before, strict=True))
    assert [t._version for t in values] == [0, 0]
    before, out = [t._version for t in changed], [torch.ones(5), torch.ones(0)]
    versions = [t._version for t in out]
    ops.swag_sample(*moments, 6, 0, out=out)
    assert [t._version for t in changed] == before
    assert all(t._version > v for t, v in zip(out, versions, strict=True))


def test_swag_refuses_leaves_that_require_grad():
    moments, leaf = collected(shapes=[(5,)]), torch.ones(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="swag_collect_: mean, m2 and deviations are changed in place"):
        ops.swag_collect_([leaf], *moments[1:], [torch.ones(5)], 5)
    with pytest.raises(RuntimeError, match="swag_sample: out are changed in place"):
        ops.swag_sample(*moments, 5, out=[leaf])
    with torch.no_grad():
        ops.swag_sample(*moments, 5, 0, out=[leaf])
    assert_same_bits([leaf], ops.swag_sample(*moments, 5, 0))
    ops.swag_collect_(*moments, [leaf], 5)  # a model's parameters are values
    assert not any(t.requires_grad for tensors in moments for t in tensors)


def test_swag_opcheck():
    for dtype, deviation in ((F32, F32), (F32, BF16), (F64, F64)):
        moments = state([(3, 2), (0,), ()], 2, dtype, deviation)
        for n in (0, 3):
            values = [torch.randn(3, 2), torch.randn(0), torch.randn(())]
            torch.library.opcheck(OP.swag_collect_, (*moments, values, n))
        torch.library.opcheck(OP.swag_collect_, (*moments[:2], [], values, 1))
        for lead, cov, block in (((), True, False), ((3,), True, True)):
            out = [torch.empty((*lead, *t.shape)) for t in moments[0]]
            places = [0, 0, 6, 0, 1, 0, 0, 0, 2, 0, 1, 0]
            arguments = (0.5, cov, block, 0, lead[0] if lead else 1, places, 3)
            torch.library.opcheck(OP.swag_sample_, (out, *moments, torch.tensor(3), 4, *arguments))


def test_swag_compile():
    def step(mean, m2, deviations, values, seed):
        ops.swag_collect_(mean, m2, deviations, values, 5)
        return [2 * t for t in ops.swag_sample(mean, m2, deviations, 6, seed, num_samples=2)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs, values = (
        collected(shapes=[(5, 3), (8,)]),
        collected(shapes=[(5, 3), (8,)]),
        [torch.ones(5, 3), torch.ones(8)],
    )
    assert_same_bits(compiled(*ours, values, torch.tensor(2)), step(*theirs, values, torch.tensor(2)))
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def test_swag_under_transforms_takes_the_reference():
    moments = collected(shapes=[(6,)])
    expected = ops.swag_sample(*moments, 5, 3)
    drawn = torch.func.vmap(lambda x: x + ops.swag_sample(*moments, 5, 3)[0])(torch.zeros(2, 6))
    assert_same_bits([drawn[1].clone()], expected)


def test_swag_kernel_for():
    for name in ("swag_collect_", "swag_sample_"):
        assert lsf.kernel_for(name, "cpu").startswith("C++")


# ---- refusals -------------------------------------------------------------------------------------------------------

A = torch.ones(2, 3)  # a mean, an m2 or a value
D = torch.ones(4, 6)  # its deviations
META = torch.ones(2, 3, device="meta")

STATES = [
    (([A], [A, A], [D]), ValueError, "m2 must hold 1 tensors like mean, got 2"),
    (([A], [A], [D, D]), ValueError, "deviations must hold no tensor or 1 like mean, got 2"),
    (([A.half()], [A], [D]), TypeError, r"mean\[0\] and m2\[0\] must be both .* got torch.float16, torch.float32"),
    (([A], [A.double()], [D]), TypeError, r"mean\[0\] and m2\[0\] must be both .* got torch.float32, torch.float64"),
    (([A], [A.t()], [D]), ValueError, r"m2\[0\] must be like mean\[0\], \(2, 3\) on cpu, got \(3, 2\) on cpu"),
    (([A], [META], [D]), ValueError, r"m2\[0\] must be like mean\[0\], \(2, 3\) on cpu, got \(2, 3\) on meta"),
    (([A.t()], [A.t()], [D]), ValueError, r"mean\[0\] and m2\[0\] must be contiguous"),
    (([A], [A], [D.int()]), TypeError, r"deviations\[0\] must be float32, bfloat16 or float16 .* got torch.int32"),
    (([A], [A], [D.double()]), TypeError, "must be float32, .* beside a torch.float32 mean, got torch.float64"),
    (([A.double()], [A.double()], [D]), TypeError, "must be float64 beside a torch.float64 mean, got torch.float32"),
    (([A], [A], [D[0]]), ValueError, r"deviations\[0\] must be \[K, 6\] on cpu, got \(6,\) on cpu"),
    (([A], [A], [D[:0]]), ValueError, r"deviations\[0\] must be \[K, 6\] on cpu, got \(0, 6\) on cpu"),
    (([A], [A], [D[:, :5]]), ValueError, r"deviations\[0\] must be \[K, 6\] on cpu, got \(4, 5\) on cpu"),
    (([A], [A], [D.to("meta")]), ValueError, r"deviations\[0\] must be \[K, 6\] on cpu, got \(4, 6\) on meta"),
    (([A, A], [A, A], [D, D[:3]]), ValueError, r"deviations\[1\] must hold 4 columns like deviations\[0\], got 3"),
    (([A], [A], [D.t().contiguous().t()]), ValueError, r"deviations\[0\] must be contiguous"),
]


@pytest.mark.parametrize("moments, error, message", STATES)
def test_swag_bad_state(moments, error, message):
    values = [A] * len(moments[0])
    with pytest.raises(error, match=f"swag_collect_: .*{message}"):
        ops.swag_collect_(*moments, values, 1)
    with pytest.raises(error, match=f"swag_sample: .*{message}"):
        ops.swag_sample(*moments, 1, 0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: ops.swag_collect_(*s, [A, A], 1), ValueError, "values must hold 1 tensors like mean, got 2"),
        (lambda s: ops.swag_collect_(*s, [A.int()], 1), TypeError, r"values\[0\] must have .* got torch.int32"),
        (lambda s: ops.swag_collect_(*s, [A.t()], 1), ValueError, r"values\[0\] .* \(2, 3\) on cpu, got \(3, 2\)"),
        (lambda s: ops.swag_collect_(*s, [META], 1), ValueError, r"values\[0\] must be like mean\[0\].* on meta"),
        (lambda s: ops.swag_collect_(*s, [A], -1), ValueError, "swag_collect_: n must be at least 0, got -1"),
        (lambda s: OP.swag_collect_(*s, [A], -1), ValueError, "swag_collect_: n must not be negative, got -1"),
        (lambda s: ops.swag_collect_(*s, [A], 1.0), TypeError, "swag_collect_: n must be an int, got float"),
        (lambda s: ops.swag_collect_(A, *s[1:], [A], 1), TypeError, "mean must be a sequence of tensors, got Tensor"),
        (lambda s: ops.swag_collect_(*s, [1.0], 1), TypeError, r"values\[0\] must be a tensor, got float"),
        (lambda s: ops.swag_sample(*s, 0), ValueError, "swag_sample: n must be at least 1, got 0"),
        (lambda s: raw_sample(s, n=0), ValueError, "n must be at least 1, nothing has been collected, got 0"),
        (lambda s: raw_sample(s, places=[0, 0]), ValueError, "out and places must hold 1 like mean, got 1, 0"),
        (lambda s: ops.swag_sample(*s, 1, out=[]), ValueError, "out and places must hold 1 like mean, got 0, 1"),
        (lambda s: ops.swag_sample(*s, 1, out=[A.int()]), TypeError, r"out\[0\] must have a floating .* torch.int32"),
        (lambda s: ops.swag_sample(*s, 1, out=[A.t()]), ValueError, r"out\[0\] must be \(1, 2, 3\), got \(3, 2\)"),
        (lambda s: ops.swag_sample(*s, 1, num_samples=2, out=[A]), ValueError, r"must be \(2, 2, 3\), got \(2, 3\)"),
        (lambda s: ops.swag_sample(*s, 1, out=[META]), ValueError, r"out\[0\] must be on mean's cpu, got meta"),
        (lambda s: ops.swag_sample(*s, 1, num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda s: ops.swag_sample(*s, 1, scale="1"), TypeError, "swag_sample: scale must be a number, got str"),
        (lambda s: ops.swag_sample(*s, 1, scale=-1.0), ValueError, "scale must be finite and not negative, got -1.0"),
        (lambda s: ops.swag_sample(*s, 1, scale=float("nan")), ValueError, "scale must be finite .* got nan"),
        (lambda s: ops.swag_sample(*s, 1, cov=1), TypeError, "swag_sample: cov must be a bool, got int"),
        (lambda s: ops.swag_sample(*s, 1, block=None), TypeError, "swag_sample: block must be a bool, got NoneType"),
        (lambda s: ops.swag_sample(*s, 1, 2**63), ValueError, "swag_sample: seed must fit in 64 bits"),
        (lambda s: ops.swag_sample(*s, 1, sample=2**32), ValueError, "swag_sample: sample must lie in"),
        (lambda s: ops.swag_sample(*s, 1, sample=2**32 - 1, num_samples=2), ValueError, "sample must lie in"),
        (lambda s: ops.swag_sample(*s, 1, places=[]), ValueError, "places must hold 1 like mean, got 0"),
        (lambda s: ops.swag_sample(*s, 1, places=[Place(-1)]), ValueError, "places' row must be at least 0, got -1"),
        (lambda s: ops.swag_sample(*s, 1, places=[Place(0, 1.0)]), TypeError, "places' offset must be an int"),
        (lambda s: ops.swag_sample(*s, 1, places=[Place(0, 0, 4, 9)]), ValueError, "whole runs that do not overlap"),
        (lambda s: ops.swag_sample(*s, 1, places=[Place(0, 0, 3, 2)]), ValueError, "whole runs that do not overlap"),
        (lambda s: ops.swag_sample(*s, 1, places=[Place(0, 2**34 - 5)]), ValueError, "columns must lie in"),
        (lambda s: ops.swag_sample(*s, 1, places=[Place(3)], num_params=3), ValueError, "num_params must be at least"),
    ],
)  # fmt: skip
def test_swag_bad_calls_change_nothing(call, error, message):
    moments = [[A.clone()], [A.clone()], [D.clone()]]
    with pytest.raises(error, match=message):
        call(moments)
    for tensors, expected in zip(moments, (A, A, D), strict=True):
        assert torch.equal(tensors[0], expected)


def raw_sample(moments, n=1, places=(0, 0, 6, 0)):
    OP.swag_sample_([A.clone()], *moments, torch.tensor(0), n, 0.5, True, False, 0, 1, places, 1)


def test_swag_checks_every_tensor_before_it_changes_any():
    """The last of the list is wrong; the first keeps its values. So in the operators of C++."""
    moments = collected(shapes=[(50,), (6,)])
    before = [[t.clone() for t in tensors] for tensors in moments]
    with pytest.raises(TypeError, match=r"values\[1\]"):
        OP.swag_collect_(*moments, [torch.ones(50), torch.ones(6).long()], 5)
    out = [torch.ones(50), torch.ones(7)]
    with pytest.raises(ValueError, match=r"out\[1\]"):
        ops.swag_sample(*moments, 5, out=out)
    for ours, theirs in zip([*moments, out], [*before, [torch.ones(50), torch.ones(7)]], strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_swag_of_half_precision_models(dtype):
    """fp32 moments of half-precision weights: results in the model's dtype are the fp32 ones, rounded."""
    moments = collected(shapes=[(300,)], values=dtype, deviation_dtype=dtype)
    assert moments[0][0].dtype == F32 and moments[2][0].dtype == dtype
    out = ops.swag_sample(*moments, 5, 0, out=[torch.empty(300, dtype=dtype)])
    assert_same_bits(out, [t.to(dtype) for t in ops.swag_sample(*moments, 5, 0)])
