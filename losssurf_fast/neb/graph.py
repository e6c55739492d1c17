"""Minima and the paths found between them as a graph; what lies between two minima is its minimum spanning tree.

Source: Draxler et al., "Essentially no barriers in neural network energy landscape", ICML 2018, section 3.3.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.averaging.swap import untouched
from losssurf_fast.curve import Curve
from losssurf_fast.evaluation import Evaluation, Metric
from losssurf_fast.files import load_state, save_state
from losssurf_fast.neb.auto import auto_neb
from losssurf_fast.neb.cycles import CYCLES, Cycle, read_cycles
from losssurf_fast.neb.report import NEBReport
from losssurf_fast.neb.weights import weights_of

_FORMAT = "MinimaGraph 1"
RULES = ("unfinished", "disconnected", "mst", "lowest")


def _networkx():
    try:
        import networkx
    except ImportError:
        raise ImportError("MinimaGraph: needs networkx; pip install networkx") from None
    return networkx


def _on_cpu(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies."""
    return {name: t.detach().to("cpu", copy=True) for name, t in weights.items()}


@dataclass
class _Path:
    """The inner pivots between two minima, by the model's names, and their report, from the edge's smaller number."""

    pivots: list[dict[str, torch.Tensor]]
    report: NEBReport


class MinimaGraph:
    """Minima of one model's loss, numbered from 0, and the best path found between any two of them.

    Args:
        model: gives the architecture. It is used by :meth:`explore` and bit-equal afterwards.

    Attributes:
        graph: the networkx.Graph: nodes with "loss" and "weights" (by the model's names, on the CPU), edges with
            "saddle", the highest loss on the path, and "path".

    Raises:
        ImportError: networkx is not installed.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise TypeError(f"MinimaGraph: model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.graph = _networkx().Graph()

    def add_minimum(self, source: nn.Module | Mapping[str, torch.Tensor], loss: float) -> int:
        """Add a minimum, a model or a state_dict, with its loss; returns its number."""
        return self._add("MinimaGraph.add_minimum", "source", source, loss)

    def _add(self, caller: str, argument: str, source, loss: float) -> int:
        weights = weights_of(caller, argument, source, self.model)
        if isinstance(loss, bool) or not isinstance(loss, int | float):
            raise TypeError(f"{caller}: loss must be a number, got {type(loss).__name__}")
        number = len(self.graph)
        self.graph.add_node(number, loss=float(loss), weights=_on_cpu(weights))
        return number

    def add_path(self, a: int, b: int, curve: Curve, report: NEBReport) -> bool:
        """Keep a path between two minima if its saddle is lower than that of the one between them, or it goes on it."""
        self._check_pair("add_path", a, b)
        bends = [_on_cpu(dict(bend.named_parameters())) for bend in curve.bends]
        for number, bend in ((a, bends[0]), (b, bends[-1])):
            weights = self.graph.nodes[number]["weights"]
            if not (bend.keys() == weights.keys() and all(torch.equal(bend[n], weights[n]) for n in weights)):
                raise ValueError(f"MinimaGraph.add_path: curve must lead from minimum {a} to {b}; its ends are others")
        old = self.graph.edges.get((a, b))
        further = old is not None and len(report.history) > len(old["path"].report.history)
        if old is not None and not further and old["saddle"] <= report.saddle:
            return False
        path = _Path(bends[1:-1], report) if a < b else _Path(bends[-2:0:-1], report.reversed())
        self.graph.add_edge(a, b, saddle=report.saddle, path=path)
        return True

    # ---- questions ------------------------------------------------------------------------------------------------

    def tree(self):
        """The networkx.Graph of the same minima with the edges of the minimum spanning tree of saddles."""
        return _networkx().minimum_spanning_tree(self.graph, weight="saddle")

    def route(self, a: int, b: int) -> list[int]:
        """The minima on the way from ``a`` to ``b`` whose highest saddle is lowest.

        Raises:
            ValueError: there is none.
        """
        self._check_pair("route", a, b)
        nx = _networkx()
        try:
            return nx.shortest_path(self.tree(), a, b)
        except nx.NetworkXNoPath:
            raise ValueError(f"MinimaGraph.route: no path from minimum {a} to {b} is known") from None

    def saddle(self, a: int, b: int) -> float:
        """The lowest known height at which one gets from ``a`` to ``b``: the highest saddle on their :meth:`route`."""
        route = self.route(a, b)
        return max(self.graph.edges[edge]["saddle"] for edge in pairwise(route))

    def curve(self, a: int, b: int) -> tuple[Curve, NEBReport]:
        """The direct path from ``a`` to ``b``, on the model's device.

        Raises:
            ValueError: there is none.
        """
        self._check_pair("curve", a, b)
        if not self.graph.has_edge(a, b):
            raise ValueError(f"MinimaGraph.curve: no direct path from minimum {a} to {b} is known")
        path = self.graph.edges[a, b]["path"]
        nodes = self.graph.nodes
        pivots, report = (path.pivots, path.report) if a < b else (path.pivots[::-1], path.report.reversed())
        bends = [nodes[a]["weights"], *pivots, nodes[b]["weights"]]
        return Curve(bends, kind="polychain", num_bends=len(bends), model=self.model), report

    def suggest(self, rules: Sequence[str] = RULES[:3], cycles: int | None = None) -> tuple[int, int] | None:
        """The pair of minima to look between next, by the first of ``rules`` that has one; None if none has.

        - "unfinished": a path that went through fewer than ``cycles`` cycles.
        - "disconnected": the lowest minimum, and the lowest of those it has no route to.
        - "mst": the highest edge of the spanning tree that may be replaced: the lowest minima on its two sides that no
          direct path joins.
        - "lowest": the lowest minima that no direct path joins.
        """
        for rule in rules:
            if rule not in RULES:
                raise ValueError(f"MinimaGraph.suggest: rules must be of {RULES}, got {rule!r}")
        for rule in rules:
            pair = getattr(self, f"_{rule}")(cycles)
            if pair is not None:
                return pair
        return None

    def _unfinished(self, cycles: int | None) -> tuple[int, int] | None:
        for a, b, path in self.graph.edges(data="path"):
            if cycles is not None and len(path.report.history) < cycles:
                return min(a, b), max(a, b)
        return None

    def _by_loss(self, numbers: Iterable[int]) -> list[int]:
        return sorted(numbers, key=lambda n: (self.graph.nodes[n]["loss"], n))

    def _disconnected(self, cycles) -> tuple[int, int] | None:
        order = self._by_loss(self.graph)
        reached = _networkx().node_connected_component(self.graph, order[0]) if order else ()
        return next(((order[0], n) for n in order if n not in reached), None)

    def _mst(self, cycles) -> tuple[int, int] | None:
        tree = self.tree()
        for a, b, saddle in sorted(tree.edges(data="saddle"), key=lambda edge: -edge[2]):
            tree.remove_edge(a, b)
            sides = [self._by_loss(_networkx().node_connected_component(tree, n)) for n in (a, b)]
            tree.add_edge(a, b, saddle=saddle)
            for first in sides[0]:
                for second in sides[1]:
                    if not self.graph.has_edge(first, second):
                        return first, second
        return None

    def _lowest(self, cycles) -> tuple[int, int] | None:
        order = self._by_loss(self.graph)
        pairs = ((a, b) for i, b in enumerate(order) for a in order[:i] if not self.graph.has_edge(a, b))
        return next(pairs, None)

    def _check_pair(self, caller: str, a: int, b: int) -> None:
        for n in (a, b):
            if n not in self.graph:
                raise ValueError(f"MinimaGraph.{caller}: minima are numbered 0 to {len(self.graph) - 1}, got {n}")
        if a == b:
            raise ValueError(f"MinimaGraph.{caller}: two minima must be given, got {a} twice")

    # ---- exploration ----------------------------------------------------------------------------------------------

    def explore(
        self,
        loader: Iterable,
        *,
        loss_fn: Metric = F.cross_entropy,
        cycles: Sequence[Mapping | Cycle] | str = CYCLES,
        rules: Sequence[str] = RULES[:3],
        max_paths: int | None = None,
        save: str | os.PathLike | None = None,
        weight_decay: float = 0.0,
        eval_loader: Iterable | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> int:
        """Run :func:`auto_neb` between suggested minima until nothing is left to suggest; returns the number of runs.

        Args:
            loader, loss_fn, cycles, weight_decay, eval_loader, device, progress: of :func:`auto_neb`.
            rules: of :meth:`suggest`.
            max_paths: stop after so many runs.
            save: write the graph there after every cycle: a killed exploration goes on, from its last cycle, when the
                loaded graph is explored.
        """
        plan = read_cycles("MinimaGraph.explore", cycles)
        runs = 0
        while max_paths is None or runs < max_paths:
            pair = self.suggest(rules, len(plan))
            if pair is None:
                break
            a, b = pair

            def keep(curve, report, a=a, b=b):
                self.add_path(a, b, curve, report)
                if save is not None:
                    self.save(save)

            nodes = self.graph.nodes
            auto_neb(
                self.model,
                nodes[a]["weights"],
                nodes[b]["weights"],
                loader,
                loss_fn=loss_fn,
                cycles=plan,
                weight_decay=weight_decay,
                eval_loader=eval_loader,
                device=device,
                resume=self.curve(a, b) if self.graph.has_edge(a, b) else None,
                after_cycle=keep,
                progress=progress,
            )
            runs += 1
        return runs

    def measure(
        self, source: nn.Module | Mapping[str, torch.Tensor], loader: Iterable, loss_fn: Metric = F.cross_entropy
    ) -> float:
        """The loss of a minimum as :func:`auto_neb` measures it, for :meth:`add_minimum`."""
        weights = weights_of("MinimaGraph.measure", "source", source, self.model)
        with untouched(self.model) as write:
            write(weights)
            return Evaluation("MinimaGraph.measure", loader, loss_fn, bn_loader=loader)(self.model)["loss"]

    # ---- files and pictures ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the minima and paths to a file, atomically."""
        nodes = [dict(self.graph.nodes[n]) for n in range(len(self.graph))]
        edges = [
            {"ends": [min(a, b), max(a, b)], "pivots": path.pivots, "report": asdict(path.report)}
            for a, b, path in self.graph.edges(data="path")
        ]
        save_state({"format": _FORMAT, "nodes": nodes, "edges": edges}, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> "MinimaGraph":
        """A graph of ``model`` from a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        state = load_state("MinimaGraph.load", path)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"MinimaGraph.load: {path} holds no MinimaGraph")
        result = cls(model)
        try:
            for node in state["nodes"]:
                result._add("MinimaGraph.load", str(path), node["weights"], node["loss"])
            for edge in state["edges"]:
                report = NEBReport(**edge["report"])
                for pivot in edge["pivots"]:
                    weights_of("MinimaGraph.load", str(path), pivot, model)
                result.graph.add_edge(*edge["ends"], saddle=report.saddle, path=_Path(edge["pivots"], report))
        except KeyError as error:
            raise ValueError(f"MinimaGraph.load: {path} holds no MinimaGraph: it lacks {error}") from None
        return result

    def plot(self, path: str | os.PathLike | None = None):
        """The disconnectivity graph: each minimum hangs at its loss, and branches meet at the saddle that joins them.

        Returns the figure, saved to ``path`` if that is given.
        """
        from losssurf_fast.neb.plots import disconnectivity

        return disconnectivity(self, path)
