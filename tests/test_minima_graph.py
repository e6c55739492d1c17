"""The graph of minima: saddles against all routes, suggestions, exploration that goes on after a kill, files."""

import copy
import itertools
import sys

import pytest
import torch
from neb_models import LOADER, Valley, assert_untouched, bits, energy

import losssurf_fast as lsf
from losssurf_fast.neb import NEBReport

CYCLES = [{"steps": 60, "lr": 0.005, "count": 3, "subsample": 3}, {"insert": "highest", "count": 2}]


def graph_of(saddles, losses):
    """A graph with given saddles between minima of given losses, whose paths are straight lines."""
    graph = lsf.MinimaGraph(Valley(0, 0))
    for i, loss in enumerate(losses):
        assert graph.add_minimum(Valley(i, -i), loss) == i
    for (a, b), saddle in saddles.items():
        add(graph, a, b, saddle)
    return graph


def add(graph, a, b, saddle, cycles=1):
    curve = lsf.Curve([Valley(a, -a), Valley(b, -b)], kind="polychain", num_bends=4)
    curve.report = NEBReport(
        {"t": [0.0, 0.5, 1.0], "loss": [0.0, saddle, 0.0]}, 1, [1.0], [0.0, 1.0], [{"cycle": {}}] * cycles
    )
    return graph.add_path(a, b, curve)


SADDLES = {(0, 1): 5.0, (1, 2): 2.0, (0, 2): 3.0, (2, 3): 4.0, (1, 3): 4.5, (4, 5): 1.0}


def lowest_saddle(a, b):
    """Over all routes."""
    found = [float("inf")]
    for k in range(5):
        for middle in itertools.permutations([n for n in range(6) if n not in (a, b)], k):
            edges = [tuple(sorted(e)) for e in itertools.pairwise((a, *middle, b))]
            if all(e in SADDLES for e in edges):
                found.append(max(SADDLES[e] for e in edges))
    return min(found)


def test_saddles_are_the_lowest_of_all_routes():
    graph = graph_of(SADDLES, range(6))
    for a, b in itertools.permutations(range(6), 2):
        expected = lowest_saddle(a, b)
        if expected < float("inf"):
            route = graph.route(a, b)
            assert graph.saddle(a, b) == expected and (route[0], route[-1]) == (a, b)
        else:
            with pytest.raises(ValueError, match=f"MinimaGraph.route: no path from minimum {a} to {b} is known"):
                graph.saddle(a, b)
    assert graph.route(0, 1) == [0, 2, 1]
    assert sorted(tuple(sorted(e)) for e in graph.tree().edges) == [(0, 2), (1, 2), (2, 3), (4, 5)]


def test_suggestions():
    graph = graph_of(SADDLES, [3.0, 1.0, 2.0, 0.5, 9.0, 8.0])
    assert graph.suggest(["unfinished"], cycles=1) is None
    assert graph.suggest(["unfinished"], cycles=2) == (0, 1)
    assert graph.suggest(["unfinished"]) is None
    assert graph.suggest(["disconnected"]) == (3, 5)  # the lowest of all and the lowest that it does not reach
    assert graph.suggest(["lowest"]) == (3, 0)
    assert graph.suggest(["unfinished", "disconnected"], cycles=1) == (3, 5)
    add(graph, 3, 5, 7.0)
    assert graph.suggest(["disconnected"]) is None
    # the highest edge of the tree, (3, 5), may be replaced by a path from the next lowest minima of its sides
    assert graph.suggest(["mst"]) == (3, 4)
    for pair in itertools.combinations(range(6), 2):
        add(graph, *pair, 10.0)
    assert graph.suggest(["disconnected", "mst", "lowest"]) is None
    assert lsf.MinimaGraph(Valley(0, 0)).suggest() is None
    with pytest.raises(ValueError, match="MinimaGraph.suggest: rules must be of .*, got 'best'"):
        graph.suggest(["mst", "best"])


