"""AutoNEB's curve with its report, how it is measured, what it refuses before it trains, and ranks that fail."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from neb_models import LOADER, Valley, assert_untouched, bits, energy, minima
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast.neb import NEBReport

SHORT = [{"steps": 3, "lr": 0.01, "count": 2, "subsample": 2}, {"insert": "highest", "count": 1}]


def run(cycles=SHORT, loader=LOADER, **options):
    ends = minima()
    options = {"model": Valley(0.3, 0.4), "start": ends[0], "end": ends[1], "loss_fn": energy, **options}
    return lsf.auto_neb(loader=loader, cycles=cycles, progress=False, **options)


# ---- the curve and its report ---------------------------------------------------------------------------------------


def test_the_curve_carries_its_report():
    curve = run()
    assert isinstance(curve, lsf.Curve) and curve.kind == "polychain" and isinstance(curve.report, NEBReport)
    assert len(curve.report.history) == 2 and len(curve.report.places) == curve.num_bends
    assert curve.state_dict().keys() == lsf.Curve(minima(), kind="polychain", num_bends=5).state_dict().keys()
    file = io.BytesIO()
    torch.save(curve, file)
    file.seek(0)
    copies = [copy.deepcopy(curve), pickle.loads(pickle.dumps(curve)), torch.load(file, weights_only=False)]
    for other in copies:
        assert other.report == curve.report and other.report is not curve.report
        assert torch.equal(other(LOADER[0][0], t=0.3), curve(LOADER[0][0], t=0.3))
        assert run(resume=other).report == curve.report


def test_curves_after_cycles_keep_their_own_reports():
    kept = []
    curve = run(after_cycle=kept.append)
    assert [len(each.report.history) for each in kept] == [1, 2]
    assert [each.num_bends for each in kept] == [4, 5]
    assert run(resume=kept[0]).report == curve.report and len(kept[0].report.history) == 1


def test_resume_refuses_what_is_no_curve_of_a_run():
    curve = run()
    with pytest.raises(TypeError, match="auto_neb: resume must be a curve from auto_neb, got tuple"):
        run(resume=(curve, curve.report))
    plain = lsf.Curve(minima(), kind="polychain")
    with pytest.raises(TypeError, match="auto_neb: resume must be a curve from auto_neb, got one without its report"):
        run(resume=plain)
    plain.report = curve.report
    with pytest.raises(ValueError, match="auto_neb: resume has 3 pivots, and a report of 5"):
        run(resume=plain)


def test_an_empty_report():
    report = NEBReport()
    for question in (lambda: report.saddle, lambda: report.saddle_t, lambda: report.pivot_losses, report.plot):
        with pytest.raises(RuntimeError, match="NEBReport: no losses are known before the first cycle"):
            question()


@pytest.mark.parametrize(
    "change",
    [
        {"points": {"t": [0.0, 1.0]}},
        {"points": {"t": [0.0, 1.0], "loss": [0.0]}},
        {"points": {"t": [0.0], "loss": ["high"]}},
        {"points": {}},
        {"points": [1.0]},
        {"subsample": -1},
        {"lengths": 3.0},
        {"places": ["here"]},
        {"history": [{}]},
        {"history": None},
        {"format": "NEBReport 0"},
        {"more": 1},
    ],
)
def test_files_of_other_things_hold_no_report(change, tmp_path):
    state = run().report.state()
    torch.save(state, tmp_path / "report.pt")
    assert NEBReport.load(tmp_path / "report.pt").state() == state
    torch.save(state | change, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="NEBReport.load: .*other.pt holds no NEBReport"):
        NEBReport.load(tmp_path / "other.pt")


# ---- how a band is measured -----------------------------------------------------------------------------------------


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def classes(seed, batches=4):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(16, 3, generator=generator) + 1, torch.arange(16) % 2) for _ in range(batches)]


CLASSES = {"loader": classes(0), "loss_fn": F.cross_entropy, "cycles": SHORT[:1]}


@pytest.mark.parametrize(
    "how",
    [{}, {"bn_loader": classes(1)}, {"subset": 1}, {"bn_loader": classes(1), "subset": 0.5}, {"recalibrate": False}],
)
def test_statistics_of_every_measured_point(how):
    """As evaluate_curve takes them, of the same data."""
    model = network(2)
    model[1].running_mean += 0.3  # none that training or a recalibration would leave
    before = bits(model)
    curve = run(model=model, start=network(0), end=network(1), eval_loader=classes(7), **CLASSES, **how)
    assert_untouched(model, before)
    again = lsf.evaluate_curve(
        curve, {"train": CLASSES["loader"], "eval": classes(7)}, num_points=len(curve.report.points["t"]), **how
    )
    assert curve.report.points["loss"] == pytest.approx(again["eval"]["loss"].values, rel=1e-4)
    assert curve.report.points["error"] == pytest.approx(again["eval"]["error"].values)


def test_explore_and_measure_take_the_same_data():
    how = {"eval_loader": classes(7), "bn_loader": classes(1), "subset": 2, "device": "cpu", "process_group": False}
    model = network(2)
    graph, before = lsf.MinimaGraph(model), bits(model)
    for seed in (0, 1):
        graph.add_minimum(network(seed), graph.measure(network(seed), CLASSES["loader"], **how))
    metric = {"first": lambda outputs, targets: outputs[0, 0]}
    assert graph.explore(CLASSES["loader"], cycles=SHORT[:1], metrics=metric, progress=False, **how) == 1
    assert_untouched(model, before)
    curve = graph.curve(0, 1)
    wanted = run(model=model, start=network(0), end=network(1), metrics=metric, **CLASSES, **how)
    assert curve.report == wanted.report and "first" in curve.report.points
    losses = curve.report.points["loss"]
    assert [losses[0], losses[-1]] == pytest.approx([graph.graph.nodes[n]["loss"] for n in (0, 1)], rel=1e-6)
    kept = graph.measure(network(0), CLASSES["loader"], recalibrate=False)
    assert kept != graph.measure(network(0), CLASSES["loader"])


# ---- refused before training ----------------------------------------------------------------------------------------


def never(outputs, targets):
    raise AssertionError("no batch is to be read")


def damaged(value):
    valley = Valley(1, 0)
    with torch.no_grad():
        valley.x.fill_(value)
    return valley


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"end": damaged(math.nan)}, ValueError, "auto_neb: end: .* must be finite, got NaN or inf in x"),
        ({"start": damaged(math.inf).state_dict()}, ValueError, "auto_neb: start: .* must be finite, got NaN or inf"),
        ({"loader": {"train": LOADER}}, TypeError, "auto_neb: loader must be one loader, got a dict of them"),
        ({"eval_loader": {"test": LOADER}}, TypeError, "auto_neb: eval_loader must be one loader, got a dict of them"),
        ({"bn_loader": {"train": LOADER}}, TypeError, "auto_neb: bn_loader must be one loader, got a dict of them"),
        ({"eval_loader": iter(LOADER)}, ValueError, "auto_neb: eval_loader is read once for every cycle"),
        ({"bn_loader": 3}, TypeError, "auto_neb: bn_loader must be a loader of batches, got int"),
        ({"bn_loader": LOADER, "recalibrate": False}, ValueError, "auto_neb: bn_loader and recalibrate=False exclude"),
        ({"metrics": {"t": never}}, ValueError, "auto_neb: a metric must not be named 't', which is the place on"),
        (
            {"cycles": [{"subsample": 0}, {"insert": "highest"}]},
            ValueError,
            r"auto_neb: cycles\[0\] must have a subsample of at least 1, as cycles\[1\] inserts where .*; got 0",
        ),
    ],
)
def test_refused_before_training(change, error, message):
    with pytest.raises(error, match=message):
        run(**{"loss_fn": never, **change})


# ---- ranks ----------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


class FailsOnRank1:
    """A loader that breaks at the third batch there."""

    def __init__(self, rank):
        self.rank, self.read = rank, 0

    def __iter__(self):
        for batch in LOADER:
            self.read += 1
            if self.rank == 1 and self.read == 3:
                raise Broken
            yield batch


def fail_on_rank_1(rank):
    if rank == 1:
        raise Broken


def failing_ranks(rank):
    wanted = Broken if rank == 1 else RuntimeError
    message = None if rank == 1 else "auto_neb: 1 other ranks failed"
    for options in (
        {"loader": FailsOnRank1(rank)},  # in a step
        {"eval_loader": FailsOnRank1(rank)},  # while the band is measured
        {"after_cycle": lambda curve: fail_on_rank_1(rank)},
    ):
        with pytest.raises(wanted, match=message):
            run(**options)
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="auto_neb: "):  # up front
        run(loader=iter(LOADER) if rank == 1 else LOADER)
    dist.barrier()


def test_one_rank_that_fails_ends_all():
    run_ranks(failing_ranks, timeout=60)


def times(factor):
    return [(factor * x, y) for x, y in LOADER]


def groups_and_bars(rank, path):
    loader = times(1 + rank)
    alone = run(loader=loader, process_group=False)
    together = [run(loader=loader, process_group=group) for group in (None, dist.new_group([0, 1]))]
    graph = lsf.MinimaGraph(Valley(0.3, 0.4))
    for minimum in minima():
        graph.add_minimum(minimum, graph.measure(minimum, LOADER, energy))
    own = path / str(rank)
    own.mkdir()
    graph.explore(LOADER, loss_fn=energy, cycles=SHORT, progress=False, save=own / "graph.pt")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        real = lsf.neb.auto.tqdm
        patch.setattr(
            lsf.neb.auto, "tqdm", lambda *args, **options: shown.append(not options["disable"]) or real(**options)
        )
        lsf.auto_neb(Valley(0, 0), *minima(), LOADER, loss_fn=energy, cycles=SHORT)
        lsf.auto_neb(Valley(0, 0), *minima(), LOADER, loss_fn=energy, cycles=SHORT, process_group=False)
    found = {"alone": alone.report.saddle, "together": [c.report.saddle for c in together], "shown": shown}
    torch.save(found | {"saved": (own / "graph.pt").exists()}, path / f"{rank}.pt")


def test_groups_and_bars(tmp_path):
    run_ranks(groups_and_bars, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    saddles = [run(loader=times(factor)).report.saddle for factor in (1, 2, 1.5)]
    assert len(set(saddles)) == 3 and [first["alone"], second["alone"]] == saddles[:2]
    assert first["together"] == second["together"] == pytest.approx([saddles[2]] * 2)
    assert first["shown"] == [True, True] and second["shown"] == [False, True]
    assert first["saved"] and not second["saved"]
