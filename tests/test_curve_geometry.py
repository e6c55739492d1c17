import numpy as np
import pytest
import torch
from common import F64
from distributed import run_ranks
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.curve import geometry
from losssurf_fast.curve.geometry import Geometry, gram

KINDS = ("bezier", "polychain")
SHAPES = ((5, 3), (1,), (), (0, 4), (7,), (2, 3, 5))


def bends_of(count, dtype=F64, seed=0, requires_grad=False):
    """K lists of tensors, among them an expanded and a transposed one."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=g, dtype=F64).to(dtype)
    bends = [[draw(shape) for shape in SHAPES] + [draw((1, 4)).expand(3, 4), draw((4, 6)).t()] for _ in range(count)]
    return [[t.requires_grad_(requires_grad) for t in bend] for bend in bends]


def vector(bends, t, kind):
    """w(t) as one vector, float64, from the formula of the paper."""
    flat = torch.stack([torch.cat([x.double().reshape(-1) for x in bend]) for bend in bends])
    return lsf.ops.curve_coefficients(torch.as_tensor(t, dtype=F64), len(bends), kind) @ flat


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_geometry_equals_distances_of_points(count, kind, dtype):
    bends, ts = bends_of(count, dtype), torch.linspace(0, 1, 12, dtype=F64)
    curve = Geometry.of(bends, kind)
    points = torch.stack([vector(bends, t, kind) for t in ts])
    torch.testing.assert_close(curve.norm(ts), points.norm(dim=1), rtol=1e-12, atol=0)
    dl = curve.chords(ts)
    assert dl[0] == 0 and dl.dtype == F64
    torch.testing.assert_close(dl[1:], points.diff(dim=0).norm(dim=1), rtol=1e-12, atol=0)
    derivative = torch.func.jacfwd(lambda t: vector(bends, t, kind))
    inner = torch.tensor([0.05, 0.3, 0.71, 0.9], dtype=F64)
    speed = torch.stack([derivative(t).norm() for t in inner])
    torch.testing.assert_close(curve.speed(inner), speed, rtol=1e-12, atol=0)
    torch.testing.assert_close(curve.speed(inner[:, None]), speed[:, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_length_is_that_of_many_chords(kind):
    curve = Geometry.of(bends_of(4), kind)
    many = curve.chords(torch.linspace(0, 1, 30001, dtype=F64)).sum()
    torch.testing.assert_close(curve.length(), many, rtol=1e-8, atol=0)


def test_geometry_of_close_bends_far_from_zero():
    """w is large and the legs are small: the plain Gram matrix of the bends would lose all digits of them."""
    bends = [[torch.full((1000,), 1e4, dtype=F64) + 1e-6 * j] for j in range(3)]
    for kind in KINDS:
        torch.testing.assert_close(Geometry.of(bends, kind).length().item(), 2e-6 * 1000**0.5, rtol=1e-5, atol=0)


def test_geometry_chunks_do_not_matter(monkeypatch):
    bends = bends_of(3, torch.float32)
    whole = Geometry.of(bends, "bezier").gram
    for size in (1, 4, 7, 16):
        monkeypatch.setitem(geometry._CHUNK, "cpu", size)
        torch.testing.assert_close(Geometry.of(bends, "bezier").gram, whole, rtol=1e-13, atol=1e-13)
    empty = Geometry.of([[torch.empty(0)], [torch.empty(0)]], "polychain")
    assert empty.length() == 0 and empty.arc_weight(torch.tensor(0.5)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_gradients(kind):
    ts = torch.tensor([0.1, 0.34, 0.8], dtype=F64, requires_grad=True)
    bends = [[x[:5] for x in bend[:2] + bend[4:5]] for bend in bends_of(4)]
    flat = [t.clone().requires_grad_() for bend in bends for t in bend]
    curve = lambda flat: Geometry.of([flat[3 * j : 3 * j + 3] for j in range(4)], kind)
    for quantity in (
        lambda ts, *flat: curve(flat).arc_weight(ts),
        lambda ts, *flat: curve(flat).length(),
        lambda ts, *flat: curve(flat).norm(ts),
        lambda ts, *flat: curve(flat).chords(ts),
    ):
        assert torch.autograd.gradcheck(quantity, (ts, *flat))
    assert torch.autograd.gradgradcheck(lambda *flat: curve(flat).length(), flat)


def test_geometry_gradients_go_where_they_are_needed():
    bends = bends_of(3, torch.float32)
    moving = [t.requires_grad_() for t in bends[1][:2]]
    weight = Geometry.of(bends, "bezier").arc_weight(torch.tensor(0.2))
    found = torch.autograd.grad(weight, moving)
    exact = bends_of(3)
    exact = [[t.detach().float().double() for t in bend] for bend in exact]
    for t in exact[1][:2]:
        t.requires_grad_()
    wanted = torch.autograd.grad(Geometry.of(exact, "bezier").arc_weight(torch.tensor(0.2, dtype=F64)), exact[1][:2])
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_geometry_quantile_inverts_the_length(count, kind):
    curve = Geometry.of(bends_of(count, seed=1), kind)
    u = torch.linspace(0, 1, 41, dtype=F64)
    t = curve.quantile(u)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()
    corners = torch.arange(count, dtype=F64) / (count - 1)
    for i in (3, 20, 33):  # the length up to t, by chords: of a chain those between its corners
        steps = corners[corners < t[i]] if kind == "polychain" else torch.linspace(0, t[i].item(), 20001, dtype=F64)
        part = curve.chords(torch.cat([steps, t[i : i + 1]])).sum() / curve.length()
        assert part.item() == pytest.approx(u[i].item(), abs=1e-12 if kind == "polychain" else 1e-5)
    assert curve.quantile(torch.rand(2, 3)).shape == (2, 3) and curve.quantile(torch.rand(())).dtype == torch.float32


def test_geometry_quantile_of_pieces_without_length():
    """A chain that stays where it is for a third of t, and one that never moves."""
    a, b, c = torch.zeros(2), torch.ones(2), torch.full((2,), 3.0)
    t = Geometry.of([[a], [b], [b], [c]], "polychain").quantile(
        torch.tensor([0.0, 1 / 6, 1 / 3 + 1e-6, 1.0], dtype=F64)
    )
    np.testing.assert_allclose(t, [0, 1 / 6, 2 / 3, 1], atol=1e-5)
    u = torch.tensor([0.0, 0.3, 1.0])
    for kind in KINDS:
        still = Geometry.of([[a]] * 3, kind)
        torch.testing.assert_close(still.quantile(u), u)
        ends = torch.tensor([0.2, 1.0])
        assert still.length() == 0 and torch.equal(still.arc_weight(ends), torch.ones(2, dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_under_torch_func(kind):
    bends = [[x[:1] for x in bend[:2]] for bend in bends_of(3)]
    length = lambda x: Geometry.of([bends[0], [x, bends[1][1]], bends[2]], kind).length()
    x = bends[1][0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(length(x), x)
    x = x.detach()
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(transform(length)(x), wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(length(dual)).tangent
    torch.testing.assert_close(tangent, wanted.sum())
    both = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.vmap(length)(both), torch.stack([length(x), length(x + 1)]))
    torch.testing.assert_close(
        torch.func.hessian(length)(x), torch.autograd.functional.hessian(length, x), rtol=1e-9, atol=1e-12
    )


def test_geometry_nan_is_not_taken_for_zero():
    curve = Geometry.of([[torch.zeros(2)], [torch.tensor([0.0, torch.nan])], [torch.ones(2)]], "bezier")
    t = torch.tensor([0.2, 0.7])
    for value in (curve.length(), curve.speed(t), curve.norm(t), curve.chords(t)[1:], curve.arc_weight(t)):
        assert value.isnan().all()
    assert torch.equal(curve.quantile(t), t)


# ---- Curve -----------------------------------------------------------------------------------------------------------


def curve_of(kind="bezier", num_bends=3, t_sampling="uniform", bent=1.0, dtype=F64):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype) for _ in range(2)]
    curve = lsf.Curve(models, kind=kind, num_bends=num_bends, t_sampling=t_sampling)
    with torch.no_grad():
        for bend in list(curve.bends)[1:-1]:
            for p in bend.parameters():
                p.add_(bent * torch.randn_like(p))
    return curve


def arc_loss(curve, data, targets, points=4000):
    """The talk's loss by arc length, by the midpoint rule with chords of its own, differentiable in the bends."""
    edges = torch.linspace(0, 1, points + 1, dtype=F64)
    flat = torch.stack([torch.cat([p.flatten() for p in bend.parameters()]) for bend in curve.bends])
    coefficients = lsf.ops.curve_coefficients(edges, curve.num_bends, curve.kind)
    lengths = (coefficients @ flat).diff(dim=0).norm(dim=1)
    loss = lambda t: nn.functional.mse_loss(curve(data, t=t), targets)
    losses = torch.stack([loss(t) for t in (edges[1:] + edges[:-1]) / 2])
    return (losses * lengths).sum() / lengths.sum()