def test_only_lower_or_further_paths_are_kept():
    graph = graph_of({(0, 1): 5.0}, [0.0, 0.0])
    assert not add(graph, 0, 1, 6.0) and graph.saddle(0, 1) == 5.0
    assert add(graph, 1, 0, 4.0) and graph.saddle(0, 1) == 4.0
    assert add(graph, 0, 1, 4.5, cycles=2) and graph.saddle(0, 1) == 4.5


def test_a_path_leads_both_ways():
    graph = graph_of({(1, 0): 5.0}, [0.0, 0.0])
    for a, b in ((0, 1), (1, 0)):
        curve = graph.curve(a, b)
        found = [bend.x.item() for bend in curve.bends]
        assert found == pytest.approx([a, a + (b - a) / 3, a + 2 * (b - a) / 3, b]) and curve.report.saddle == 5.0
        assert curve.kind == "polychain"


def test_a_path_and_its_report_turn_together():
    """A run from the higher number to the lower one goes on in the graph's order."""
    graph = valley_graph()
    cycles = [{**CYCLES[0], "steps": 3, "spacing": "inserted"}, {"insert": "highest", "count": 1}]
    options = {"loss_fn": energy, "cycles": cycles, "progress": False}
    weights = [graph.graph.nodes[n]["weights"] for n in (1, 2)]
    graph.add_path(2, 1, lsf.auto_neb(graph.model, *weights[::-1], LOADER, **options))
    for a, b in ((1, 2), (2, 1)):
        curve = graph.curve(a, b)
        report = curve.report
        found = lsf.evaluate_curve(curve, LOADER, loss_fn=energy, num_points=len(report.points["t"]))
        assert report.points["loss"] == pytest.approx(found["data"]["loss"].values)
        assert report.points["t"] == pytest.approx(found.ts)
        gaps = [found.dl[1 + 4 * i : 5 + 4 * i].sum() for i in range(len(report.lengths))]
        assert report.lengths == pytest.approx(gaps)
        ends = [0, *itertools.accumulate(gaps)]  # of the band as it is, while its pivots were put on the one before
        assert [place * report.length for place in report.places] == pytest.approx(ends, abs=0.01)


def valley_graph():
    graph = lsf.MinimaGraph(Valley(0.3, 0.4))
    for place in ((-1, 0), (1, 0), (-1.01, 0)):
        minimum = Valley(*place)
        graph.add_minimum(minimum, graph.measure(minimum, LOADER, energy))
    return graph


def explore(graph, **options):
    return graph.explore(LOADER, loss_fn=energy, cycles=CYCLES, progress=False, **options)


def test_exploration_finds_the_saddles():
    graph = valley_graph()
    before = bits(graph.model)
    assert explore(graph, max_paths=1) == 1
    assert explore(graph) == 2
    assert_untouched(graph.model, before)
    assert Valley.saddle - 1e-6 < graph.saddle(0, 1) < 1.02
    assert graph.saddle(0, 2) < 0.01
    assert graph.graph.number_of_edges() == 3
    assert explore(graph) == 0


def test_a_killed_exploration_goes_on_where_it_was(tmp_path):
    class Killed(BaseException):
        pass

    saved, graph = [], valley_graph()

    class Watched(lsf.MinimaGraph):
        def save(self, path):
            saved.append(path)
            super().save(path)

    def loss_fn(outputs, targets):
        if outputs.requires_grad and saved:  # in the second cycle's steps
            raise Killed
        return outputs

    graph.__class__ = Watched
    with pytest.raises(Killed):
        graph.explore(LOADER, loss_fn=loss_fn, cycles=CYCLES, progress=False, save=tmp_path / "graph.pt")
    loaded = lsf.MinimaGraph.load(tmp_path / "graph.pt", Valley(0, 0))
    ((a, b, path),) = loaded.graph.edges(data="path")
    assert len(path.report.history) == 1
    assert loaded.suggest(cycles=2) == (a, b)
    assert explore(loaded, save=tmp_path / "graph.pt") == 3
    whole = valley_graph()
    explore(whole)
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert whole.saddle(*pair) == loaded.saddle(*pair)


