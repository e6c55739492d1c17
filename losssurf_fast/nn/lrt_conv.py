"""Convolutions with Gaussian weights, trained by local reparameterization (``ops/lrt_conv.py`` has the formulas)."""

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast.nn.lrt import LRTLayer, check_parameterization
from losssurf_fast.ops.lrt import LRT_DTYPES

_HALF = (torch.bfloat16, torch.float16)


class _LRTConvolution(LRTLayer):
    """What convolutions and transposed ones share; ``operator`` is the function of ``lsf.ops`` that draws."""

    operator: str

    @property
    def outputs(self) -> int:
        return self.out_channels

    def check_input(self, input: torch.Tensor) -> None:
        if not isinstance(input, torch.Tensor):
            raise TypeError(f"{self.operator}: x must be a tensor, got {type(input).__name__}")
        if input.dtype not in LRT_DTYPES:
            raise TypeError(f"{self.operator}: x must have one of the dtypes {LRT_DTYPES}, got {input.dtype}")

    def parameters_beside(self, input: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias for the library: in the input's dtype where that is a half-precision one."""
        if input.dtype not in _HALF:
            return weight, self.bias
        return weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)


class _LRTConv(_LRTConvolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        parameterization: str = "additive",
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
    ) -> None:
        check_parameterization(type(self).__name__, parameterization, init_log_sigma2, init_log_alpha)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)

    def local(self, input: torch.Tensor, seed: int | torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            self.check_input(input)
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        return getattr(ops, self.operator)(
            input, self.weight, self.scale, self.bias, self.stride, padding, self.dilation, self.groups,
            parameterization=self.parameterization, seed=seed,
        )  # fmt: skip

    def plain(self, input: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        self.check_input(input)
        if weight is None:
            weight = torch.zeros_like(self.scale)
        return self._conv_forward(input, *self.parameters_beside(input, weight))


class LRTConv1d(_LRTConv, nn.Conv1d):
    """:class:`LRTConv2d` with 1 spatial dimension."""

    operator = "lrt_conv1d"


class LRTConv2d(_LRTConv, nn.Conv2d):
    """``nn.Conv2d`` whose weights are Gaussian."""

    operator = "lrt_conv2d"


class LRTConv3d(_LRTConv, nn.Conv3d):
    """:class:`LRTConv2d` with 3 spatial dimensions."""

    operator = "lrt_conv3d"
