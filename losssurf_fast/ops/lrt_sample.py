"""Samples of N(mean, var): the step between the two streams of a layer with local reparameterization and its output::

    y = mean + sqrt(max(var, 0) + 1e-16) eps

Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick", NIPS 2015. eps is the noise
of ``ops/noise.py``, in fp32 (fp64 for fp64) like everything between the inputs and the result.

Letters: M rows (the product of the leading sizes), O columns (the last size, or the ``spatial_dims`` last ones).
"""

import math

import torch

from losssurf_fast._library import composite_backward, composite_needed, define, register_autograd, without_autocast
from losssurf_fast.ops.noise import as_seed, check_stream

HALF_DTYPES = (torch.bfloat16, torch.float16)
LRT_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
EPSILON = 1e-16  # inside the square root


def sample_noise(shape, seed, row_offset, col_offset, sample, channels, channels_total, dtype) -> torch.Tensor:
    """Noise of a matrix ``[M, O]``. Its row i draws row ``row_offset + i // channels * channels_total + i % channels``,
    or ``row_offset + i`` where ``channels`` is 0."""
    rows, cols = shape
    draw = torch.ops.losssurf_fast.philox_normal.default
    if channels == 0:
        return draw(seed, rows, cols, row_offset, col_offset, sample, dtype)
    batch = rows // channels
    eps = draw(seed, batch * channels_total, cols, row_offset, col_offset, sample, dtype)
    return eps.view(batch, channels_total, cols)[:, :channels].reshape(rows, cols)