def test_files(tmp_path):
    graph = graph_of(SADDLES, range(6))
    graph.save(tmp_path / "graph.pt")
    loaded = lsf.MinimaGraph.load(tmp_path / "graph.pt", Valley(0, 0))
    assert dict(loaded.graph.nodes(data="loss")) == dict(graph.graph.nodes(data="loss"))
    assert {tuple(sorted(e[:2])): e[2] for e in loaded.graph.edges(data="saddle")} == SADDLES
    for a, b in SADDLES:
        ours, theirs = loaded.curve(a, b), graph.curve(a, b)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "graph.pt").read_bytes()[:300])
    with pytest.raises(ValueError, match="MinimaGraph.load: .*damaged.pt is damaged"):
        lsf.MinimaGraph.load(tmp_path / "damaged.pt", Valley(0, 0))
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="MinimaGraph.load: .*other.pt holds no MinimaGraph"):
        lsf.MinimaGraph.load(tmp_path / "other.pt", Valley(0, 0))
    torch.save({"format": "MinimaGraph 1", "nodes": [{"loss": 1.0}]}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="MinimaGraph.load: .*part.pt holds no MinimaGraph: it lacks 'weights'"):
        lsf.MinimaGraph.load(tmp_path / "part.pt", Valley(0, 0))
    with pytest.raises(FileNotFoundError):
        lsf.MinimaGraph.load(tmp_path / "none.pt", Valley(0, 0))
    with pytest.raises(
        ValueError, match="MinimaGraph.load: .*graph.pt must have .*; it lacks weight, bias and has x, y"
    ):
        lsf.MinimaGraph.load(tmp_path / "graph.pt", torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("nodes",), None, "holds no MinimaGraph: 'NoneType' object is not iterable"),
        (("nodes", 0), "x", "holds no MinimaGraph"),
        (("nodes", 0, "weights"), 3, "must be a .*, got int"),
        (("nodes", 0, "loss"), "low", "holds no MinimaGraph: .* loss must be a number, got str"),
        (("edges",), {"a": 1}, "holds no MinimaGraph"),
        (("edges", 0, "ends"), [0, 99], "minima are numbered 0 to 5, got 99"),
        (("edges", 0, "ends"), [1, 1], "two minima must be given, got 1 twice"),
        (("edges", 0, "ends"), [0, 1, 2], r"holds no MinimaGraph: edge 0 must have two ends, got \[0, 1, 2\]"),
        (("edges", 0, "ends"), 3, "holds no MinimaGraph"),
        (("edges", 0, "pivots"), [3], "must be a .*, got int"),
        (("edges", 0, "pivots"), 3, "holds no MinimaGraph"),
        (("edges", 0, "report"), None, "graph.pt, edge 0, holds no NEBReport"),
        (("edges", 0, "report", "points"), {"t": [0.0]}, "graph.pt, edge 0, holds no NEBReport"),
    ],
)
def test_a_file_with_wrong_parts(where, value, message, tmp_path):
    graph_of(SADDLES, range(6)).save(tmp_path / "graph.pt")
    part = state = torch.load(tmp_path / "graph.pt", weights_only=True)
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    torch.save(state, tmp_path / "graph.pt")
    with pytest.raises(ValueError, match=f"MinimaGraph.load: .*{message}"):
        lsf.MinimaGraph.load(tmp_path / "graph.pt", Valley(0, 0))


def test_the_graph_keeps_copies():
    minimum = Valley(0, 0)
    graph = lsf.MinimaGraph(minimum)
    graph.add_minimum(minimum, 1.0)
    with torch.no_grad():
        minimum.x.fill_(7.0)
    assert graph.graph.nodes[0]["weights"]["x"] == 0
    curve = lsf.Curve([Valley(0, 0), Valley(1, -1)], kind="polychain", num_bends=3)
    graph.add_minimum(Valley(1, -1), 1.0)
    curve.report = NEBReport({"t": [0.0], "loss": [2.0]})
    graph.add_path(0, 1, curve)
    with torch.no_grad():
        curve.bends[1].x.fill_(7.0)
    curve.report.points["loss"][0] = 7.0
    assert graph.curve(0, 1).bends[1].x == 0.5 and graph.curve(0, 1).report.saddle == 2.0


