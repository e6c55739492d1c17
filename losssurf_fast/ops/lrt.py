"""The local reparameterization trick: noise on a layer's pre-activations instead of on its weights.

Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick", NIPS 2015; the five
parameterizations are those of Neklyudov et al., "Variance networks", ICLR 2019. With weights w_ij ~ N(w, sigma^2)::

    mean = x w^T + b        var = x^2 (sigma^2)^T        y = mean + sqrt(max(var, 0) + 1e-16) eps

    parameterization   sigma^2                scale
    "layer"            alpha w^2              log_alpha [1]
    "neuron"           alpha_j w^2            log_alpha [O]
    "weight"           alpha_ij w^2           log_alpha [O, I]
    "additive"         sigma_ij^2             log_sigma2 [O, I]
    "variance"         sigma_ij^2, no mean    log_sigma2 [O, I], weight is None

eps is the noise of ``ops/noise.py``: row = product of the leading sizes, column = output feature.

Letters: M rows of x (the product of its leading sizes), I input features, O output features.

Numerics: GEMM operands have x's dtype (fp32 where x is fp16: squares of fp16 leave its range), everything between the
GEMMs and the result is fp32. Saved for backward: x, the parameters, the seed and ``var`` [M, O], which for "layer" and
"neuron" is the variance before alpha, so that d log_alpha = sum dvar var needs no pass over the weights.
"""

import math

import torch
from torch.nn import functional as F

from losssurf_fast._library import (
    composite_needed,
    define,
    in_autocast_dtype,
    register_autograd,
    second_order,
    without_autocast,
)
from losssurf_fast.ops.lrt_operand import (
    FLOAT8,
    VarianceOperand,
    as_variance_dtype,
    check_float8,
    check_kind,
    check_scale_and_bias,
    float8_product,
    lrt_variance_operand,
    operand_dtype,
    variance_operand,
)
from losssurf_fast.ops.lrt_operand import PARAMETERIZATIONS as PARAMETERIZATIONS
from losssurf_fast.ops.lrt_sample import (
    LRT_DTYPES,
    lrt_sample_backward_reference,
    lrt_sample_reference,
)
from losssurf_fast.ops.noise import as_seed, check_stream

# ---- lrt_linear ----------------------------------------------------------------------------------------------------


@without_autocast
def lrt_linear_reference(
    x, weight, scale, bias, seed, parameterization, row_offset=0, col_offset=0, sample=0, sigma2=None, row_scale=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, var), both ``[M, O]``, for x ``[M, I]``: the formulas of the module's docstring in plain torch.

    ``sigma2`` and ``row_scale`` are those of ``ops/lrt_operand.py``; without them sigma^2 is made here.
    """
    operand, wide = operand_dtype(x.dtype), torch.promote_types(x.dtype, torch.float32)
    a = x.to(operand)
    if row_scale is None:
        sigma2 = variance_operand(weight, scale, parameterization, wide).to(operand) if sigma2 is None else sigma2
        var = F.linear(a.square(), sigma2)
    else:
        var = float8_product(a, VarianceOperand(sigma2, row_scale))
    if weight is not None and parameterization != "variance":
        mean = F.linear(a, weight.to(operand)).to(wide)
    else:
        mean = var.new_zeros(var.shape, dtype=wide)
    if bias is not None:
        mean = mean + bias.to(wide)
    alpha = scale.to(wide).exp() if parameterization in ("layer", "neuron") else 1.0
    y = lrt_sample_reference(mean, var.to(wide) * alpha, seed, row_offset, col_offset, sample)
    return y.to(x.dtype), var


def lrt_linear_backward_reference(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, row_offset=0, col_offset=0, sample=0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to x, weight, scale and bias; empty tensors of shape (0,) where not ``needed``."""
    operand, wide = operand_dtype(x.dtype), torch.promote_types(x.dtype, torch.float32)
    output_alpha = parameterization in ("layer", "neuron")
    alpha = scale.to(wide).exp() if output_alpha else 1.0
    v = var.to(wide)
    # Gradient to var as it is saved: before alpha for "layer" and "neuron".
    dvar = lrt_sample_backward_reference(grad.to(wide), v * alpha, seed, row_offset, col_offset, sample) * alpha
    sigma2 = variance_operand(weight, scale, parameterization, wide)
    a, g, h = x.to(operand), grad.to(operand), dvar.to(operand)
    grad_x, grad_weight, grad_scale, grad_bias = (x.new_empty(0) for _ in range(4))
    if needed[0]:
        grad_x = 2 * x.to(wide) * (h @ sigma2.to(operand)).to(wide)
        if parameterization != "variance":
            grad_x = grad_x + (g @ weight.to(operand)).to(wide)
        grad_x = grad_x.to(x.dtype)
    if needed[1] or (needed[2] and not output_alpha):
        dsigma2 = (h.t() @ a.square()).to(wide)
    if needed[1]:
        gain = scale.to(wide).exp() if parameterization == "weight" else 1.0
        grad_weight = (g.t() @ a).to(wide)
        if parameterization != "additive":
            grad_weight = grad_weight + 2 * weight.to(wide) * gain * dsigma2
        grad_weight = grad_weight.to(weight.dtype)
    if needed[2]:
        products = dvar * v if output_alpha else dsigma2 * sigma2
        grad_scale = products.sum() if parameterization == "layer" else products
        grad_scale = (products.sum(0) if parameterization == "neuron" else grad_scale).to(scale.dtype)
        grad_scale = grad_scale.reshape(scale.shape)
    if needed[3] and has_bias:
        grad_bias = grad.to(wide).sum(0)
    return grad_x, grad_weight, grad_scale, grad_bias