def gradient(curve, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, curve.bends[1].parameters())])


@pytest.mark.parametrize("kind", KINDS)
def test_curve_arc_weight_gives_the_exact_loss_and_gradient(kind):
    curve = curve_of(kind)
    data, targets = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    exact = arc_loss(curve, data, targets, 800)
    ts = (torch.arange(400, dtype=F64) + 0.5) / 400
    losses = [nn.functional.mse_loss(curve(data, t=t), targets) * curve.arc_weight() for t in ts]
    assert curve.arc_weight() == curve.arc_weight(ts[-1])
    estimate = torch.stack(losses).mean()  # the mean over uniform t
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=0)
    wanted = gradient(curve, exact)
    assert (gradient(curve, estimate) - wanted).norm() < 1e-4 * wanted.norm()
    plain = torch.stack([nn.functional.mse_loss(curve(data, t=t), targets) for t in ts]).mean()
    assert (gradient(curve, plain) - wanted).norm() > 0.005 * wanted.norm()  # and uniform t alone does not


@pytest.mark.parametrize("kind", KINDS)
def test_curve_arc_length_sampling_has_the_exact_loss_as_its_mean(kind, monkeypatch):
    """With strata of u in place of random ones the mean of the losses is the integral's, not only near it."""
    curve = curve_of(kind, t_sampling="arc_length")
    data, targets = torch.randn(6, 3, dtype=F64), torch.randn(6, 2, dtype=F64)
    with torch.no_grad():
        exact = arc_loss(curve, data, targets, 800)
        us = iter((torch.arange(400) + 0.5) / 400)
        monkeypatch.setattr(torch, "rand", lambda *size, **options: next(us))
        ts = torch.stack([curve.sample_t() for _ in range(400)])
        estimate = torch.stack([nn.functional.mse_loss(curve(data, t=t), targets) for t in ts]).mean()
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=0)


