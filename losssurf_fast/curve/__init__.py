"""Paths between networks: curves through bends, trained and looked at."""

from losssurf_fast.curve.curve import Curve
from losssurf_fast.curve.mode_connectivity import from_mode_connectivity, to_mode_connectivity

__all__ = ["Curve", "from_mode_connectivity", "to_mode_connectivity"]
