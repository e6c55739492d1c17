"""Paths between networks: curves through bends, trained and looked at."""

from losssurf_fast.curve.curve import Curve

__all__ = ["Curve"]