def test_the_picture(tmp_path):
    figure = graph_of(SADDLES, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).plot(tmp_path / "graph.png")
    (axes,) = figure.axes
    assert (tmp_path / "graph.png").stat().st_size > 1000
    assert sorted(int(label.get_text()) for label in axes.get_xticklabels()) == list(range(6))
    level = [tuple(line.get_ydata()) for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert sorted(y for y, _ in level) == [1.0, 2.0, 3.0, 4.0]  # the saddles of the tree
    (axes,) = lsf.MinimaGraph(Valley(0, 0)).plot(tmp_path / "empty.png").axes
    assert [text.get_text() for text in axes.texts] == ["no finite values"]


def test_bad_input():
    graph = graph_of({(0, 1): 1.0}, [0.0, 0.0, 0.0])
    with pytest.raises(TypeError, match="MinimaGraph: model must be a torch.nn.Module, got int"):
        lsf.MinimaGraph(3)
    with pytest.raises(TypeError, match="MinimaGraph.add_minimum: source must be a model, an average .*, got int"):
        graph.add_minimum(3, 1.0)
    with pytest.raises(TypeError, match="MinimaGraph.add_minimum: loss must be a number, got str"):
        graph.add_minimum(Valley(0, 0), "low")
    with pytest.raises(ValueError, match="MinimaGraph.add_path: curve must lead from minimum 0 to 2; its ends are oth"):
        graph.add_path(0, 2, graph.curve(0, 1))
    with pytest.raises(TypeError, match="MinimaGraph.add_path: curve must be a curve from auto_neb, got one without"):
        graph.add_path(0, 1, lsf.Curve([Valley(0, 0), Valley(1, -1)], kind="polychain"))
    with pytest.raises(TypeError, match="MinimaGraph.measure: loader must be one loader, got a dict of them"):
        graph.measure(Valley(0, 0), {"train": LOADER})
    with pytest.raises(ValueError, match="MinimaGraph.curve: no direct path from minimum 0 to 2 is known"):
        graph.curve(0, 2)
    for question in (graph.saddle, graph.route, graph.curve):
        with pytest.raises(ValueError, match="minima are numbered 0 to 2, got 3"):
            question(0, 3)
        with pytest.raises(ValueError, match="two minima must be given, got 1 twice"):
            question(1, 1)
    with pytest.raises(ValueError, match="MinimaGraph.explore: cycles must be at least one"):
        graph.explore(LOADER, cycles=[])


def test_without_networkx(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="MinimaGraph: needs networkx; pip install networkx"):
        lsf.MinimaGraph(Valley(0, 0))
    assert copy.copy(lsf.auto_neb) is lsf.auto_neb  # which does not need it


def test_a_longer_history_of_another_path_does_not_replace_a_lower_one():
    graph = lsf.MinimaGraph(Valley(0, 0))
    for end in (Valley(0, 0), Valley(1, -1)):
        graph.add_minimum(end, 0.0)
    with pytest.raises(ValueError, match="loss must be finite"):
        graph.add_minimum(Valley(2, 2), float("nan"))
    curve = lsf.Curve([Valley(0, 0), Valley(1, -1)], kind="polychain")
    low = NEBReport(points={"t": [0.0, 0.5, 1.0], "loss": [0.0, 1.0, 0.0]}, history=[{"cycle": 1}])
    other = NEBReport(points={"t": [0.0, 0.5, 1.0], "loss": [0.0, 2.0, 0.0]}, history=[{"cycle": 2}, {"cycle": 3}])
    kept = []
    for report in (low, other):
        curve.report = report
        kept.append(graph.add_path(0, 1, curve))
    assert kept == [True, False] and graph.saddle(0, 1) == 1.0
