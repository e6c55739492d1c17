"""``lrt_conv1d`` to ``lrt_conv_transpose3d``: torch's arguments and checks around the operator ``lrt_conv``."""

import torch
from torch.nn import functional as F

from losssurf_fast._library import composite_needed, in_autocast_dtype
from losssurf_fast.ops.lrt_conv import lrt_conv_reference
from losssurf_fast.ops.lrt_operand import check_kind, check_scale_and_bias
from losssurf_fast.ops.lrt_sample import LRT_DTYPES, check_channels
from losssurf_fast.ops.noise import as_seed, check_stream


def _tuple(name: str, argument: str, value, dims: int, least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * dims
    whole = all(isinstance(v, int | torch.SymInt) and not isinstance(v, bool) for v in values)
    if len(values) != dims or not whole:
        raise ValueError(f"{name}: {argument} must be an int or {dims} of them, got {value!r}")
    if any(v < least for v in values):
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value!r}")
    return values


def _check(name, x, weight, scale, bias, parameterization, dims, transposed, groups) -> int:
    """Raise on bad input, return the number of output channels. x has a batch."""
    matrix, matrix_name = check_kind(name, x, weight, scale, parameterization)
    layout = "[C, O / groups" if transposed else "[O, C / groups"
    if matrix.dim() != dims + 2:
        raise ValueError(f"{name}: {matrix_name} must be {layout}, {dims} kernel sizes], got {tuple(matrix.shape)}")
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"{name}: groups must be an int, got {groups!r}")
    if groups < 1 or matrix.shape[0] % groups:
        raise ValueError(f"{name}: groups={groups} must divide the channels of {matrix_name} {tuple(matrix.shape)}")
    channels = matrix.shape[0] if transposed else matrix.shape[1] * groups
    outputs = matrix.shape[1] * groups if transposed else matrix.shape[0]
    if x.shape[1] != channels:
        raise ValueError(
            f"{name}: x must have {channels} channels for {matrix_name} {tuple(matrix.shape)} and groups={groups}, "
            f"got {tuple(x.shape)}"
        )
    check_scale_and_bias(name, x, matrix, scale, bias, parameterization, outputs)
    return outputs


def _check_sizes(name, x, kernel, stride, padding, dilation, transposed, output_padding) -> None:
    """Every output size must be at least 1: an image that is too small is named here, not in the library."""
    for i, size in enumerate(x.shape[2:]):
        reach, both = dilation[i] * (kernel[i] - 1), 2 * padding[i]
        first = size + both - reach  # below 1 where the kernel fits nowhere, whatever the stride
        output = (size - 1) * stride[i] - both + reach + output_padding[i] + 1 if transposed else first
        if output < 1:
            raise ValueError(
                f"{name}: x must be larger for kernel sizes {tuple(kernel)}, stride {tuple(stride)}, padding "
                f"{tuple(padding)} and dilation {tuple(dilation)}, got {tuple(x.shape)}"
            )


def _same_padding(name: str, kernel, dilation, stride) -> list[int]:
    """What ``padding="same"`` adds before and after each size, as ``F.pad`` wants it: last size first."""
    if any(s != 1 for s in stride):
        raise ValueError(f"{name}: padding='same' is for stride 1, got stride {tuple(stride)}")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]


def _lrt_conv(
    name, dims, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups, row_offset,
    channels_total, channel_offset, sample, transposed=False, output_padding=0,
) -> torch.Tensor:  # fmt: skip
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in LRT_DTYPES:
        raise TypeError(f"{name}: x must have one of the dtypes {LRT_DTYPES}, got {x.dtype}")
    if x.dim() not in (dims + 1, dims + 2):
        raise ValueError(f"{name}: x must be [N, C, {dims} sizes] or [C, {dims} sizes], got {tuple(x.shape)}")
    x = in_autocast_dtype(x)
    batch = x if x.dim() == dims + 2 else x.unsqueeze(0)
    outputs = _check(name, batch, weight, scale, bias, parameterization, dims, transposed, groups)
    stride, dilation = _tuple(name, "stride", stride, dims, 1), _tuple(name, "dilation", dilation, dims, 1)
    output_padding = _tuple(name, "output_padding", output_padding, dims, 0)
    kernel = (scale if weight is None else weight).shape[2:]
    if padding == "same":
        batch, padding = F.pad(batch, _same_padding(name, kernel, dilation, stride)), 0
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f"{name}: padding must be 'same', 'valid' or ints, got {padding!r}")
    padding = _tuple(name, "padding", padding, dims, 0)
    _check_sizes(name, batch, kernel, stride, padding, dilation, transposed, output_padding)
    total = check_channels(name, outputs, channels_total, channel_offset)
    check_stream(name, row_offset, 0, sample, 0)
    seed = as_seed(name, seed, x.device)
    formula = lrt_conv_reference if composite_needed() else torch.ops.losssurf_fast.lrt_conv.default
    y, _ = formula(
        batch, weight, scale, bias, seed, parameterization, stride, padding, dilation, transposed, output_padding,
        groups, row_offset + channel_offset, total, sample,
    )  # fmt: skip
    return y if x.dim() == dims + 2 else y.squeeze(0)


