"""Plain models to stochastic ones and back, in place, and checkpoints of the peer that has such layers."""

from losssurf_fast.conversion.plain import from_lrt
from losssurf_fast.conversion.report import ConversionReport, conversion_report
from losssurf_fast.conversion.stochastic import to_lrt
from losssurf_fast.conversion.variance_networks import load_variance_networks

__all__ = ["ConversionReport", "conversion_report", "from_lrt", "load_variance_networks", "to_lrt"]