def _lrt_linear_fake(
    x, weight, scale, bias, seed, parameterization, row_offset=0, col_offset=0, sample=0, sigma2=None, row_scale=None
):
    out_features = scale.shape[0] if weight is None else weight.shape[0]
    y = x.new_empty((x.shape[0], out_features))
    return y, torch.empty_like(y, dtype=operand_dtype(x.dtype))


def _lrt_linear_backward_fake(
    grad, x, weight, scale, has_bias, var, seed, parameterization, needed, row_offset=0, col_offset=0, sample=0
):
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape if needed[0] else 0),
        weight.new_empty(weight.shape) if needed[1] else x.new_empty(0),
        scale.new_empty(scale.shape) if needed[2] else x.new_empty(0),
        grad.new_empty(grad.shape[1], dtype=wide) if needed[3] and has_bias else x.new_empty(0),
    )


define(
    "lrt_linear(Tensor x, Tensor? weight, Tensor scale, Tensor? bias, Tensor seed, str parameterization, "
    "SymInt row_offset=0, SymInt col_offset=0, SymInt sample=0, Tensor? sigma2=None, Tensor? row_scale=None) "
    "-> (Tensor, Tensor)",
    reference=lrt_linear_reference,
    fake=_lrt_linear_fake,
)
define(
    "lrt_linear_backward(Tensor grad, Tensor x, Tensor? weight, Tensor scale, bool has_bias, Tensor var, Tensor seed, "
    "str parameterization, bool[4] needed, SymInt row_offset=0, SymInt col_offset=0, SymInt sample=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=lrt_linear_backward_reference,
    fake=_lrt_linear_backward_fake,
)


# The autograd formula of lrt_linear is csrc/lrt_autograd.cpp; it calls lrt_linear_backward, whose own formula follows.


def _lrt_linear_backward_setup(ctx, inputs, output):
    grad, x, weight, scale, ctx.has_bias, _, seed, ctx.parameterization, ctx.needed, *ctx.place = inputs
    ctx.save_for_backward(grad, x, weight, scale, seed)


def _lrt_linear_backward_autograd(ctx, *outgoing):
    grad, x, weight, scale, seed = ctx.saved_tensors

    def formula(x, weight, scale, bias):
        return lrt_linear_reference(x, weight, scale, bias, seed, ctx.parameterization, *ctx.place)[0]

    bias = grad.new_zeros(grad.shape[1]) if ctx.has_bias else None
    inputs = (x, weight, scale, bias)
    grads = second_order(formula, inputs, grad, [g if n else None for g, n in zip(outgoing, ctx.needed, strict=True)])
    return (*grads[:4], *[None] * 8)


register_autograd("lrt_linear_backward", _lrt_linear_backward_autograd, _lrt_linear_backward_setup)


def check_activations(x) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"lrt_linear: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in LRT_DTYPES:
        raise TypeError(f"lrt_linear: x must have one of the dtypes {LRT_DTYPES}, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("lrt_linear: x must be [..., in_features], got a 0-d tensor")


def check_parameters(x, weight, scale, bias, parameterization) -> None:
    name = "lrt_linear"
    matrix, matrix_name = check_kind(name, x, weight, scale, parameterization)
    if matrix.dim() != 2:
        raise ValueError(f"{name}: {matrix_name} must be [out_features, in_features], got {tuple(matrix.shape)}")
    if matrix.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}: x must be [..., {matrix.shape[1]}] for {matrix_name} {tuple(matrix.shape)}, got {tuple(x.shape)}"
        )
    check_scale_and_bias(name, x, matrix, scale, bias, parameterization, matrix.shape[0])


