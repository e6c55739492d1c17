"""How good and how sure a model's predictions are, measured without keeping them."""

from losssurf_fast.uncertainty.evaluate import evaluate_uncertainty
from losssurf_fast.uncertainty.metrics import UncertaintyMetrics
from losssurf_fast.uncertainty.report import UncertaintyReport

__all__ = ["UncertaintyMetrics", "UncertaintyReport", "evaluate_uncertainty"]
