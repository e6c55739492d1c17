"""Convolutions with Gaussian weights, trained by local reparameterization (``ops/lrt_conv.py`` has the formulas)."""

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast._library import in_autocast_dtype
from losssurf_fast.nn.lrt import LRTLayer, check_parameterization
from losssurf_fast.nn.lrt_linear import in_dtype_of
from losssurf_fast.nn.weight_space import check_sampling
from losssurf_fast.ops.lrt_sample import LRT_DTYPES, check_companion


class _LRTConvolution(LRTLayer):
    """What convolutions and transposed ones share.

    A family says how its operator (:meth:`draw`) and the library (:meth:`convolve`) are called; ``geometry`` is what
    one forward may choose, the ``output_padding`` of transposed convolutions.
    """

    operator: str  # the function of lsf.ops that draws

    @staticmethod
    def gaussian_weights(layer: nn.Module) -> dict[str, int]:
        return {"weight": layer.out_channels}

    def local(self, input: torch.Tensor, seed: int | torch.Tensor | None, **geometry) -> torch.Tensor:
        return self.draw(input, self.weight, self.scale, self.bias, seed, **geometry)

    def plain(
        self, input: torch.Tensor, weight: torch.Tensor | None, with_bias: bool = True, **geometry
    ) -> torch.Tensor:
        self.check_input(input)
        bias = self.bias if with_bias else None
        if weight is None:
            return self._bias_alone(input, bias, **geometry)
        return self.convolve(input, *in_dtype_of(input, weight, bias), **geometry)

    def draw(self, input, weight, scale, bias, seed, **geometry) -> torch.Tensor:
        raise NotImplementedError

    def convolve(self, input, weight, bias, **geometry) -> torch.Tensor:
        raise NotImplementedError

    def check_input(self, input: torch.Tensor) -> None:
        if not isinstance(input, torch.Tensor):
            raise TypeError(f"{self.operator}: x must be a tensor, got {type(input).__name__}")
        if input.dtype not in LRT_DTYPES:
            raise TypeError(f"{self.operator}: x must have one of the dtypes {LRT_DTYPES}, got {input.dtype}")

    def _bias_alone(self, input: torch.Tensor, bias: torch.Tensor | None, **geometry) -> torch.Tensor:
        """What a layer without mean weights returns: its draw's checks and shape, found without the arithmetic."""
        input = in_autocast_dtype(input)
        check_companion(self.operator, "scale", self.scale, "x", input)
        shapes = [None if t is None else torch.empty_like(t, device="meta") for t in (input, self.scale, self.bias)]
        shape = self.draw(shapes[0], None, *shapes[1:], 0, **geometry)
        seen = (input, self.scale) if input.dim() == self.scale.dim() else ()  # formats are of batches
        out = torch.zeros_like(shape, device=input.device, memory_format=_memory_format(*seen))
        return out if bias is None else out + bias.to(out.dtype).view(-1, *[1] * len(self.kernel_size))


def _memory_format(*operands: torch.Tensor) -> torch.memory_format:
    """That of what a convolution makes of these: channels_last where one of them is."""
    for t in operands:
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
        if channels_last and not t.is_contiguous() and t.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


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
        sampling: str = "local",
    ) -> None:
        check_sampling(type(self).__name__, sampling)
        check_parameterization(type(self).__name__, parameterization, init_log_sigma2, init_log_alpha)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)
        self.sampling = sampling

    def _check_channels(self, input: torch.Tensor) -> None:
        dims, channels = len(self.kernel_size), self.in_channels
        if input.dim() not in (dims + 1, dims + 2) or input.shape[-dims - 1] != channels:
            raise ValueError(
                f"{self.operator}: x must be [N, {channels}, {dims} sizes] or [{channels}, {dims} sizes], "
                f"got {tuple(input.shape)}"
            )

    def draw(self, input, weight, scale, bias, seed) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            self.check_input(input)
            self._check_channels(input)  # before padding, in the sizes that the caller knows
            input, padding = self._padded(input), 0
        return getattr(ops, self.operator)(
            input, weight, scale, bias, self.stride, padding, self.dilation, self.groups,
            parameterization=self.parameterization, seed=seed,
        )  # fmt: skip

    def convolve(self, input, weight, bias) -> torch.Tensor:
        if self.padding_mode == "zeros":
            return self._conv_forward(input, weight, bias)
        library = getattr(F, self.operator.removeprefix("lrt_"))
        return library(self._padded(input), weight, bias, self.stride, 0, self.dilation, self.groups)

    def _padded(self, input: torch.Tensor) -> torch.Tensor:
        """By the padding mode, which in torch may lose channels_last."""
        padded = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        return padded.contiguous(memory_format=_memory_format(input))


