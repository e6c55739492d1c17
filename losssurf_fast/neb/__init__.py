"""Paths of low loss between minima by an elastic band, and the graph that many of them make."""

from losssurf_fast.neb.auto import auto_neb
from losssurf_fast.neb.cycles import CYCLES, Cycle
from losssurf_fast.neb.graph import MinimaGraph
from losssurf_fast.neb.report import NEBReport

__all__ = ["CYCLES", "Cycle", "MinimaGraph", "NEBReport", "auto_neb"]
