"""The geometry of a band and its cycles against plain loops in float64."""

import json
import math

import pytest
import torch

from losssurf_fast.neb import CYCLES, Cycle, band
from losssurf_fast.neb.cycles import places_to_insert, read_cycles

F64 = torch.float64


def random_band(pivots=7, size=13, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(pivots, size, generator=generator, dtype=F64).cumsum(0).to(dtype)
    return path, torch.randn(pivots, generator=generator, dtype=F64)


def tangent(path, losses, i):
    """Henkelman and Jonsson's improved tangent of pivot i, of unit length, written out."""
    unit = lambda v: v / v.norm()
    before, after = unit(path[i] - path[i - 1]), unit(path[i + 1] - path[i])
    low, here, high = losses[i - 1], losses[i], losses[i + 1]
    if high > here > low:
        return after
    if high < here < low:
        return before
    big, small = sorted((abs(high - here), abs(low - here)), reverse=True)
    return unit(big * after + small * before) if high > low else unit(small * after + big * before)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spring", [math.inf, 0.7])
def test_nudge_equals_a_loop(seed, spring):
    path, losses = random_band(seed=seed)
    grads = torch.randn(5, 13, dtype=F64)
    places = torch.tensor([0, 0.1, 0.3, 0.35, 0.6, 0.9, 1], dtype=F64)
    lengths = [(path[i + 1] - path[i]).norm() for i in range(6)]
    wanted = [(places[i + 1] - places[i]) * sum(lengths) for i in range(6)]
    expected = []
    for i in range(1, 6):
        along, g = tangent(path, losses, i), grads[i - 1]
        g = g - g.dot(along) * along
        if spring < math.inf:
            g = g + spring * ((lengths[i - 1] - wanted[i - 1]) - (lengths[i] - wanted[i])) * along
        expected.append(g)
    band.nudge_(grads, path, losses, places, spring)
    torch.testing.assert_close(grads, torch.stack(expected))
    if spring == math.inf:
        for i in range(1, 6):
            assert abs(grads[i - 1].dot(tangent(path, losses, i))) < 1e-12


def test_tangents_at_every_kind_of_pivot():
    """Rising, falling, a maximum and a minimum that lean to either side, and level ground."""
    cases = {
        (0.0, 1.0, 3.0): (0, 1),
        (3.0, 1.0, 0.0): (1, 0),
        (0.0, 4.0, 3.0): (1, 4),
        (3.0, 4.0, 0.0): (4, 1),
        (2.0, 0.0, 1.0): (2, 1),
        (1.0, 0.0, 2.0): (1, 2),
        (1.0, 1.0, 2.0): (0, 1),
        (2.0, 1.0, 1.0): (1, 0),
        (1.0, 1.0, 1.0): (0, 1),
    }
    for losses, expected in cases.items():
        found = band.tangent_weights(torch.tensor(losses))
        assert tuple(w.item() for w in found) == expected, losses


def test_nudge_of_degenerate_bands_is_finite():
    """Pivots on one another, and a fold where both segments cancel."""
    path = torch.zeros(5, 3, dtype=F64)
    path[-1, 0] = 1.0
    for losses in ([0, 1, 2, 3, 4], [0, 1, 0, 1, 0]):
        grads = torch.ones(3, 3, dtype=F64)
        band.nudge_(grads, path, torch.tensor(losses, dtype=F64), torch.linspace(0, 1, 5, dtype=F64))
        assert torch.isfinite(grads).all()
    fold = torch.tensor([[0.0, 0], [1, 0], [0, 0]], dtype=F64)
    grads = torch.ones(1, 2, dtype=F64)
    band.nudge_(grads, fold, torch.tensor([0.0, 1, 0]), torch.linspace(0, 1, 3, dtype=F64), spring=1.0)
    assert torch.isfinite(grads).all()


def test_nudge_in_float32_is_as_good_as_its_inputs():
    path, losses = random_band(pivots=5, size=20_000, dtype=torch.float32)
    grads = torch.randn(3, 20_000)
    exact = grads.double()
    band.nudge_(exact, path.double(), losses, torch.linspace(0, 1, 5, dtype=F64))
    band.nudge_(grads, path, losses, torch.linspace(0, 1, 5, dtype=F64))
    assert (grads - exact).abs().max() < 2e-6


def test_redistribute_equals_a_loop():
    for seed in range(5):
        path, _ = random_band(seed=seed)
        places = torch.rand(5, dtype=F64).sort().values
        places = torch.cat([torch.zeros(1, dtype=F64), places, torch.ones(1, dtype=F64)])
        ends = [0.0]
        for i in range(6):
            ends.append(ends[-1] + (path[i + 1] - path[i]).norm().item())
        expected = [path[0]]
        for place in places[1:-1].tolist():
            wanted, i = place * ends[-1], 0
            while wanted > ends[i + 1]:
                i += 1
            share = (wanted - ends[i]) / (ends[i + 1] - ends[i])
            expected.append(path[i] * (1 - share) + path[i + 1] * share)
        expected = torch.stack([*expected, path[-1]])
        first, last = path[0].clone(), path[-1].clone()
        band.redistribute(path, places)
        torch.testing.assert_close(path, expected)
        assert torch.equal(path[0], first) and torch.equal(path[-1], last)


def test_redistribute_keeps_an_even_band_and_one_with_equal_pivots():
    even = torch.linspace(0, 1, 6, dtype=F64).unsqueeze(1) * torch.ones(1, 3, dtype=F64)
    before, places = even.clone(), torch.linspace(0, 1, 6, dtype=F64)
    band.redistribute(even, places)
    torch.testing.assert_close(even, before)
    heap = torch.zeros(6, 3, dtype=F64)
    heap[-1] = 1.0
    band.redistribute(heap, places)
    torch.testing.assert_close(heap, before)
    nowhere = torch.ones(4, 3, dtype=F64)
    band.redistribute(nowhere, torch.linspace(0, 1, 4, dtype=F64))
    assert torch.equal(nowhere, torch.ones(4, 3, dtype=F64))


def test_insert():
    path = torch.tensor([[0.0, 0], [1, 0], [1, 2]], dtype=F64)
    segment, along = torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.25, 0.75], dtype=F64)
    expected = torch.tensor([[0.0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1.5], [1, 2]], dtype=F64)
    torch.testing.assert_close(band.insert(path, segment, along), expected)
    places = band.insert(torch.tensor([0.0, 0.4, 1], dtype=F64), segment, along)
    torch.testing.assert_close(places, torch.tensor([0, 0.2, 0.4, 0.55, 0.85, 1], dtype=F64))
    assert torch.equal(band.insert(path, segment[:0], along[:0]), path)


