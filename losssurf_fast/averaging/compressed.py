"""Averages held in eight bits, as SWALP holds them: block floating point with one exponent for each row
(index of the first dimension) of a matrix, or for a whole vector.

Source: Yang et al., "SWALP: stochastic weight averaging in low-precision training", ICML 2019, section 3.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch

from losssurf_fast.averaging import tensors
from losssurf_fast.ops.block_float import block_float_dequantize, block_float_quantize

_WORD_LENGTH, _SEED = 8, 0x5357414C50


class Compressed:
    """Mantissas and exponents in place of the values of tensors, which ``show`` brings back and ``hide`` takes away.

    What is shown counts: it may be written to, and the next ``hide`` rounds it. Whether values have been looked at
    makes no difference. The noise is a function of the tensor's place and of the number of averaged models; a shard's
    is its part of the whole's.

    Raises:
        NotImplementedError: a tensor is cut in another dimension than its first, or interleaved.
    """

    def __init__(self, caller: str, named: Mapping[str, torch.Tensor]):
        self._parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of what is hidden
        rows = {name: row for row, (name, t) in enumerate(named.items()) if t.is_floating_point()}
        self._places = {name: _place(caller, name, named[name], row) for name, row in rows.items()}
        self._strides: dict[str, tuple[int, ...]] = {}  # of the values: mantissas are contiguous
        self._seeds: dict[torch.device, torch.Tensor] = {}

    @torch.inference_mode(False)  # or the values would be of no use after it
    def show(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._parts:
            values = block_float_dequantize(*self._parts[name], _WORD_LENGTH)
            empty = torch.empty_strided(values.shape, self._strides[name], dtype=tensor.dtype, device=values.device)
            tensor.data = empty.copy_(values)
            del self._parts[name]

    @torch.inference_mode(False)
    def hide(self, name: str, tensor: torch.Tensor, n: int) -> None:
        if name not in self._places or name in self._parts:
            return
        if tensor.device not in self._seeds:
            self._seeds[tensor.device] = torch.tensor(_SEED, device=tensor.device)
        block, seed = "row" if tensor.dim() > 1 else "tensor", self._seeds[tensor.device]
        row_offset, col_offset = self._places[name]
        self._strides[name] = torch.empty_like(tensor, device="meta").stride()
        place = {"row_offset": row_offset, "col_offset": col_offset, "sample": n % 2**32}
        self._parts[name] = block_float_quantize(tensor, _WORD_LENGTH, seed, block=block, **place)
        tensor.data = tensor.new_zeros(()).expand(tensor.shape)  # the shape without the memory

    @contextlib.contextmanager
    def open(self, name: str, tensor: torch.Tensor, n: int) -> Iterator[None]:
        self.show(name, tensor)
        yield  # after an exception it stays shown: rounding once more could change it
        self.hide(name, tensor, n)


def _place(caller: str, name: str, tensor: torch.Tensor, row: int) -> tuple[int, int]:
    """Of this rank's part of tensor number ``row``: (row_offset, col_offset)."""
    if tensors.is_sharded(tensor) and any(p.is_shard() and p.dim > 0 for p in tensor.placements):
        wanted = "average_dtype=torch.int8 needs shards along the first dimension"
        raise NotImplementedError(f"{caller}: {wanted}, got {name} placed as {tensor.placements}")
    return row, tensors.place_of(caller, tensor, row).offset
