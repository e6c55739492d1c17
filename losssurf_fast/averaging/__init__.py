"""Averages of weights: running averages and SWAG over whole and sharded models, schedules, BatchNorm recalibration."""

from losssurf_fast.averaging.model import AveragedModel
from losssurf_fast.averaging.swap import averaged_weights

__all__ = ["AveragedModel", "averaged_weights"]
