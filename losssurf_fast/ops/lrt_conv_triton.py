"""``lrt_conv`` and its backward on a GPU: the library's convolutions and one fused pass (``lrt_sample_triton.py``).

The passes work in the memory format that the library gives its results, contiguous or channels_last, and the sample is
written over the mean where they have one dtype, so that beside the two convolutions nothing of the output's size is
read twice or written to memory for the noise. Operands have the dtypes of ``ops/lrt_conv.py``. With (a, a2) = (x, x^2)
and (w, s) = (weight, sigma^2) as in ``lrt_linear_backward_triton.py``, the backward is one pass from grad to grad_var,
two ``convolution_backward``, each for the gradients that are needed, and one elementwise pass per operand pair.
"""

import math

import torch

from losssurf_fast._library import attach
from losssurf_fast.ops.lrt_conv import lrt_conv_backward_reference, lrt_conv_reference
from losssurf_fast.ops.lrt_linear_backward_triton import (
    grad_parameters_of,
    grad_x_of,
    output_gradients,
    parameter_gradients,
)
from losssurf_fast.ops.lrt_operand import operand_dtype
from losssurf_fast.ops.lrt_operand_triton import OUTPUT_ALPHA, operands
from losssurf_fast.ops.lrt_sample_triton import View, output_of, sample_pass


def channels_innermost(t: torch.Tensor) -> bool:
    """Whether ``t`` ``[N, C, *sizes]`` is channels_last, with any number of sizes; a tensor that is both is not."""
    return t.stride(1) == 1 and not t.is_contiguous()


def dense(t: torch.Tensor | None, like: torch.Tensor | None = None) -> torch.Tensor | None:
    """``t``, copied only if it is not dense in the memory format of ``like``, by default its own."""
    if t is None:
        return None
    if channels_innermost(t if like is None else like):
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.contiguous()


def channels_view(t: torch.Tensor, channels_total: int) -> View:
    """View of a dense ``[N, O, *S]``; ``channels_total`` 0 means O."""
    batch, channels, *spatial = t.shape
    memory_format = "channels_last" if channels_innermost(t) else "contiguous"
    return View(batch, channels, math.prod(spatial), memory_format, channels_total or channels)


def parameters(weight, scale, parameterization):
    """weight and scale, dense and, where they have one shape, alike in memory."""
    if parameterization in OUTPUT_ALPHA:
        return dense(weight), scale.contiguous()
    return dense(weight), dense(scale, weight)


# ---- forward -------------------------------------------------------------------------------------------------------


def lrt_conv_triton(
    x, weight, scale, bias, seed, parameterization, stride, padding, dilation, transposed, output_padding, groups,
    row_offset=0, channels_total=0, sample=0,
):  # fmt: skip
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if x.dtype == torch.float64 or x.numel() == 0:
        return lrt_conv_reference(
            x, weight, scale, bias, seed, parameterization, *geometry, row_offset, channels_total, sample
        )
    operand = operand_dtype(x.dtype)
    weight, scale = parameters(weight, scale, parameterization)
    a, a2 = operands(dense(x), None, "layer", operand)
    w, sigma2 = operands(weight, scale, parameterization, operand)
    var = dense(torch.convolution(a2, sigma2, None, *geometry))
    mean = None if w is None else dense(torch.convolution(a, w, None, *geometry), var)
    alpha = parameterization if parameterization in OUTPUT_ALPHA else "none"
    y, view = output_of(mean, var, x.dtype), channels_view(var, channels_total)
    bias = None if bias is None else bias.contiguous()
    return sample_pass(mean, var, scale, bias, seed, y, view, alpha, row_offset, 0, sample), var


# ---- backward ------------------------------------------------------------------------------------------------------


def lrt_conv_backward_triton(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, stride, padding, dilation, transposed,
    output_padding, groups, row_offset=0, channels_total=0, sample=0,
):  # fmt: skip
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if x.dtype == torch.float64 or 0 in (x.numel(), var.numel()):
        return lrt_conv_backward_reference(
            grad, x, weight, scale, has_bias, var, seed, parameterization, needed, *geometry, row_offset,
            channels_total, sample,
        )  # fmt: skip
    operand, scale_given = operand_dtype(x.dtype), scale
    x, var = dense(x), dense(var)
    grad = dense(grad, var)
    weight, scale = parameters(weight, scale, parameterization)
    matrix = scale if weight is None else weight
    weight_dtype, scale_dtype, needs_sigma2 = parameter_gradients(weight, scale, parameterization, needed)
    grad_var, grad_bias, grad_scale = output_gradients(
        grad, var, scale, seed, channels_view(var, channels_total), operand, parameterization,
        needed[0] or needs_sigma2, needed, has_bias, (row_offset, 0, sample),
    )  # fmt: skip

    def convolution_backward(grad, a, w, needs_w):
        if not (needed[0] or needs_w):
            return None, None
        grads = torch.ops.aten.convolution_backward(grad, a, w, None, *geometry, [needed[0], needs_w, False])
        return dense(grads[0], x), dense(grads[1], matrix)

    a, a2 = operands(x, None, "layer", operand)
    w, sigma2 = operands(weight, scale, parameterization, operand)
    through_mean = direct = None
    if w is not None:
        through_mean, direct = convolution_backward(grad.to(operand), a, w, needed[1])
    through_var, grad_sigma2 = convolution_backward(grad_var, a2, sigma2, needs_sigma2)
    grad_x = grad_weight = None
    if needed[0]:
        grad_x = grad_x_of(x, through_mean, through_var)
    if needed[1] or needs_sigma2:
        grad_weight, found = grad_parameters_of(
            weight, scale, direct, grad_sigma2, parameterization, weight_dtype, scale_dtype
        )
        grad_scale = grad_scale if found is None else dense(found, scale_given)
    return tuple(x.new_empty(0) if g is None else g for g in (grad_x, grad_weight, grad_scale, grad_bias))


attach("lrt_conv", lrt_conv_triton)
attach("lrt_conv_backward", lrt_conv_backward_triton)
