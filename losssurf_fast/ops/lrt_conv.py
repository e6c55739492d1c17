"""Convolutions with local reparameterization: the formulas and parameterizations of ``ops/lrt.py``.

With ``conv`` a convolution, transposed or not, of 1, 2 or 3 spatial dimensions::

    mean = conv(x, w) + b     var = conv(x^2, sigma^2)     y = mean + sqrt(max(var, 0) + 1e-16) eps

Kingma, Salimans and Welling, NIPS 2015; as in Neklyudov et al., ICLR 2019, the noise of output positions is
independent, which a single draw of shared weights would not be. "neuron" means one alpha per output channel.

eps is the noise of ``ops/noise.py``: row = n * channels_total + channel_offset + channel for sample n of the batch,
column = flattened spatial position, whatever the memory format. Outputs keep the memory format that the library's
convolution gives them (channels_last for channels_last inputs).

Letters: N batch, C input channels, O output channels, G groups, K kernel sizes, S spatial sizes of the output.
Weights are ``[O, C / G, *K]``, those of transposed convolutions ``[C, O / G, *K]``.

Numerics and what is saved for backward are those of ``lrt_linear``; var is ``[N, O, *S]``. It is clamped: convolution
algorithms that transform their operands (Winograd, FFT) may return slightly negative sums of squares. The public
functions are in ``ops/lrt_conv_functions.py``.
"""

import math

import torch

from losssurf_fast._library import define, register_autograd, second_order, without_autocast
from losssurf_fast.ops.lrt_operand import operand_dtype, variance_operand
from losssurf_fast.ops.lrt_sample import EPSILON, sample_noise

# ---- reference -----------------------------------------------------------------------------------------------------


def channel_noise(shape, seed, row_offset, channels_total, sample, dtype) -> torch.Tensor:
    """Noise of an output ``[N, O, *S]`` whose channels are rows ``row_offset + n channels_total + channel``."""
    batch, channels, *spatial = shape
    matrix = (batch * channels, math.prod(spatial))
    return sample_noise(matrix, seed, row_offset, 0, sample, channels, channels_total, dtype).view(shape)


def _per_channel(t: torch.Tensor, dims: int) -> torch.Tensor:
    """``[O]`` or ``[1]`` beside ``[N, O, *S]``."""
    return t.view(-1, *[1] * (dims - 2))


@without_autocast
def lrt_conv_reference(
    x, weight, scale, bias, seed, parameterization, stride, padding, dilation, transposed, output_padding, groups,
    row_offset=0, channels_total=0, sample=0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, var), both ``[N, O, *S]``, for x ``[N, C, *sizes]``; ``channels_total`` 0 means O."""
    operand, wide = operand_dtype(x.dtype), torch.promote_types(x.dtype, torch.float32)
    a = x.to(operand)
    conv = lambda a, w: torch.convolution(a, w, None, stride, padding, dilation, transposed, output_padding, groups)
    var = conv(a.square(), variance_operand(weight, scale, parameterization, wide).to(operand))
    mean = torch.zeros_like(var, dtype=wide)
    if parameterization != "variance":
        mean = conv(a, weight.to(operand)).to(wide)
    if bias is not None:
        mean = mean + _per_channel(bias.to(wide), x.dim())
    v = var.to(wide)
    if parameterization in ("layer", "neuron"):
        v = v * _per_channel(scale.to(wide).exp(), x.dim())
    eps = channel_noise(var.shape, seed, row_offset, channels_total or var.shape[1], sample, wide)
    y = mean + torch.sqrt(v.clamp(min=0) + EPSILON) * eps
    return y.to(x.dtype), var


def lrt_conv_backward_reference(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, stride, padding, dilation, transposed,
    output_padding, groups, row_offset=0, channels_total=0, sample=0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients to x, weight, scale and bias; empty tensors of shape (0,) where not ``needed``."""
    operand, wide = operand_dtype(x.dtype), torch.promote_types(x.dtype, torch.float32)
    output_alpha = parameterization in ("layer", "neuron")
    alpha = _per_channel(scale.to(wide).exp(), x.dim()) if output_alpha else 1.0
    eps = channel_noise(var.shape, seed, row_offset, channels_total or var.shape[1], sample, wide)
    v, limit = var.to(wide), torch.finfo(wide).max
    dvar = grad.to(wide) * eps * 0.5 / torch.sqrt((v * alpha).clamp(min=0) + EPSILON)
    overflowed = grad.to(wide) - grad.to(wide)  # NaN where grad is not finite, else 0
    dvar = torch.where(v < 0, 0.0, dvar.clamp(-limit, limit) + overflowed) * alpha
    sigma2 = variance_operand(weight, scale, parameterization, wide)
    a, g, h = x.to(operand), grad.to(operand), dvar.to(operand)

    def conv_backward(g, a, w, need_input, need_weight):
        if g.numel() == 0 or a.numel() == 0:  # the library asks for at least one element
            return torch.zeros_like(a), torch.zeros_like(w)
        return torch.ops.aten.convolution_backward(
            g, a, w, None, stride, padding, dilation, transposed, output_padding, groups,
            [need_input, need_weight, False],
        )[:2]  # fmt: skip

    grad_x, grad_weight, grad_scale, grad_bias = (x.new_empty(0) for _ in range(4))
    need_sigma2 = (needed[1] and parameterization != "additive") or (needed[2] and not output_alpha)
    through_var, dsigma2 = conv_backward(h, a.square(), sigma2.to(operand), needed[0], need_sigma2)
    if parameterization != "variance":
        through_mean, direct = conv_backward(g, a, weight.to(operand), needed[0], needed[1])
    if needed[0]:
        grad_x = 2 * x.to(wide) * through_var.to(wide)
        if parameterization != "variance":
            grad_x = grad_x + through_mean.to(wide)
        grad_x = grad_x.to(x.dtype)
    if needed[1]:
        gain = scale.to(wide).exp() if parameterization == "weight" else 1.0
        grad_weight = direct.to(wide)
        if parameterization != "additive":
            grad_weight = grad_weight + 2 * weight.to(wide) * gain * dsigma2.to(wide)
        grad_weight = grad_weight.to(weight.dtype)
    if needed[2]:
        products = dvar * v if output_alpha else dsigma2.to(wide) * sigma2
        if parameterization == "layer":
            products = products.sum()
        elif parameterization == "neuron":
            products = products.sum([0, *range(2, x.dim())])
        grad_scale = products.to(scale.dtype).reshape(scale.shape)
    if needed[3] and has_bias:
        grad_bias = grad.to(wide).sum([0, *range(2, x.dim())])
    return grad_x, grad_weight, grad_scale, grad_bias


