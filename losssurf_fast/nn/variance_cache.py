"""The variances of a layer's weights, kept between forwards that do not change the weights."""

from collections.abc import Hashable

import torch

from losssurf_fast._library import autocast_dtype_of, composite_needed
from losssurf_fast.ops.lrt_operand import VarianceOperand, lrt_variance_operand, operand_dtype


class VarianceCache(dict):
    """What a layer inside ``lsf.cached_variances`` has made, by slot; its copies and pickles have none."""

    def operand(self, slot: Hashable, held: tuple, dtype: torch.dtype, make) -> VarianceOperand | None:
        """sigma^2 in ``dtype``, by ``make(dtype)`` unless it is known; None where it cannot be kept.

        It is known for the very tensors ``held``, if nothing has written to them. Holding them keeps another tensor
        from taking their place in memory.
        """
        if torch.compiler.is_compiling() or composite_needed() or any(t.is_inference() for t in held):
            return None  # nobody counts the writes
        written = [t._version for t in held]
        known = self.get(slot)
        if known is None or not known.serves(held, written, dtype):
            known = self[slot] = _Known(held, written, dtype, make(dtype))
        return known.operand

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


class _Known:
    def __init__(self, held: tuple, written: list[int], dtype: torch.dtype, operand: VarianceOperand) -> None:
        self.held, self.written, self.dtype, self.operand = held, written, dtype, operand

    def serves(self, held: tuple, written: list[int], dtype: torch.dtype) -> bool:
        same = len(held) == len(self.held) and all(a is b for a, b in zip(held, self.held, strict=True))
        return same and written == self.written and dtype == self.dtype


def cached_operand(layer, slot: Hashable, held: tuple, x, weight, scale) -> VarianceOperand | None:
    """The operand of ``weight`` and ``scale``, which are or are parts of the parameters ``held``.

    None where ``layer`` keeps none. It has a ``parameterization``, a ``variance_dtype`` and ``variances``, a cache or
    None.
    """
    if layer.variances is None:
        return None
    make = lambda dtype: lrt_variance_operand(weight, scale, parameterization=layer.parameterization, dtype=dtype)
    dtype = layer.variance_dtype or operand_dtype(autocast_dtype_of(x))
    return layer.variances.operand(slot, tuple(t for t in held if t is not None), dtype, make)
