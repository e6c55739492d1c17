"""Operators: one file per family holds the contract, kernels attach by the dispatcher."""

import importlib.util

from losssurf_fast._library import explain_missing
from losssurf_fast.ops.averaging import ema_, lerp_
from losssurf_fast.ops.block_float import block_float, block_float_dequantize, block_float_quantize
from losssurf_fast.ops.curve import curve_coefficients, curve_weights
from losssurf_fast.ops.curve_linear import curve_linear
from losssurf_fast.ops.gaussian_weights import gaussian_weights
from losssurf_fast.ops.kl import kl_ard, kl_log_uniform, kl_normal
from losssurf_fast.ops.lrt import lrt_linear
from losssurf_fast.ops.lrt_conv_functions import (
    lrt_conv1d,
    lrt_conv2d,
    lrt_conv3d,
    lrt_conv_transpose1d,
    lrt_conv_transpose2d,
    lrt_conv_transpose3d,
)
from losssurf_fast.ops.lrt_operand import VarianceOperand, lrt_variance_operand
from losssurf_fast.ops.lrt_sample import lrt_sample
from losssurf_fast.ops.noise import philox_normal
from losssurf_fast.ops.swag import swag_collect_, swag_sample

if importlib.util.find_spec("triton"):
    from losssurf_fast.ops import (  # noqa: F401
        curve_linear_triton,
        kl_triton,
        lrt_conv_triton,
        lrt_linear_backward_triton,
        lrt_linear_triton,
        lrt_operand_triton,
        lrt_sample_triton,
        noise_triton,
    )
else:
    explain_missing("cuda", "triton is not installed")

__all__ = [
    "VarianceOperand",
    "block_float",
    "block_float_dequantize",
    "block_float_quantize",
    "curve_coefficients",
    "curve_linear",
    "curve_weights",
    "ema_",
    "gaussian_weights",
    "kl_ard",
    "kl_log_uniform",
    "kl_normal",
    "lerp_",
    "lrt_conv1d",
    "lrt_conv2d",
    "lrt_conv3d",
    "lrt_conv_transpose1d",
    "lrt_conv_transpose2d",
    "lrt_conv_transpose3d",
    "lrt_linear",
    "lrt_sample",
    "lrt_variance_operand",
    "philox_normal",
    "swag_collect_",
    "swag_sample",
]
