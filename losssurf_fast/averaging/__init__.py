"""Averages of weights: running averages and SWAG over whole and sharded models, schedules, BatchNorm recalibration."""

from losssurf_fast.averaging.batch_norm import update_bn
from losssurf_fast.averaging.fge import FGE
from losssurf_fast.averaging.model import AveragedModel
from losssurf_fast.averaging.schedules import FGETriangleLR, SWAConstantLR, SWACyclicLR
from losssurf_fast.averaging.swag import SWAG
from losssurf_fast.averaging.swap import averaged_weights

__all__ = [
    "FGE",
    "SWAG",
    "AveragedModel",
    "FGETriangleLR",
    "SWAConstantLR",
    "SWACyclicLR",
    "averaged_weights",
    "update_bn",
]
