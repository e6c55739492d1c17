"""AutoNEB: paths on energies whose saddle is known, resumed runs, bad input, files."""

import itertools
import math

import pytest
import torch
from common import CountReads
from neb_models import F64, LOADER, SHORT, Valley, assert_untouched, bits, minima, run
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.neb import Cycle, NEBReport, band


@pytest.mark.parametrize("spring", [math.inf, 1.0])
def test_the_band_sinks_to_the_saddle(spring):
    cycles = [{"steps": 200, "lr": 0.005, "spring": spring}, {"insert": "highest", "count": 2}, {}]
    curve, report = run(*minima(), cycles=cycles)
    assert Valley.saddle - 1e-6 <= report.saddle < 1.01  # the straight line rises to 12.25
    assert abs(report.saddle_t - 0.5) < 0.1
    assert curve.kind == "polychain" and curve.num_bends == report.history[-1]["pivots"] > 5
    lengths = torch.tensor(report.lengths)
    assert (lengths / lengths.mean() - 1).abs().max() < 0.1
    assert report.history[0]["saddle"] >= report.saddle


def test_the_report_is_the_curves():
    curve, report = run(*minima(), cycles=[*SHORT, {"spacing": "inserted"}])
    step = report.subsample + 1
    assert len(report.points["loss"]) == (curve.num_bends - 1) * step + 1
    for t, loss in zip(report.points["t"], report.points["loss"], strict=True):
        with curve.at(t) as model:
            assert abs(model(LOADER[0][0]).item() - loss) < 1e-12
    assert report.saddle == max(report.points["loss"])
    assert report.pivot_losses == report.points["loss"][::step]
    rows = [torch.stack([bend.x, bend.y]).detach() for bend in curve.bends]
    lengths = [(b - a).norm().item() for a, b in itertools.pairwise(rows)]
    assert report.lengths == pytest.approx(lengths) and report.length == pytest.approx(sum(lengths))
    assert [h["pivots"] for h in report.history] == [4, 5, 6]
    assert report.history[1]["cycle"]["insert"] == "highest"
    assert report.places[0] == 0 and report.places[-1] == 1 and sorted(report.places) == report.places


def plain_band(path, cycle, weight_decay, places):
    """The whole algorithm for one cycle on the valley, pivot by pivot, with autograd and SGD written out."""
    momenta = [torch.zeros(2, dtype=F64) for _ in path]
    for _ in range(cycle.steps):
        losses, grads = [], []
        for pivot in path:
            w = pivot.clone().requires_grad_()
            valley = (w[0] ** 2 - 1) ** 2 + 5 * (w[1] - 1.5 * (1 - w[0] ** 2)) ** 2
            losses.append(valley.detach())
            grads.append(torch.autograd.grad(valley, w)[0])
        inner = torch.stack(grads[1:-1]) + weight_decay * torch.stack(path[1:-1])
        band.nudge_(inner, torch.stack(path), torch.stack(losses), places, cycle.spring)  # tested by itself
        for i, g in enumerate(inner, 1):
            momenta[i] = cycle.momentum * momenta[i] + g
            path[i] = path[i] - cycle.lr * momenta[i]
        if cycle.spring == math.inf:
            stacked = torch.stack(path)
            band.redistribute(stacked, places)
            path = list(stacked)
    return path


@pytest.mark.parametrize("spring", [math.inf, 2.0])
def test_a_cycle_equals_the_algorithm_written_out(spring):
    cycle = Cycle(steps=6, lr=0.01, momentum=0.8, count=3, spring=spring)
    curve, _ = run(*minima(), cycles=[cycle], weight_decay=0.1)
    places = torch.linspace(0, 1, 5, dtype=F64)
    path = [torch.stack([2 * place - 1, torch.zeros((), dtype=F64)]) for place in places]
    expected = plain_band(path, cycle, 0.1, places)
    found = [torch.stack([bend.x, bend.y]).detach() for bend in curve.bends]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_inserted_pivots_stay_where_they_came_in():
    """With equal spacing they are spread over the band, which has a quarter of it in each segment."""
    cycles = [{"steps": 2, "lr": 1e-3, "count": 2, "subsample": 3}, {"insert": "highest", "count": 1}]
    lengths = {}
    for spacing in ("equal", "inserted"):
        _, report = run(*minima(), cycles=[cycles[0], {**cycles[1], "spacing": spacing}])
        lengths[spacing] = [length / report.length for length in report.lengths]
    assert lengths["equal"] == pytest.approx([0.25] * 4, abs=0.01)
    assert lengths["inserted"] == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3], abs=0.01)