def chosen_operand(x, weight, scale, parameterization, variance_dtype, operand) -> tuple[torch.Tensor, ...]:
    """The variance operand that :func:`lrt_linear` was given, checked, or that of ``variance_dtype``."""
    name, matrix = "lrt_linear", scale if weight is None else weight
    if variance_dtype is None and operand is None:
        return ()
    as_variance_dtype(name, variance_dtype)
    if operand is not None:
        if not isinstance(operand, VarianceOperand):
            raise TypeError(f"{name}: variance_operand must be a VarianceOperand, got {type(operand).__name__}")
        wanted = FLOAT8 if variance_dtype is not None or operand.row_scale is not None else operand_dtype(x.dtype)
        check_operand(operand.sigma2, "variance_operand", wanted, tuple(matrix.shape), x.device)
        if wanted != FLOAT8:
            return (operand.sigma2,)
        check_operand(operand.row_scale, "row_scale of variance_operand", torch.float32, matrix.shape[:1], x.device)
    check_float8_product(x, matrix)
    if operand is None:
        operand = lrt_variance_operand(weight, scale, parameterization=parameterization, dtype=FLOAT8)
    return operand


def check_float8_product(x, matrix) -> None:
    name = "lrt_linear"
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{name}: variance_dtype float8_e4m3fn needs x in torch.bfloat16, got {x.dtype}")
    if composite_needed():
        raise NotImplementedError(
            f"{name}: variance_dtype float8_e4m3fn does not run under torch.func transforms or forward-mode AD"
        )
    check_float8(name, matrix)


def check_operand(t, what: str, dtype: torch.dtype, shape, device: torch.device) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"lrt_linear: {what} must hold a tensor, got {type(t).__name__}")
    if t.dtype != dtype or t.shape != shape or t.device != device or t.layout != torch.strided:
        found = f"{t.dtype} {tuple(t.shape)} on {t.device}, {t.layout}"
        raise ValueError(f"lrt_linear: {what} must be {dtype} {tuple(shape)} on {device}, strided, got {found}")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"lrt_linear: {what} must not require a gradient: it would get none")


def lrt_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parameterization: str,
    seed: int | torch.Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
    variance_dtype: torch.dtype | str | None = None,
    variance_operand: VarianceOperand | None = None,
) -> torch.Tensor:
    """Linear layer with Gaussian weights, sampled by the local reparameterization trick.

    Args:
        x: ``[..., I]`` in float64, float32, bfloat16 or float16 (under autocast: cast to its dtype).
        weight: mean of the weights ``[O, I]``; None for the "variance" parameterization.
        scale: ``log_alpha`` ``[1]`` ("layer"), ``[O]`` ("neuron") or ``[O, I]`` ("weight"), ``log_sigma2`` ``[O, I]``
            ("additive", "variance").
        bias: ``[O]`` or None; it has no variance.
        parameterization: one of the five of the module's docstring.
        seed: int or 0-d int64 tensor on x's device; drawn from the default generator if None.
        row_offset, col_offset: place of x's rows in a larger batch and of the outputs among more features, so that a
            shard draws what the whole would draw.
        sample: which of the 2^32 draws of this seed.
        variance_dtype: "float8_e4m3fn" multiplies the variance stream in float8, where the GPU can (compute capability
            8.9 or more): bfloat16 x, I and O multiples of 16. The standard deviations' error is told in
            ``ops/lrt_operand.py``; means and gradients are computed as without it.
        variance_operand: what :func:`lrt_variance_operand` made of these very parameters, so that it is not made
            again. Gradients reach weight and scale all the same.

    Parameters have x's dtype, or float32 beside half-precision activations; gradients have the parameters' dtypes.

    Returns:
        ``[..., O]`` in x's dtype.

    Raises:
        TypeError, ValueError: a dtype, device, shape, name, seed or offset is not as above.
        RuntimeError: float8 on a device that does not multiply it.
        NotImplementedError: float8 under a ``torch.func`` transform or forward-mode AD.
    """
    check_activations(x)
    x = in_autocast_dtype(x)
    check_parameters(x, weight, scale, bias, parameterization)
    matrix = scale if weight is None else weight
    check_stream("lrt_linear", row_offset, col_offset, sample, matrix.shape[0])
    seed = as_seed("lrt_linear", seed, x.device)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    inputs = (rows, weight, scale, bias, seed, parameterization, row_offset, col_offset, sample)
    operand = chosen_operand(x, weight, scale, parameterization, variance_dtype, variance_operand)
    if composite_needed():  # which differentiates through sigma^2
        y, _ = lrt_linear_reference(*inputs)
    else:
        y, _ = torch.ops.losssurf_fast.lrt_linear.default(*inputs, *operand)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], matrix.shape[0])
