"""The variance operand of ``ops/lrt.py``: sigma^2 as the GEMM of the variance stream reads it, made ahead of time.

``lrt_linear`` makes it from the parameters in every call. Where these do not change between calls, it can be made once
and handed over; and it can be made in a narrower dtype, float8, which halves the time of the variance GEMM.

float8 is e4m3, whose largest number is 448, with a power of two for each row that brings the row's largest element
under 448: unscaled it saturates, and e5m2 has a mantissa bit less. A variance is a sum of positive products, so the
relative error of its root, the standard deviation, is small. Against fp64, with exact sums, over 1024 to 4096 inputs
(``tests/test_lrt_float8.py``; at 256 inputs nearly twice that):

    x              sigma^2                             rms              largest of ten thousand
    normal         log-normal(1) or squared normal     0.13 to 0.2 %    1.3 %
    rectified      log-normal(3)                       0.7 to 0.9 %     5 %
    Student-t(3)   log-normal(1)                       0.3 to 0.45 %    4 %; without scales 80 %

On average it is 0.1 % low. Means do not pass through it.
"""

from typing import NamedTuple

import torch

from losssurf_fast._library import define
from losssurf_fast.ops.lrt_sample import HALF_DTYPES, LRT_DTYPES, check_companion

FLOAT8 = torch.float8_e4m3fn
FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs that multiply it
FLOAT8_MULTIPLE = 16  # of both sizes of a weight: what torch._scaled_mm takes
PARAMETERIZATIONS = ("layer", "neuron", "weight", "additive", "variance")


class VarianceOperand(NamedTuple):
    """``sigma2`` ``[O, I]``, without alpha for "layer" and "neuron"; ``row_scale`` fp32 ``[O]`` where it is float8."""

    sigma2: torch.Tensor
    row_scale: torch.Tensor | None = None


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the GEMM operands for activations of ``dtype``."""
    return torch.float32 if dtype == torch.float16 else dtype


def variance_operand(weight, scale, parameterization, wide):
    """sigma^2 ``[O, I]`` in ``wide``, without alpha for "layer" and "neuron"."""
    if parameterization in ("layer", "neuron"):
        return weight.to(wide).square()
    if parameterization == "weight":
        return scale.to(wide).exp() * weight.to(wide).square()
    return scale.to(wide).exp()


def check_kind(name: str, main, weight, scale, parameterization, main_name: str = "x") -> tuple[torch.Tensor, str]:
    """The tensor that has the weights' shape and its argument's name, after checks that need no shape."""
    if not isinstance(parameterization, str) or parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"{name}: parameterization must be one of {PARAMETERIZATIONS}, got {parameterization!r}")
    if (weight is None) != (parameterization == "variance"):
        wanted = "must be None" if weight is not None else "is missing"
        raise ValueError(f"{name}: weight {wanted} for parameterization {parameterization!r}")
    check_companion(name, "scale", scale, main_name, main)
    if weight is None:
        return scale, "scale"
    check_companion(name, "weight", weight, main_name, main)
    return weight, "weight"


def check_scale_and_bias(name: str, x, matrix, scale, bias, parameterization, outputs: int) -> None:
    """Their shapes beside weights of ``matrix``'s shape with so many outputs."""
    scale_shape = {"layer": (1,), "neuron": (outputs,)}.get(parameterization, tuple(matrix.shape))
    if tuple(scale.shape) != scale_shape:
        raise ValueError(
            f"{name}: scale must be {scale_shape} for parameterization {parameterization!r}, got {tuple(scale.shape)}"
        )
    if bias is not None:
        check_companion(name, "bias", bias, "x", x)
        if tuple(bias.shape) != (outputs,):
            raise ValueError(f"{name}: bias must be ({outputs},), got {tuple(bias.shape)}")


# ---- float8 --------------------------------------------------------------------------------------------------------


def float8_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8, row scales fp32) of nonnegative ``values`` ``[rows, cols]``: their product is ``values``, rounded.

    A scale is 2^-126 or more, so it is a normal number; a row that is not finite becomes NaN, its scale too.
    """
    values = values.float()
    largest = values.amax(1) if values.shape[1] > 0 else values.new_zeros(values.shape[0])
    # 448 is 1.75 2^8, so the exponent is 8 less than the largest's, or 7 where that has a mantissa over 1.75, which
    # the sum carries into the bits of the exponent.
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    return (values / scale.unsqueeze(1)).to(FLOAT8), scale


def float8_product(x: torch.Tensor, operand: VarianceOperand) -> torch.Tensor:
    """x^2 (sigma^2)^T in x's dtype from float8 operands, in plain torch."""
    squares, scale = float8_rows(x.float().square())
    sigma2 = operand.sigma2.float() * operand.row_scale.unsqueeze(1)
    return ((squares.float() * scale.unsqueeze(1)) @ sigma2.t()).to(x.dtype)


def float8_missing(device: torch.device) -> str:
    """Why ``device`` does not multiply float8; empty if it does."""
    if device.type != "cuda":
        return f"a {device.type} device"
    if not torch.cuda.is_available():
        return "no GPU"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= FLOAT8_CAPABILITY else "compute capability {}.{}".format(*capability)


