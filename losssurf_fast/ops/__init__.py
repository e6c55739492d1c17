"""Operators: one file per family holds the contract, kernels attach by the dispatcher."""

from losssurf_fast.ops.noise import philox_normal

__all__ = ["philox_normal"]
