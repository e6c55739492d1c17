"""Fast experiments on the weights of networks: stochastic layers, paths between networks, averages of weights."""

import torch

from losssurf_fast import ops  # defines the operators that _C attaches kernels to
from losssurf_fast._library import kernel_for

try:
    from losssurf_fast import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"losssurf_fast: the compiled module _C could not be loaded ({error}). Build it against this torch "
        f"({torch.__version__}) with `pip install --no-build-isolation -e .` in the source tree; if the package is "
        "installed already, run Python outside the source tree."
    ) from error

from losssurf_fast import nn
from losssurf_fast.averaging import (
    FGE,
    SWAG,
    AveragedModel,
    FGETriangleLR,
    SWAConstantLR,
    SWACyclicLR,
    averaged_weights,
    update_bn,
)
from losssurf_fast.conversion import ConversionReport, conversion_report, from_lrt, load_variance_networks, to_lrt
from losssurf_fast.curve import Curve, CurveReport, evaluate_curve
from losssurf_fast.ensembling import OnlineEnsemble
from losssurf_fast.neb import MinimaGraph, auto_neb
from losssurf_fast.objective import ELBOLoss, kl_divergence
from losssurf_fast.prediction import cached_variances, predict, prediction
from losssurf_fast.sparsity import SparsityReport, bake_pruning, prune, pruning_masks, sparsity_report
from losssurf_fast.surface import Line, Plane, Rays, Surface, line, rays
from losssurf_fast.uncertainty import UncertaintyMetrics, UncertaintyReport, evaluate_uncertainty
from losssurf_fast.weight_sampling import WeightSample, sample_weights, set_sampling, set_variance_dtype

__version__ = "0.1.0"
__all__ = [
    "FGE",
    "SWAG",
    "AveragedModel",
    "ConversionReport",
    "Curve",
    "CurveReport",
    "ELBOLoss",
    "FGETriangleLR",
    "Line",
    "MinimaGraph",
    "OnlineEnsemble",
    "Plane",
    "Rays",
    "SWAConstantLR",
    "SWACyclicLR",
    "SparsityReport",
    "Surface",
    "UncertaintyMetrics",
    "UncertaintyReport",
    "WeightSample",
    "auto_neb",
    "averaged_weights",
    "bake_pruning",
    "cached_variances",
    "conversion_report",
    "evaluate_curve",
    "evaluate_uncertainty",
    "from_lrt",
    "kernel_for",
    "kl_divergence",
    "line",
    "load_variance_networks",
    "nn",
    "ops",
    "predict",
    "prediction",
    "prune",
    "pruning_masks",
    "rays",
    "sample_weights",
    "set_sampling",
    "set_variance_dtype",
    "sparsity_report",
    "to_lrt",
    "update_bn",
]