# ---- cycles ---------------------------------------------------------------------------------------------------------


def test_equal_pivots_in_every_segment():
    segment, along = places_to_insert(Cycle(insert="equal", count=3), 3, [], 0)
    assert segment.tolist() == [0, 0, 0, 1, 1, 1]
    assert along.tolist() == [0.25, 0.5, 0.75] * 2


def highest(pivots, losses, k, count, threshold):
    """The rule written out: (segment, share) of each pivot."""
    ends = losses[:: k + 1]
    scale = max(ends) - min(ends) + 1e-12
    best = []
    for i in range(pivots - 1):
        deviations = []
        for j in range(1, k + 1):
            share = j / (k + 1)
            deviations.append((losses[i * (k + 1) + j] - (1 - share) * ends[i] - share * ends[i + 1], -j, share))
        top = max(deviations)
        best.append((top[0] / scale, i, top[2]))
    chosen = [b for b in sorted(best, key=lambda b: (-b[0], b[1])) if b[0] > threshold][:count]
    return sorted((i, share) for _, i, share in chosen)


@pytest.mark.parametrize("count", [1, 2, None])
def test_highest_deviation_equals_a_loop(count):
    for seed in range(10):
        k, pivots = 3, 5
        losses = torch.rand(4 * 4 + 1, generator=torch.Generator().manual_seed(seed), dtype=F64).tolist()
        cycle = Cycle(insert="highest", count=count, threshold=0.2)
        segment, along = places_to_insert(cycle, pivots, losses, k)
        found = list(zip(segment.tolist(), along.tolist(), strict=True))
        assert found == highest(pivots, losses, k, count, 0.2)


