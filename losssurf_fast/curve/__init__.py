"""Paths between networks: curves through bends, trained and looked at."""

from losssurf_fast.curve.curve import Curve
from losssurf_fast.curve.evaluate import evaluate_curve
from losssurf_fast.curve.mode_connectivity import from_mode_connectivity, to_mode_connectivity
from losssurf_fast.curve.report import CurveReport

__all__ = ["Curve", "CurveReport", "evaluate_curve", "from_mode_connectivity", "to_mode_connectivity"]