# ---- operators -----------------------------------------------------------------------------------------------------


def _lrt_conv_fake(
    x, weight, scale, bias, seed, parameterization, stride, padding, dilation, transposed, output_padding, groups,
    row_offset=0, channels_total=0, sample=0,
):  # fmt: skip
    matrix = scale if weight is None else weight
    y = torch.convolution(x, matrix.to(x.dtype), None, stride, padding, dilation, transposed, output_padding, groups)
    return y, torch.empty_like(y, dtype=operand_dtype(x.dtype))


def _lrt_conv_backward_fake(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, stride, padding, dilation, transposed,
    output_padding, groups, row_offset=0, channels_total=0, sample=0,
):  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty_like(x) if needed[0] else x.new_empty(0),
        torch.empty_like(weight) if needed[1] else x.new_empty(0),
        torch.empty_like(scale) if needed[2] else x.new_empty(0),
        grad.new_empty(grad.shape[1], dtype=wide) if needed[3] and has_bias else x.new_empty(0),
    )


_GEOMETRY = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, "
    "SymInt row_offset=0, SymInt channels_total=0, SymInt sample=0"
)
define(
    "lrt_conv(Tensor x, Tensor? weight, Tensor scale, Tensor? bias, Tensor seed, str parameterization, "
    f"{_GEOMETRY}) -> (Tensor, Tensor)",
    reference=lrt_conv_reference,
    fake=_lrt_conv_fake,
)
define(
    "lrt_conv_backward(Tensor grad, Tensor x, Tensor? weight, Tensor scale, bool has_bias, Tensor var, Tensor seed, "
    f"str parameterization, bool[4] needed, {_GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=lrt_conv_backward_reference,
    fake=_lrt_conv_backward_fake,
)


# The autograd formula of lrt_conv is csrc/lrt_autograd.cpp; it calls lrt_conv_backward, whose own formula follows.


def _lrt_conv_backward_setup(ctx, inputs, output):
    grad, x, weight, scale, ctx.has_bias, _, seed, ctx.parameterization, ctx.needed, *ctx.geometry = inputs
    ctx.save_for_backward(grad, x, weight, scale, seed)


def _lrt_conv_backward_autograd(ctx, *outgoing):
    grad, x, weight, scale, seed = ctx.saved_tensors

    def formula(x, weight, scale, bias):
        return lrt_conv_reference(x, weight, scale, bias, seed, ctx.parameterization, *ctx.geometry)[0]

    bias = grad.new_zeros(grad.shape[1]) if ctx.has_bias else None
    outgoing = [g if n else None for g, n in zip(outgoing, ctx.needed, strict=True)]
    grads = second_order(formula, (x, weight, scale, bias), grad, outgoing)
    return (*grads[:4], *[None] * 14)


register_autograd("lrt_conv_backward", _lrt_conv_backward_autograd, _lrt_conv_backward_setup)