def test_runs_are_equal_and_a_resumed_one_is_too():
    whole_curve, whole = run(*minima())
    again_curve, again = run(*minima())
    kept = []
    first, report = run(*minima(), cycles=SHORT[:1], after_cycle=kept.append)
    assert len(kept) == 1 and kept[0].report == report and kept[0].report is not report
    resumed_curve, resumed = run(*minima(), resume=first)
    done_curve, done = run(*minima(), resume=whole_curve)
    for curve, report in ((again_curve, again), (resumed_curve, resumed), (done_curve, done)):
        assert report == whole
        for ours, theirs in zip(curve.parameters(), whole_curve.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_resume_refuses_other_runs():
    found, _ = run(*minima())
    with pytest.raises(ValueError, match="resume must be of a run with the same first 2 cycles"):
        run(*minima(), cycles=[{**SHORT[0], "lr": 0.5}, SHORT[1]], resume=found)
    with pytest.raises(ValueError, match="resume must be of a path between start and end"):
        run(Valley(-1, 0.1), Valley(1, 0), resume=found)
    with pytest.raises(TypeError, match="resume must be a curve from auto_neb, got one without its report"):
        run(*minima(), resume=lsf.Curve(minima(), kind="polychain"))


def test_steps_read_no_value_on_the_host():
    reads = []
    for steps in (1, 5):
        with CountReads() as count:
            run(*minima(), cycles=[{"steps": steps, "lr": 0.01, "subsample": 0}])
        reads.append(count.reads)
    assert reads[0] == reads[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "auto_neb: model must be a torch.nn.Module, got int"),
        ({"start": 3}, TypeError, "auto_neb: start must be a model, an average of one, or a mapping .*, got int"),
        (
            {"end": nn.Linear(2, 2)},
            ValueError,
            "auto_neb: end must have .* of the model; it lacks x, y",
        ),
        ({"end": {"x": torch.zeros(())}}, ValueError, "auto_neb: end must have .* it lacks y"),
        ({"end": {"x": torch.zeros(()), "y": torch.zeros(2)}}, ValueError, "auto_neb: end: y must have shape"),
        ({"end": {"x": torch.zeros(()), "y": torch.zeros((), dtype=torch.int64)}}, TypeError, "y must be like"),
        (
            {"end": {**Valley(1, 0).state_dict(), "z": torch.zeros(1)}},
            ValueError,
            "end must have .* has z besides",
        ),
        ({"end": Valley(-1, 0)}, ValueError, "auto_neb: start and end must differ, got equal weights"),
        ({"loader": 3}, TypeError, "auto_neb: loader must be a loader of batches, got int"),
        ({"loader": []}, ValueError, "auto_neb: loader must yield at least one batch, every time it is read; got none"),
        (
            {"loader": [LOADER[0][0]]},
            TypeError,
            r"auto_neb: loader must yield \(inputs, targets\) or .* Tensor",
        ),
        ({"loss_fn": 3}, TypeError, "auto_neb: loss_fn must be a function"),
        ({"loss_fn": lambda o, t: o.expand(2)}, ValueError, r"auto_neb: loss_fn must return a scalar, .* got \(2,\)"),
        ({"loss_fn": lambda o, t: o.item()}, ValueError, "auto_neb: loss_fn must return a scalar, .* got float"),
        ({"loss_fn": lambda o, t: o.detach()}, ValueError, "auto_neb: loss_fn must depend on the weights"),
        ({"loss_fn": lambda o, t: o * math.inf}, RuntimeError, "auto_neb: the loss must be finite on the path"),
        ({"weight_decay": -1.0}, ValueError, "auto_neb: weight_decay must be finite, at least 0, got -1.0"),
        ({"weight_decay": "a"}, TypeError, "auto_neb: weight_decay must be a number, got str"),
        ({"cycles": []}, ValueError, "auto_neb: cycles must be at least one"),
    ],
)
def test_bad_input(change, error, message):
    start, end = minima()
    model = change.get("model", Valley(0.3, 0.4))
    arguments = {"start": start, "end": end, "model": model, **change}
    before = bits(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        run(**arguments)
    if before is not None:
        assert_untouched(model, before)


def test_weights_that_no_band_is_for():
    start, end = minima()
    with pytest.raises(ValueError, match="auto_neb: model must have a parameter that requires a gradient, got none"):
        run(start, end, model=Valley(0, 0).requires_grad_(False))
    waves = [nn.Linear(2, 2, dtype=torch.complex64) for _ in range(3)]
    with pytest.raises(NotImplementedError, match="bands of torch.complex64 weights are not written; weight has them"):
        run(*waves[:2], model=waves[2])


def test_reports_in_files(tmp_path):
    _, report = run(*minima())
    report.save(tmp_path / "report.pt")
    assert NEBReport.load(tmp_path / "report.pt") == report
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "report.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="NEBReport.load: .*damaged.pt is damaged"):
        NEBReport.load(tmp_path / "damaged.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="NEBReport.load: .*other.pt holds no NEBReport"):
        NEBReport.load(tmp_path / "other.pt")
    torch.save({"format": "NEBReport 1", "x": 1}, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="NEBReport.load: .*later.pt holds no NEBReport"):
        NEBReport.load(tmp_path / "later.pt")
    figure = report.plot(tmp_path / "report.png")
    assert len(figure.axes) == 2 and (tmp_path / "report.png").stat().st_size > 1000


def test_the_path_is_saved_as_any_curve(tmp_path):
    found, _ = run(*minima())
    torch.save(found.state_dict(), tmp_path / "path.pt")
    loaded = lsf.Curve(minima(), kind="polychain", num_bends=found.num_bends)
    loaded.load_state_dict(torch.load(tmp_path / "path.pt", weights_only=True))
    assert torch.equal(loaded(LOADER[0][0], t=0.3), found(LOADER[0][0], t=0.3))
    assert not any(p.requires_grad for bend in (found.bends[0], found.bends[-1]) for p in bend.parameters())
    assert all(p.requires_grad for p in found.bends[1].parameters())  # it may be trained on as a curve
