"""Minima and the paths found between them as a graph; what lies between two minima is its minimum spanning tree.

Source: Draxler et al., "Essentially no barriers in neural network energy landscape", ICML 2018, section 3.3.
"""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast.arguments import check_number
from losssurf_fast.averaging.batch_norm import is_first_rank
from losssurf_fast.averaging.swap import untouched
from losssurf_fast.curve import Curve
from losssurf_fast.evaluation import Metric
from losssurf_fast.files import load_state, save_state
from losssurf_fast.neb.auto import auto_neb, measurement
from losssurf_fast.neb.cycles import CYCLES, Cycle, read_cycles
from losssurf_fast.neb.report import NEBReport, report_of
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
        loss = check_number(caller, "loss", loss)
        number = len(self.graph)
        self.graph.add_node(number, loss=loss, weights=_on_cpu(weights))
        return number

    def add_path(self, a: int, b: int, curve: Curve) -> bool:
        """Keep :func:`auto_neb`'s path if its saddle is lower than that of the one kept so far, or if it goes on it.

        Returns:
            Whether it is kept.
        """
        self._check_pair("add_path", a, b)
        report = copy.deepcopy(report_of("MinimaGraph.add_path", "curve", curve))
        bends = [_on_cpu(dict(bend.named_parameters())) for bend in curve.bends]
        for number, bend in ((a, bends[0]), (b, bends[-1])):
            weights = self.graph.nodes[number]["weights"]
            if not (bend.keys() == weights.keys() and all(torch.equal(bend[n], weights[n]) for n in weights)):
                raise ValueError(f"MinimaGraph.add_path: curve must lead from minimum {a} to {b}; its ends are others")
        old = self.graph.edges.get((a, b))
        if old is not None and old["saddle"] <= report.saddle:
            before = old["path"].report.history
            if len(report.history) <= len(before) or report.history[: len(before)] != before:
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

    def curve(self, a: int, b: int) -> Curve:
        """The direct path from ``a`` to ``b`` with its ``report``, on the model's device.

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
        curve = Curve(bends, kind="polychain", num_bends=len(bends), model=self.model)
        curve.report = copy.deepcopy(report)
        return curve

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
        metrics: Mapping[str, Metric] | None = None,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        process_group=None,
        progress: bool = True,
    ) -> int:
        """Run :func:`auto_neb` between suggested minima until nothing is left to suggest; returns the number of runs.

        Args:
            rules: of :meth:`suggest`.
            max_paths: stop after so many runs.
            save: write the graph there after every cycle, on the first rank: a killed exploration goes on, from its
                last cycle, when the loaded graph is explored.
            loader and all others: as for :func:`auto_neb`. Over several ranks each of them has the same graph.
        """
        plan = read_cycles("MinimaGraph.explore", cycles)
        runs = 0
        while max_paths is None or runs < max_paths:
            pair = self.suggest(rules, len(plan))
            if pair is None:
                break
            a, b = pair

            def keep(curve, a=a, b=b):
                self.add_path(a, b, curve)
                if save is not None and is_first_rank(process_group):
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
                metrics=metrics,
                bn_loader=bn_loader,
                recalibrate=recalibrate,
                subset=subset,
                device=device,
                process_group=process_group,
                resume=self.curve(a, b) if self.graph.has_edge(a, b) else None,
                after_cycle=keep,
                progress=progress,
            )
            runs += 1
        return runs

    def measure(
        self,
        source: nn.Module | Mapping[str, torch.Tensor],
        loader: Iterable,
        loss_fn: Metric = F.cross_entropy,
        *,
        eval_loader: Iterable | None = None,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        process_group=None,
    ) -> float:
        """The loss of ``source``, a minimum, as :func:`auto_neb` with these arguments measures it.

        It is what :meth:`add_minimum` wants to know; ``source`` is as there.
        """
        caller = "MinimaGraph.measure"
        measure = measurement(
            caller, self.model, loader, eval_loader, bn_loader, recalibrate,
            loss_fn=loss_fn, subset=subset, device=device, process_group=process_group,
        )  # fmt: skip
        weights = weights_of(caller, "source", source, self.model)
        with untouched(self.model) as write:
            write(weights)
            return measure(self.model)["loss"]

    # ---- files and pictures ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the minima and paths to a file, atomically."""
        nodes = [dict(self.graph.nodes[n]) for n in range(len(self.graph))]
        edges = [
            {"ends": [min(a, b), max(a, b)], "pivots": path.pivots, "report": path.report.state()}
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
        caller = "MinimaGraph.load"
        state = load_state(caller, path)
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"{caller}: {path} holds no MinimaGraph")
        result = cls(model)
        try:
            for node in state["nodes"]:
                result._add(caller, str(path), node["weights"], node["loss"])
            for i, edge in enumerate(state["edges"]):
                if len(edge["ends"]) != 2:
                    raise TypeError(f"edge {i} must have two ends, got {edge['ends']}")
                a, b = sorted(edge["ends"])
                result._check_pair("load", a, b)
                pivots = [weights_of(caller, str(path), pivot, model) for pivot in edge["pivots"]]
                report = NEBReport.from_state(caller, edge["report"], f"{path}, edge {i},")
                result.graph.add_edge(a, b, saddle=report.saddle, path=_Path(pivots, report))
        except KeyError as error:
            raise ValueError(f"{caller}: {path} holds no MinimaGraph: it lacks {error}") from None
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{caller}: {path} holds no MinimaGraph: {error}") from error
        return result

    def plot(self, path: str | os.PathLike | None = None):
        """The disconnectivity graph: each minimum hangs at its loss, and branches meet at the saddle that joins them.

        Returns the figure, saved to ``path`` if that is given.
        """
        from losssurf_fast.neb.plots import disconnectivity

        return disconnectivity(self, path)
