"""Averages held in eight bits, as SWALP holds them: block floating point with one exponent for each row
(index of the first dimension) of a matrix, or for a whole vector.

Source: Yang et al., "SWALP: stochastic weight averaging in low-precision training", ICML 2019, section 3.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from losssurf_fast.ops.block_float import block_float_dequantize, block_float_quantize

_WORD_LENGTH, _SEED = 8, 0x5357414C50


class Compressed:
    """Mantissas and exponents in place of the values of tensors, which ``show`` brings back and ``hide`` takes away.

    What is shown counts: it may be written to, and the next ``hide`` rounds it. Whether values have been looked at
    makes no difference. The noise is a function of the tensor's place and of the number of averaged models.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]):
        self._parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of what is hidden
        self._rows = {name: row for row, (name, t) in enumerate(named) if t.is_floating_point()}
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
        if name not in self._rows or name in self._parts:
            return
        if tensor.device not in self._seeds:
            self._seeds[tensor.device] = torch.tensor(_SEED, device=tensor.device)
        block, seed = "row" if tensor.dim() > 1 else "tensor", self._seeds[tensor.device]
        row, sample = self._rows[name], n % 2**32
        self._strides[name] = torch.empty_like(tensor, device="meta").stride()
        self._parts[name] = block_float_quantize(tensor, _WORD_LENGTH, seed, block=block, row_offset=row, sample=sample)
        tensor.data = tensor.new_zeros(()).expand(tensor.shape)  # the shape without the memory

    @contextlib.contextmanager
    def open(self, name: str, tensor: torch.Tensor, n: int) -> Iterator[None]:
        self.show(name, tensor)
        yield  # after an exception it stays shown: rounding once more could change it
        self.hide(name, tensor, n)