def test_curve_arc_length_sampling_draws_by_length():
    curve = curve_of("polychain", 4, "arc_length", bent=2.0, dtype=torch.float32)
    ts = torch.stack([curve.sample_t() for _ in range(3000)])
    assert ts.dtype == torch.float32
    legs = curve.geometry().speed(torch.tensor([1 / 6, 1 / 2, 5 / 6])) / 3
    shares = torch.histc(ts, 3, 0, 1) / 3000
    torch.testing.assert_close(shares.double(), (legs / legs.sum()).detach(), rtol=0, atol=4 * 0.5 / 3000**0.5)
    torch.manual_seed(5)
    a, b = curve.sample_t(), torch.rand(())
    torch.manual_seed(5)
    uniform = curve_of("polychain", 4)
    torch.manual_seed(5)
    assert uniform.sample_t() != a
    assert torch.rand(()) == b  # one draw each


def test_curve_length():
    curve = curve_of()
    assert curve.length(61).item() == pytest.approx(curve.length().item(), rel=1e-3)
    assert curve.length(2).item() < curve.length(61).item() < curve.length().item()
    straight = curve_of(bent=0.0)
    ends = [torch.cat([p.flatten() for p in straight.bends[j].parameters()]) for j in (0, 2)]
    assert straight.length().item() == pytest.approx((ends[1] - ends[0]).norm().item(), rel=1e-12)
    assert straight.arc_weight(0.3).item() == pytest.approx(1, rel=1e-12)
    (gradient_,) = torch.autograd.grad(curve.length(), [curve.bends[1].get_parameter("0.weight")])
    assert gradient_.abs().sum() > 0


def test_curve_trains_by_arc_length():
    curve = curve_of(t_sampling="arc_length", dtype=torch.float32)
    optimizer = torch.optim.SGD([p for p in curve.parameters() if p.requires_grad], lr=0.1)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    torch.compile(curve, fullgraph=True, backend="aot_eager")(x)
    t = torch.tensor(0.3)
    weight = lambda: curve.arc_weight(t) + curve.length()
    wanted = torch.autograd.grad(weight(), curve.bends[1].parameters())
    found = torch.autograd.grad(
        torch.compile(weight, fullgraph=True, backend="aot_eager")(), curve.bends[1].parameters()
    )
    torch.testing.assert_close(found, wanted)
    before = [p.clone() for p in curve.parameters()]
    nn.functional.mse_loss(curve(x), y).backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, curve.parameters(), strict=True)]
    assert moved == [p.requires_grad for p in curve.parameters()]


