"""The linear layer with Gaussian weights, trained by local reparameterization (``ops/lrt.py`` has the formulas)."""

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast._library import in_autocast_dtype
from losssurf_fast.nn.lrt import LRTLayer, check_parameterization
from losssurf_fast.nn.variance_cache import cached_operand
from losssurf_fast.nn.weight_space import check_sampling
from losssurf_fast.ops.lrt import check_activations, check_parameters
from losssurf_fast.ops.lrt_operand import as_variance_dtype, check_float8_sizes
from losssurf_fast.ops.lrt_sample import HALF_DTYPES


class LRTLinear(LRTLayer, nn.Linear):
    """``nn.Linear`` whose weights are Gaussian: a drop-in that samples its outputs instead of its weights.

    Draws noise in training and computes with the mean weights in evaluation, unless ``lsf.prediction`` says otherwise.
    The mean of a "variance" layer is its bias, whatever the input.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; dtype float64, float32, bfloat16, float16.
        parameterization: "layer", "neuron", "weight" (``log_alpha`` [1], [O] or [O, I]), "additive" or "variance"
            (``log_sigma2`` [O, I]; ``weight`` is None for "variance").
        init_log_alpha: first value of log(sigma^2 / weight^2), -5 by default. For "additive" it is taken over the mean
            of weight^2, so that all parameterizations start with about the same noise. "variance" has none.
        init_log_sigma2: first value of log_sigma2 for "additive" and "variance"; by default the former follows
            ``init_log_alpha`` and the latter is the log of the squared weights that ``nn.Linear`` would start with.
        sampling: how it draws: "local", of the outputs, "weights", one draw of the weights for the whole batch, or
            "flipout", that with random signs for each sample (its first dimension).
        variance_dtype: "float8_e4m3fn" (or torch's) lets local sampling multiply its variances in float8: sizes that
            are multiples of 16, bfloat16 activations and a GPU of compute capability 8.9 or more, else the forward
            raises. ``ops/lrt_operand.py`` has the error of the standard deviations, 0.1 to 1 % as a rule; means,
            evaluation and the formulas of the gradients stay.

    ``log_alpha`` and ``log_sigma2`` are float32 also in half-precision models (float64 in float64 ones) and stay so
    under ``.half()`` and ``.to(dtype)``. A plain ``nn.Linear``'s state_dict loads with ``strict=False``; "variance"
    takes only the bias from it, so load the plain model first and convert it with ``lsf.to_lrt``.

    Raises:
        TypeError: an initial value is no real number.
        ValueError: unknown parameterization, sampling or variance_dtype, sizes that float8 does not take, or an
            initial value that it does not have or that is not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        parameterization: str = "additive",
        device=None,
        dtype=None,
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
        sampling: str = "local",
        variance_dtype: torch.dtype | str | None = None,
    ) -> None:
        check_sampling("LRTLinear", sampling)
        variance_dtype = as_variance_dtype("LRTLinear", variance_dtype)
        if variance_dtype is not None:
            check_float8_sizes("LRTLinear", (out_features, in_features))
        check_parameterization("LRTLinear", parameterization, init_log_sigma2, init_log_alpha)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)
        self.sampling, self.variance_dtype = sampling, variance_dtype

    @staticmethod
    def gaussian_weights(layer: nn.Module) -> dict[str, int]:
        return {"weight": layer.out_features}

    def local(self, input: torch.Tensor, seed: int | torch.Tensor | None) -> torch.Tensor:
        weight, scale = self.weight, self.scale
        return ops.lrt_linear(
            input, weight, scale, self.bias, parameterization=self.parameterization, seed=seed,
            variance_dtype=self.variance_dtype,
            variance_operand=cached_operand(self, "weight", (weight, scale), input, weight, scale),
        )  # fmt: skip

    def extra_repr(self) -> str:
        own = [] if self.variance_dtype is None else [f"variance_dtype={self.variance_dtype}"]
        return ", ".join([super().extra_repr(), *own])

    def plain(self, input: torch.Tensor, weight: torch.Tensor | None, with_bias: bool = True) -> torch.Tensor:
        return linear_mean(input, weight, self.scale, self.bias if with_bias else None)


def linear_mean(
    input: torch.Tensor, weight: torch.Tensor | None, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``F.linear`` with the checks of ``lrt_linear``; where ``weight`` is None, ``scale`` has its shape."""
    check_activations(input)
    if weight is not None:
        return F.linear(input, *in_dtype_of(input, weight, bias))
    input = in_autocast_dtype(input)
    check_parameters(input, None, scale, bias, "variance")  # nothing else would complain
    out = input.new_zeros(*input.shape[:-1], scale.shape[0])
    return out if bias is None else out + bias.to(input.dtype)


def in_dtype_of(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Parameters for the library: float32 ones beside half-precision activations, as in lrt_linear, are cast."""
    if input.dtype not in HALF_DTYPES:
        return weight, bias
    return weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
