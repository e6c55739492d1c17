"""Operators: one file per family holds the contract, kernels attach by the dispatcher."""

from losssurf_fast.ops.kl import kl_ard, kl_log_uniform, kl_normal
from losssurf_fast.ops.lrt import lrt_linear, lrt_sample
from losssurf_fast.ops.noise import philox_normal

__all__ = ["kl_ard", "kl_log_uniform", "kl_normal", "lrt_linear", "lrt_sample", "philox_normal"]
