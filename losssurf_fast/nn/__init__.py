"""Layers: drop-in replacements of torch.nn's, with Gaussian weights or with weights on a curve."""

from losssurf_fast.nn.curve import CurveLinear
from losssurf_fast.nn.lrt import LRTLayer
from losssurf_fast.nn.lrt_attention import LRTMultiheadAttention
from losssurf_fast.nn.lrt_conv import (
    LRTConv1d,
    LRTConv2d,
    LRTConv3d,
    LRTConvTranspose1d,
    LRTConvTranspose2d,
    LRTConvTranspose3d,
)
from losssurf_fast.nn.lrt_embedding import LRTEmbedding
from losssurf_fast.nn.lrt_linear import LRTLinear
from losssurf_fast.nn.stochastic import StochasticLayer

__all__ = [
    "CurveLinear",
    "LRTConv1d",
    "LRTConv2d",
    "LRTConv3d",
    "LRTConvTranspose1d",
    "LRTConvTranspose2d",
    "LRTConvTranspose3d",
    "LRTEmbedding",
    "LRTLayer",
    "LRTLinear",
    "LRTMultiheadAttention",
    "StochasticLayer",
]