def test_curve_length_of_complex_weights():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase, self.gain = nn.Parameter(torch.randn(3, dtype=torch.complex128)), nn.Parameter(torch.randn(2))

    curve = lsf.Curve([Phases(), Phases()])
    first, last = ([bend.phase, bend.gain] for bend in (curve.bends[0], curve.bends[2]))
    square = sum((a - b).abs().double().square().sum() for a, b in zip(first, last, strict=True))
    assert curve.length().item() == pytest.approx(square.sqrt().item(), rel=1e-6)
    with torch.no_grad():
        curve.bends[1].phase.add_(1j)
    curve.length().backward()
    assert curve.bends[1].phase.grad.dtype == torch.complex128 and curve.bends[1].phase.grad.imag.abs().max() > 0


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda c: c.length(1), ValueError, "Curve.length: num_points must be at least 2, got 1"),
        (lambda c: c.length(2.0), TypeError, "Curve.length: num_points must be an int, got float"),
        (lambda c: c.arc_weight(1.5), ValueError, r"Curve.arc_weight: t must lie in \[0, 1\]"),
        (lambda c: c.arc_weight(), RuntimeError, "Curve.arc_weight: without t it is that of the last forward"),
        (lambda c: c.arc_weight("a"), TypeError, "Curve.arc_weight: t must be a number"),
        (lambda c: curve_of(t_sampling="arc"), ValueError, "Curve: t_sampling must be one of .*got 'arc'"),
    ],
)
def test_curve_geometry_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call(curve_of())


def _sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    bends = [bend[:2] + bend[4:] for bend in bends_of(3)]
    places = [[Shard(0)], [Shard(0)], [Replicate()], [Shard(1)], [Shard(0)], [Replicate()]]
    sharded = [
        [distribute_tensor(t.contiguous(), mesh, p) for t, p in zip(bend[:5], places, strict=False)] + bend[5:]
        for bend in bends
    ]
    whole = Geometry.of(bends, "bezier")
    torch.testing.assert_close(Geometry.of(sharded, "bezier").gram, whole.gram, rtol=1e-12, atol=1e-12)
    sharded[1][0].requires_grad_()
    with pytest.raises(NotImplementedError, match="a sharded curve's length"):
        Geometry.of(sharded, "bezier").length().backward()

    whole_curve, curve = curve_of(), curve_of(t_sampling="arc_length").shard_()
    torch.testing.assert_close(curve.length(), whole_curve.length())
    torch.manual_seed(rank)  # rank 0's draw is everyone's
    u = torch.manual_seed(0) and torch.rand(())
    torch.manual_seed(rank)
    torch.testing.assert_close(curve.sample_t(), whole_curve.geometry().quantile(u), check_dtype=False)
    stratified = lsf.Curve(
        [whole_curve.module_at(t) for t in (0.0, 1.0)], t_per_rank="stratified", t_sampling="arc_length"
    )
    torch.manual_seed(rank)
    torch.testing.assert_close(stratified.sample_t(), (u + rank / 2) % 1)  # a straight line
    nn.functional.mse_loss(curve(torch.randn(6, 3, dtype=F64)), torch.zeros(6, 2, dtype=F64)).backward()
    with pytest.raises(NotImplementedError, match="a sharded curve's length"):
        curve.arc_weight(0.3).backward()


def test_geometry_of_sharded_bends():
    run_ranks(_sharded)


def test_gram_is_that_of_the_concatenated_vectors():
    torch.manual_seed(0)
    sizes = [(3,), (200, 100), (0,), (), (7, 5)]  # of which one is cut into chunks
    vectors = [[torch.randn(size) for size in sizes] for _ in range(3)]
    rows = torch.stack([torch.cat([t.double().flatten() for t in v]) for v in vectors])
    torch.testing.assert_close(gram(vectors), rows @ rows.T, rtol=1e-12, atol=1e-9)
    rows[1:] -= rows[0].clone()
    torch.testing.assert_close(gram(vectors, from_first=True), rows @ rows.T, rtol=1e-12, atol=1e-9)