@without_autocast
def lrt_sample_reference(mean, var, seed, row_offset=0, col_offset=0, sample=0, channels=0, channels_total=0):
    """``mean + sqrt(max(var, 0) + 1e-16) eps`` for mean, var ``[M, O]``, in mean's dtype."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    eps = sample_noise(mean.shape, seed, row_offset, col_offset, sample, channels, channels_total, wide)
    return (mean.to(wide) + torch.sqrt(var.to(wide).clamp(min=0) + EPSILON) * eps).to(mean.dtype)


def lrt_sample_backward_reference(grad, var, seed, row_offset=0, col_offset=0, sample=0, channels=0, channels_total=0):
    """Gradient to var ``[M, O]`` in its dtype: ``grad eps / (2 sqrt(var + 1e-16))``, 0 where var < 0.

    Saturates where grad is finite: 5e7 ``|grad eps|`` at var = 0 must stay finite in fp16.
    """
    wide = torch.promote_types(var.dtype, torch.float32)
    eps = sample_noise(var.shape, seed, row_offset, col_offset, sample, channels, channels_total, wide)
    v = var.to(wide)
    grad_var = grad.to(wide) * eps * 0.5 / torch.sqrt(v.clamp(min=0) + EPSILON)
    limit = torch.finfo(var.dtype).max
    overflowed = grad.to(wide) - grad.to(wide)  # NaN where grad is not finite, else 0
    return torch.where(v < 0, 0.0, grad_var.clamp(-limit, limit) + overflowed).to(var.dtype)


_PLACE = (
    "SymInt row_offset=0, SymInt col_offset=0, SymInt sample=0, SymInt channels=0, SymInt channels_total=0) -> Tensor"
)
define(
    f"lrt_sample(Tensor mean, Tensor var, Tensor seed, {_PLACE}",
    reference=lrt_sample_reference,
    fake=lambda mean, var, seed, *place: mean.new_empty(mean.shape),
)
define(
    f"lrt_sample_backward(Tensor grad, Tensor var, Tensor seed, {_PLACE}",
    reference=lrt_sample_backward_reference,
    fake=lambda grad, var, seed, *place: var.new_empty(var.shape),
)


def _lrt_sample_setup(ctx, inputs, output):
    mean, var, seed, *ctx.place = inputs
    ctx.save_for_backward(mean, var, seed)


def _lrt_sample_autograd(ctx, grad):
    mean, var, seed = ctx.saved_tensors
    if torch.is_grad_enabled():  # double backward
        needed = ctx.needs_input_grad[:2]
        formula = lambda mean, var: lrt_sample_reference(mean, var, seed, *ctx.place)
        grads = composite_backward(formula, (mean, var), grad, needed)
        return (*grads, *[None] * 6)
    grad_var = None
    if ctx.needs_input_grad[1]:
        grad_var = torch.ops.losssurf_fast.lrt_sample_backward.default(grad, var, seed, *ctx.place)
    return grad, grad_var, *[None] * 6


register_autograd("lrt_sample", _lrt_sample_autograd, _lrt_sample_setup)


def lrt_sample(
    mean: torch.Tensor,
    var: torch.Tensor,
    seed: int | torch.Tensor | None = None,
    *,
    spatial_dims: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
    channels_total: int | None = None,
    channel_offset: int = 0,
) -> torch.Tensor:
    """Draw from N(mean, var) elementwise, differentiably in both: ``mean + sqrt(max(var, 0) + 1e-16) eps``.

    Args:
        mean: ``[..., O]`` in float64, float32, bfloat16 or float16; the result has its shape and dtype.
        var: broadcastable to mean; mean's dtype, or float32 beside a half-precision mean. Negative values count as 0.
        seed: int or 0-d int64 tensor; drawn from the default generator if None.
        spatial_dims: how many trailing sizes are flattened into noise columns, as for a convolution's output
            ``[N, C, *spatial]``; 0 and 1 both mean the last size alone.
        row_offset, col_offset, sample: position of the noise, see ``ops/noise.py``.
        channels_total, channel_offset: where the channels, the size before the ``spatial_dims``, lie among those of
            the whole output, so that channel c of sample n draws row ``n channels_total + channel_offset + c``.

    Raises:
        TypeError, ValueError: dtypes, shapes, seed or offsets are not as above.
    """
    name = "lrt_sample"
    if not isinstance(mean, torch.Tensor):
        raise TypeError(f"{name}: mean must be a tensor, got {type(mean).__name__}")
    if mean.dtype not in LRT_DTYPES:
        raise TypeError(f"{name}: mean must have one of the dtypes {LRT_DTYPES}, got {mean.dtype}")
    check_companion(name, "var", var, "mean", mean)
    try:
        var = var.expand_as(mean)
    except RuntimeError:
        raise ValueError(
            f"{name}: var must broadcast to mean's shape {tuple(mean.shape)}, got {tuple(var.shape)}"
        ) from None
    if not isinstance(spatial_dims, int) or isinstance(spatial_dims, bool):
        raise TypeError(f"{name}: spatial_dims must be an int, got {type(spatial_dims).__name__}")
    if not 0 <= spatial_dims <= mean.dim():
        raise ValueError(f"{name}: spatial_dims must lie in [0, {mean.dim()}], got {spatial_dims}")
    leading = mean.dim() - max(spatial_dims, min(1, mean.dim()))
    rows, cols = math.prod(mean.shape[:leading]), math.prod(mean.shape[leading:])
    channels, total = 0, 0
    if channels_total is not None or channel_offset != 0:
        if spatial_dims == 0 or leading == 0:
            raise ValueError(
                f"{name}: channels_total and channel_offset need a size for channels before spatial_dims >= 1 others, "
                f"got mean {tuple(mean.shape)} with spatial_dims={spatial_dims}"
            )
        channels = mean.shape[leading - 1]
        total = check_channels(name, channels, channels_total, channel_offset)
    check_stream(name, row_offset, col_offset, sample, cols)
    place = (row_offset + channel_offset, col_offset, sample, channels, total)
    seed = as_seed(name, seed, mean.device)
    formula = lrt_sample_reference if composite_needed() else torch.ops.losssurf_fast.lrt_sample.default
    y = formula(mean.reshape(rows, cols), var.reshape(rows, cols), seed, *place)
    return y.view(mean.shape)


def check_channels(name: str, channels: int, channels_total: int | None, channel_offset: int) -> int:
    """Channels of the whole output of which ``channels`` begin at ``channel_offset``; raises if they do not fit."""
    for argument, value in (("channels_total", channels_total), ("channel_offset", channel_offset)):
        if not (value is None and argument == "channels_total") and (
            isinstance(value, bool) or not isinstance(value, int | torch.SymInt)
        ):
            raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    total = channels if channels_total is None else channels_total
    if not 0 <= channel_offset <= total - channels:
        raise ValueError(
            f"{name}: channel_offset must lie in [0, channels_total - {channels}], got {channel_offset} of {total}"
        )
    return total


def check_companion(name: str, argument: str, tensor, main_name: str, main: torch.Tensor) -> None:
    """``tensor`` must be a tensor on ``main``'s device, in its dtype or in float32 beside a half-precision one."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != main.device:
        raise ValueError(f"{name}: {argument} must be on {main_name}'s device {main.device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: {argument} must be strided, got {tensor.layout}")
    half = main.dtype in HALF_DTYPES
    if tensor.dtype != main.dtype and not (half and tensor.dtype == torch.float32):
        wanted = f"{main.dtype} or torch.float32" if half else f"{main.dtype}"
        raise TypeError(f"{name}: {argument} must be {wanted} beside {main_name} in {main.dtype}, got {tensor.dtype}")