def test_nothing_is_inserted_into_a_band_known_well_enough():
    straight = torch.linspace(0, 1, 9).tolist()
    for losses in (straight, [1.0] * 9, [-x * x for x in straight[::-1]][:9]):
        segment, along = places_to_insert(Cycle(insert="highest", threshold=0.3), 3, losses, 3)
        assert segment.numel() == along.numel() == 0
    segment, _ = places_to_insert(Cycle(insert="none"), 3, [0, 9, 0, 9, 0], 1)
    assert segment.numel() == 0


def test_cycles_are_differences_from_the_one_before(tmp_path):
    given = [{"steps": 7, "lr": 0.5, "count": 2}, {"insert": "highest", "count": None}, {}, {"lr": 0.1, "spring": 3.0}]
    cycles = read_cycles("caller", given)
    assert cycles[0] == Cycle(steps=7, lr=0.5, count=2)
    assert cycles[1] == cycles[2] == Cycle(steps=7, lr=0.5, insert="highest", count=None)
    assert cycles[3] == Cycle(steps=7, lr=0.1, insert="highest", count=None, spring=3.0)
    (tmp_path / "cycles.json").write_text(json.dumps(given))
    assert read_cycles("caller", tmp_path / "cycles.json") == cycles
    assert read_cycles("caller", [Cycle(lr=1.0), {"steps": 3}]) == [Cycle(lr=1.0), Cycle(lr=1.0, steps=3)]
    assert [c.steps for c in read_cycles("caller", CYCLES)] == [1000] * 4 + [2000] * 2 + [1000] * 8
    assert [c.lr for c in read_cycles("caller", CYCLES)] == [0.1] * 6 + [0.01] * 4 + [0.001] * 4


@pytest.mark.parametrize(
    ("cycles", "error", "message"),
    [
        (3, TypeError, "caller: cycles must be a list of dicts or Cycles, got int"),
        ({"steps": 3}, TypeError, "caller: cycles must be a list of dicts or Cycles, got dict"),
        ([], ValueError, "caller: cycles must be at least one, got none"),
        ([3], TypeError, r"caller: cycles\[0\] must be a dict or a Cycle, got int"),
        ([{}, {"step": 3}], ValueError, r"caller: cycles\[1\] may have steps, lr, .*; got 'step'"),
        ([{"steps": -1}], ValueError, r"caller: cycles\[0\]: Cycle: steps must be at least 0, got -1"),
        ([{"steps": 1.5}], TypeError, "Cycle: steps must be an int, got float"),
        ([{"count": 0}], ValueError, "Cycle: count must be at least 1, got 0"),
        ([{"count": None}], ValueError, "Cycle: count must be given for insert='equal', got None"),
        ([{"subsample": True}], TypeError, "Cycle: subsample must be an int, got bool"),
        ([{"lr": "fast"}], TypeError, "Cycle: lr must be a number, got str"),
        ([{"lr": math.nan}], ValueError, "Cycle: lr must be at least 0, got nan"),
        ([{"lr": math.inf}], ValueError, "Cycle: lr must be finite, got inf"),
        ([{"spring": -1.0}], ValueError, "Cycle: spring must be at least 0, got -1.0"),
        ([{"momentum": 1.0}], ValueError, r"Cycle: momentum must lie in \[0, 1\), got 1.0"),
        ([{"insert": "some"}], ValueError, "Cycle: insert must be one of .*, got 'some'"),
        ([{"spacing": "some"}], ValueError, "Cycle: spacing must be one of .*, got 'some'"),
        ([{"insert": "highest"}], ValueError, r"cycles\[0\] must have insert='equal', .* got 'highest'"),
        (
            [{}, {"subsample": 0}, {"insert": "highest"}],
            ValueError,
            r"caller: cycles\[1\] must have a subsample of at least 1, as cycles\[2\] inserts",
        ),
        ("no/such/file.json", FileNotFoundError, "no/such/file.json"),
    ],
)
def test_bad_cycles(cycles, error, message):
    with pytest.raises(error, match=message):
        read_cycles("caller", cycles)


def test_a_damaged_file_of_cycles(tmp_path):
    (tmp_path / "cycles.json").write_text("[{")
    with pytest.raises(ValueError, match=r"caller: cycles must be a JSON file, .*cycles.json is none"):
        read_cycles("caller", tmp_path / "cycles.json")