class LRTConv1d(_LRTConv, nn.Conv1d):
    """:class:`LRTConv2d` with 1 spatial dimension: ``[N, C, L]`` or ``[C, L]``."""

    operator = "lrt_conv1d"


class LRTConv2d(_LRTConv, nn.Conv2d):
    """``nn.Conv2d`` whose weights are Gaussian: a drop-in that samples its outputs instead of its weights.

    Draws noise in training, independent at every output position, and computes with the mean weights in evaluation,
    unless ``lsf.prediction`` says otherwise. The mean of a "variance" layer is its bias, whatever the input. Inputs are
    ``[N, C, H, W]`` or ``[C, H, W]`` in any memory format, which outputs keep.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for ``nn.Conv2d``; dtype float64, float32, bfloat16, float16.
        parameterization: "layer", "neuron", "weight" (``log_alpha`` [1], [out_channels] or of the weight's shape),
            "additive" or "variance" (``log_sigma2`` of the weight's shape; ``weight`` is None for "variance").
        init_log_alpha, init_log_sigma2, sampling: as for :class:`LRTLinear`.

    ``log_alpha`` and ``log_sigma2`` are float32 also in half-precision models. A plain layer's state_dict loads with
    ``strict=False``; "variance" takes only the bias from it.

    Raises:
        TypeError: an initial value is no real number.
        ValueError: unknown parameterization or sampling, or an initial value that it does not have or that is not
            finite.
    """

    operator = "lrt_conv2d"


class LRTConv3d(_LRTConv, nn.Conv3d):
    """:class:`LRTConv2d` with 3 spatial dimensions: ``[N, C, D, H, W]`` or ``[C, D, H, W]``."""

    operator = "lrt_conv3d"


class _LRTConvTranspose(_LRTConvolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        parameterization: str = "additive",
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
        sampling: str = "local",
    ) -> None:
        check_sampling(type(self).__name__, sampling)
        check_parameterization(type(self).__name__, parameterization, init_log_sigma2, init_log_alpha)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)
        self.sampling = sampling

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale ``[O]``, broadcastable to the weight ``[C, O / groups, ...]``."""
        of_groups = scale.view(self.groups, -1)
        if self.groups > 1:
            of_groups = of_groups.repeat_interleave(self.in_channels // self.groups, 0)
        return of_groups.view(*of_groups.shape, *[1] * len(self.kernel_size))

    def forward(
        self, input: torch.Tensor, output_size: list[int] | None = None, seed: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the torch layer's forward, with ``seed`` as for :meth:`LRTLayer.forward`."""
        self.check_input(input)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return self.respond(input, seed, output_padding=output_padding)

    def draw(self, input, weight, scale, bias, seed, output_padding=None) -> torch.Tensor:
        return getattr(ops, self.operator)(
            input, weight, scale, bias, self.stride, self.padding, output_padding or self.output_padding, self.groups,
            self.dilation, parameterization=self.parameterization, seed=seed,
        )  # fmt: skip

    def convolve(self, input, weight, bias, output_padding=None) -> torch.Tensor:
        library = getattr(F, self.operator.removeprefix("lrt_"))
        padding = output_padding or self.output_padding
        return library(input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)


class LRTConvTranspose1d(_LRTConvTranspose, nn.ConvTranspose1d):
    """:class:`LRTConvTranspose2d` with 1 spatial dimension: ``[N, C, L]`` or ``[C, L]``."""

    operator = "lrt_conv_transpose1d"


class LRTConvTranspose2d(_LRTConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weights are Gaussian; see :class:`LRTConv2d`.

    Its weight is ``[in_channels, out_channels / groups, *kernel_size]``; the ``log_alpha`` of "neuron" is
    [out_channels]. The forward takes ``output_size`` as torch's does, and ``seed`` after it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode,
            device, dtype: as for ``nn.ConvTranspose2d``.
        parameterization, init_log_alpha, init_log_sigma2, sampling: as for :class:`LRTConv2d`.

    Raises:
        TypeError, ValueError: as for :class:`LRTConv2d`.
    """

    operator = "lrt_conv_transpose2d"


class LRTConvTranspose3d(_LRTConvTranspose, nn.ConvTranspose3d):
    """:class:`LRTConvTranspose2d` with 3 spatial dimensions: ``[N, C, D, H, W]`` or ``[C, D, H, W]``."""

    operator = "lrt_conv_transpose3d"