def lrt_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """2-d convolution with Gaussian weights, sampled by the local reparameterization trick.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]`` in float64, float32, bfloat16 or float16 (under autocast: cast to its
            dtype), in any memory format.
        weight: mean of the weights ``[O, C / groups, kH, kW]``; None for the "variance" parameterization.
        scale: ``log_alpha`` ``[1]`` ("layer"), ``[O]`` ("neuron") or of the weights' shape ("weight"),
            ``log_sigma2`` of the weights' shape ("additive", "variance").
        bias: ``[O]`` or None; it has no variance.
        stride, padding, dilation, groups: as for ``F.conv2d``, "same" and "valid" included.
        parameterization: one of the five of ``ops/lrt.py``.
        seed: int or 0-d int64 tensor on x's device; drawn from the default generator if None.
        row_offset: first noise row; the shard of a batch that begins at sample n draws what the whole batch would draw
            with ``n * channels_total``.
        channels_total, channel_offset: where the output channels lie among those of a layer sharded by channels.
        sample: which of the 2^32 draws of this seed.

    Parameters have x's dtype, or float32 beside half-precision activations; gradients have the parameters' dtypes.

    Returns:
        ``[N, O, H', W']`` in x's dtype, without N for an x without it.

    Raises:
        TypeError, ValueError: a dtype, device, shape, name, seed or offset is not as above.
    """
    return _lrt_conv(
        "lrt_conv2d", 2, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups, row_offset,
        channels_total, channel_offset, sample,
    )  # fmt: skip


def lrt_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """:func:`lrt_conv2d` with 1 spatial dimension: x ``[N, C, L]``."""
    return _lrt_conv(
        "lrt_conv1d", 1, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups, row_offset,
        channels_total, channel_offset, sample,
    )  # fmt: skip


def lrt_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """:func:`lrt_conv2d` with 3 spatial dimensions: x ``[N, C, D, H, W]``."""
    return _lrt_conv(
        "lrt_conv3d", 3, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups, row_offset,
        channels_total, channel_offset, sample,
    )  # fmt: skip


def lrt_conv_transpose2d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """Transposed 2-d convolution with Gaussian weights, sampled by the local reparameterization trick.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]`` in float64, float32, bfloat16 or float16 (under autocast: cast to its
            dtype), in any memory format.
        weight: mean of the weights ``[C, O / groups, kH, kW]``; None for the "variance" parameterization.
        scale: ``log_alpha`` ``[1]`` ("layer"), ``[O]`` ("neuron") or of the weights' shape ("weight"),
            ``log_sigma2`` of the weights' shape ("additive", "variance").
        bias: ``[O]`` or None; it has no variance.
        stride, padding, output_padding, groups, dilation: as for ``F.conv_transpose2d``.
        parameterization: one of the five of ``ops/lrt.py``.
        seed: int or 0-d int64 tensor on x's device; drawn from the default generator if None.
        row_offset: first noise row; the shard of a batch that begins at sample n draws what the whole batch would draw
            with ``n * channels_total``.
        channels_total, channel_offset: where the output channels lie among those of a layer sharded by channels.
        sample: which of the 2^32 draws of this seed.

    Parameters have x's dtype, or float32 beside half-precision activations; gradients have the parameters' dtypes.

    Returns:
        ``[N, O, H', W']`` in x's dtype, without N for an x without it.

    Raises:
        TypeError, ValueError: a dtype, device, shape, name, seed or offset is not as above.
    """
    return _lrt_conv(
        "lrt_conv_transpose2d", 2, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups,
        row_offset, channels_total, channel_offset, sample, True, output_padding,
    )  # fmt: skip


def lrt_conv_transpose1d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """:func:`lrt_conv_transpose2d` with 1 spatial dimension: x ``[N, C, L]``."""
    return _lrt_conv(
        "lrt_conv_transpose1d", 1, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups,
        row_offset, channels_total, channel_offset, sample, True, output_padding,
    )  # fmt: skip


def lrt_conv_transpose3d(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """:func:`lrt_conv_transpose2d` with 3 spatial dimensions: x ``[N, C, D, H, W]``."""
    return _lrt_conv(
        "lrt_conv_transpose3d", 3, x, weight, scale, bias, parameterization, seed, stride, padding, dilation, groups,
        row_offset, channels_total, channel_offset, sample, True, output_padding,
    )  # fmt: skip
