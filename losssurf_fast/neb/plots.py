"""Pictures of a run of AutoNEB and of a graph of minima."""

import os

from losssurf_fast.figures import finish, new_figure, note_without_values

_BLUE, _RED, _GREY = "#08519c", "#cb181d", "#888888"


def along_and_cycles(report, path: str | os.PathLike | None):
    """The loss along the path with its pivots, and the saddle after each cycle."""
    pivots, step = report.pivot_losses, report.subsample + 1
    figure = new_figure(8, 3.4)
    along, cycles = figure.subplots(1, 2, width_ratios=(1.6, 1))
    along.plot(report.points["t"], report.points["loss"], color=_BLUE, lw=1.8)
    along.plot(report.points["t"][::step], pivots, "o", color=_RED, ms=4, label="pivots")
    along.set_xlabel("t")
    along.set_ylabel("loss")
    along.legend(frameon=False)
    saddles = [entry["saddle"] for entry in report.history]
    cycles.plot(range(1, len(saddles) + 1), saddles, "o-", color=_BLUE, ms=4)
    cycles.set_xlabel("cycle")
    cycles.set_ylabel("highest loss on the path")
    cycles.set_xticks(range(1, len(saddles) + 1, max(1, len(saddles) // 8)))
    return finish(figure, path)


def disconnectivity(graph, path: str | os.PathLike | None):
    """Minima hang at their losses; branches meet at the saddles of the minimum spanning tree."""
    edges = sorted(graph.tree().edges(data="saddle"), key=lambda edge: edge[2])
    losses = {n: graph.graph.nodes[n]["loss"] for n in graph.graph}
    members = {n: [n] for n in losses}  # of the branch that a minimum is on, in the order of the picture
    for a, b, _ in edges:
        joined = members[a] + members[b]
        members.update(dict.fromkeys(joined, joined))
    order = [n for branch in {id(m): m for m in members.values()}.values() for n in branch]
    at = {n: float(i) for i, n in enumerate(order)}

    figure = new_figure(max(4.0, 0.5 * len(order) + 2), 4)
    axes = figure.add_subplot()
    tops = dict(losses)  # how far up a minimum's branch has been drawn
    branch = {n: [n] for n in losses}
    for a, b, saddle in edges:
        for n in (a, b):
            axes.plot([at[n], at[n]], [tops[n], saddle], color=_BLUE, lw=1.6)
        axes.plot([at[a], at[b]], [saddle, saddle], color=_BLUE, lw=1.6)
        joined, middle = branch[a] + branch[b], (at[a] + at[b]) / 2
        for n in joined:
            branch[n], at[n], tops[n] = joined, middle, saddle
    axes.plot(range(len(order)), [losses[n] for n in order], "o", color=_RED, ms=5)
    note_without_values(axes, list(losses.values()))
    axes.set_xticks(range(len(order)), order)
    axes.set_xlabel("minimum")
    axes.set_ylabel("loss")
    return finish(figure, path)
