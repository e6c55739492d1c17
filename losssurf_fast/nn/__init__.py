"""Layers: drop-in replacements of torch.nn's, with Gaussian weights."""

from losssurf_fast.nn.lrt import LRTLinear
from losssurf_fast.nn.stochastic import StochasticLayer

__all__ = ["LRTLinear", "StochasticLayer"]
