"""The variances of a layer's weights, kept between forwards that do not change the weights."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import nn

from losssurf_fast._library import autocast_dtype_of, composite_needed, in_autocast_dtype
from losssurf_fast.ops.lrt import check_activations, check_float8_product, check_parameters
from losssurf_fast.ops.lrt_operand import VarianceOperand, lrt_variance_operand, operand_dtype


class VarianceCache(dict):
    """What a layer inside ``lsf.cached_variances`` has made, by slot; its copies and pickles have none.

    ``contexts`` counts those that are open: when the last one ends, it is empty and keeps nothing more.
    """

    def __init__(self) -> None:
        self.contexts = 0

    def operand(self, slot: Hashable, held: tuple, dtype: torch.dtype, make) -> VarianceOperand | None:
        """sigma^2 in ``dtype``, by ``make(dtype)`` unless it is known; None where it cannot be kept.

        It is known for the very Parameters ``held``, if they lie where they did and nothing that autograd counts has
        written to them, and on the CUDA stream that made it. Parameters about to be trained have none: not all
        optimizers are counted.
        """
        if self.contexts == 0 or not may_keep(held):
            self.pop(slot, None)
            return None
        stream = torch.cuda.current_stream(held[0].device).cuda_stream if held[0].is_cuda else None
        state = (dtype, stream, *((t._version, t.data_ptr(), t.dtype) for t in held))
        known = self.get(slot)
        if known is None or known.state != state or any(a is not b for a, b in zip(held, known.held, strict=True)):
            known = self[slot] = _Known(held, state, make(dtype))
        return known.operand

    def __copy__(self) -> None:
        return None

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


class _Known(NamedTuple):
    held: tuple  # alive, so that no other tensor takes their place in memory
    state: tuple
    operand: VarianceOperand


def may_keep(held: tuple) -> bool:
    """Whether a tensor made of ``held`` outlives this call with a meaning.

    Not under what traces, fakes or captures this call, and not of what only this call has, or a step may change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if composite_needed() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if any(not isinstance(t, nn.Parameter) or t.is_inference() for t in held):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in held):
        return False
    return not (held[0].is_cuda and torch.cuda.is_current_stream_capturing())


def cached_operand(layer, slot: Hashable, held: tuple, x, weight, scale) -> VarianceOperand | None:
    """The operand of ``weight`` and ``scale``, which are or are parts of the parameters ``held``.

    None where ``layer`` keeps none. It has a ``parameterization``, a ``variance_dtype`` and ``variances``, a cache or
    None.
    """
    if layer.variances is None:
        return None
    check_activations(x)

    def make(dtype):
        # An x that does not fit has lrt_linear's error, not that of an operand for it.
        activations, kind = in_autocast_dtype(x), layer.parameterization
        check_parameters(activations, weight, scale, None, kind)
        if layer.variance_dtype is not None:
            check_float8_product(activations, scale if weight is None else weight)
        return lrt_variance_operand(weight, scale, parameterization=kind, dtype=dtype)

    dtype = layer.variance_dtype or operand_dtype(autocast_dtype_of(x))
    return layer.variances.operand(slot, tuple(t for t in held if t is not None), dtype, make)