def check_float8_device(name: str, device: torch.device) -> None:
    if missing := float8_missing(device):
        needed = "a GPU of compute capability {}.{} or more".format(*FLOAT8_CAPABILITY)
        raise RuntimeError(f"{name}: float8_e4m3fn needs {needed}, got {missing}")


def check_float8(name: str, matrix: torch.Tensor) -> None:
    """Weights that torch._scaled_mm takes. The kernels look at the GPU itself: tracing may have none at hand."""
    check_float8_sizes(name, matrix.shape)
    if matrix.device.type != "cuda":
        check_float8_device(name, matrix.device)


def as_variance_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The ``variance_dtype`` that function ``name`` was given."""
    if not isinstance(dtype, torch.dtype | str | None) or dtype not in (None, FLOAT8, "float8_e4m3fn"):
        raise ValueError(f"{name}: variance_dtype must be None or 'float8_e4m3fn', got {dtype!r}")
    return None if dtype is None else FLOAT8


def float8_fits(shape) -> bool:
    return all(size % FLOAT8_MULTIPLE == 0 for size in shape)


def check_float8_sizes(name: str, shape) -> None:
    if not float8_fits(shape):
        raise ValueError(
            f"{name}: float8_e4m3fn needs weights whose sizes are multiples of {FLOAT8_MULTIPLE}, got {tuple(shape)}"
        )


# ---- lrt_variance_operand ------------------------------------------------------------------------------------------


def lrt_variance_operand_reference(weight, scale, parameterization, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma^2 ``[O, I]`` in ``dtype``, row scales fp32 ``[O]`` for float8 and ``[0]`` otherwise)."""
    matrix = scale if weight is None else weight
    wide = torch.promote_types(matrix.dtype, torch.float32)
    sigma2 = variance_operand(weight, scale, parameterization, wide)
    if dtype == FLOAT8:
        return float8_rows(sigma2)
    return sigma2.to(dtype).contiguous(), matrix.new_empty(0, dtype=torch.float32)


def _lrt_variance_operand_fake(weight, scale, parameterization, dtype):
    matrix = scale if weight is None else weight
    row_scale = matrix.new_empty(matrix.shape[0] if dtype == FLOAT8 else 0, dtype=torch.float32)
    return matrix.new_empty(matrix.shape, dtype=dtype), row_scale


define(
    "lrt_variance_operand(Tensor? weight, Tensor scale, str parameterization, ScalarType dtype) -> (Tensor, Tensor)",
    reference=lrt_variance_operand_reference,
    fake=_lrt_variance_operand_fake,
)


@torch.no_grad()
def lrt_variance_operand(
    weight: torch.Tensor | None, scale: torch.Tensor, *, parameterization: str, dtype: torch.dtype | str
) -> VarianceOperand:
    """sigma^2 of Gaussian weights, for ``lrt_linear(..., variance_operand=...)``. Not differentiable.

    Args:
        weight, scale, parameterization: as in :func:`lrt_linear`.
        dtype: that of x (float32 for float16 x), or "float8_e4m3fn" (or torch's).

    Returns:
        sigma^2 ``[O, I]`` in ``dtype``, without alpha for "layer" and "neuron", and for float8 the power of two
        ``[O]`` in float32 that multiplies each row.

    Raises:
        TypeError, ValueError: a dtype, device, shape or name is not as above, or a size of a float8 operand is no
            multiple of 16.
        RuntimeError: float8 on a device that does not multiply it.
    """
    name = "lrt_variance_operand"
    # Parameters are as beside an x of the narrower of their dtypes.
    main, main_name = (weight, "weight") if weight is not None else (scale, "scale")
    if isinstance(scale, torch.Tensor) and scale.dtype in HALF_DTYPES:
        main, main_name = scale, "scale"
    if not isinstance(main, torch.Tensor) or main.dtype not in LRT_DTYPES:
        found = main.dtype if isinstance(main, torch.Tensor) else type(main).__name__
        raise TypeError(f"{name}: {main_name} must be a tensor of one of the dtypes {LRT_DTYPES}, got {found}")
    matrix, matrix_name = check_kind(name, main, weight, scale, parameterization, main_name)
    if matrix.dim() != 2:
        raise ValueError(f"{name}: {matrix_name} must be [out_features, in_features], got {tuple(matrix.shape)}")
    check_scale_and_bias(name, matrix, matrix, scale, None, parameterization, matrix.shape[0])
    wanted = (torch.float64,) if matrix.dtype == torch.float64 else (torch.float32, torch.bfloat16, FLOAT8)
    dtype = FLOAT8 if dtype == "float8_e4m3fn" else dtype
    if dtype not in wanted:
        raise TypeError(f"{name}: dtype must be one of {wanted} beside {matrix_name} in {matrix.dtype}, got {dtype!r}")
    if dtype == FLOAT8:
        check_float8(name, matrix)
    sigma2, row_scale = torch.ops.losssurf_fast.lrt_variance_operand.default(weight, scale, parameterization, dtype)
    return VarianceOperand(sigma2, row_scale if dtype == FLOAT8 else None)
