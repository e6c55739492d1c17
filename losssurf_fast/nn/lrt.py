"""Layers with Gaussian weights, trained by the local reparameterization trick (``ops/lrt.py`` has the formulas)."""

import math
from numbers import Real

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast.nn.stochastic import StochasticLayer
from losssurf_fast.ops.lrt import PARAMETERIZATIONS, check_activations, check_parameters

INIT_LOG_ALPHA = -5.0  # that of Neklyudov et al., "Variance networks"
_HALF = (torch.bfloat16, torch.float16)


class LRTLinear(StochasticLayer, nn.Linear):
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

    ``log_alpha`` and ``log_sigma2`` are float32 also in half-precision models (float64 in float64 ones) and stay so
    under ``.half()`` and ``.to(dtype)``. A plain ``nn.Linear``'s state_dict loads with ``strict=False``; "variance"
    takes only the bias from it, so load the plain model first and convert it with ``lsf.to_lrt``.

    Raises:
        TypeError: an initial value is no real number.
        ValueError: unknown parameterization, or an initial value that it does not have or that is not finite.
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
    ) -> None:
        check_parameterization("LRTLinear", parameterization, init_log_sigma2, init_log_alpha)
        nn.Module.__init__(self)  # nn.Linear's own would insist on a weight
        self.in_features, self.out_features = in_features, out_features
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **factory)) if bias else None)
        nn.Linear.reset_parameters(self)
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)

    def become_stochastic(
        self,
        parameterization: str,
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
        scale: nn.Parameter | None = None,
    ) -> None:
        """Add ``scale`` (a new one if None) to what nn.Linear has; a "variance" layer gives up its weight for it."""
        self.parameterization = parameterization
        self.init_log_sigma2, self.init_log_alpha = init_log_sigma2, init_log_alpha
        if scale is None:
            start = initial_scale(self.weight, parameterization, init_log_sigma2, init_log_alpha)
            scale = nn.Parameter(start, requires_grad=self.weight.requires_grad)
        self.register_parameter(self.scale_name, scale)
        if parameterization == "variance":
            self.weight = None

    def reset_parameters(self) -> None:
        """Draw new initial values, as after ``to_empty`` of a layer made on the meta device."""
        weight = self.weight
        if weight is None:  # the weight that a variance layer starts from
            weight = torch.empty_like(self.scale)
        with torch.no_grad():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
                nn.init.uniform_(self.bias, -bound, bound)
            self.scale.copy_(initial_scale(weight, self.parameterization, self.init_log_sigma2, self.init_log_alpha))

    @property
    def scale_name(self) -> str:
        """Name of the parameter that holds the noise: "log_alpha" or "log_sigma2"."""
        return "log_sigma2" if self.parameterization in ("additive", "variance") else "log_alpha"

    @property
    def scale(self) -> nn.Parameter:
        """``log_alpha`` or ``log_sigma2``, as :attr:`scale_name` says."""
        return getattr(self, self.scale_name)

    def forward(self, input: torch.Tensor, seed: int | torch.Tensor | None = None) -> torch.Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``.

        ``seed`` (int or 0-d int64 tensor) fixes the noise; by default one is drawn from torch's default generator.
        Pass it through ``torch.utils.checkpoint`` where that is told not to preserve the generator's state.
        """
        if self.draws_noise:
            return ops.lrt_linear(
                input, self.weight, self.scale, self.bias, parameterization=self.parameterization, seed=seed
            )
        return self._mean(input)

    def _mean(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        check_activations(input)
        if weight is None:
            return self._mean_without_weight(input)
        if input.dtype in _HALF:  # float32 parameters beside half-precision activations, as in lrt_linear
            weight = weight.to(input.dtype)
            bias = bias if bias is None else bias.to(input.dtype)
        return F.linear(input, weight, bias)

    def _mean_without_weight(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        check_parameters(input, None, self.scale, self.bias, self.parameterization)  # nothing else would complain
        out = input.new_zeros(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(input.dtype)

    def kl(self, prior: str = "log_uniform", *, exact: bool = True, prior_std: float = 1.0) -> torch.Tensor:
        """KL divergence of this layer's weights from their prior, a scalar; see ``lsf.kl_divergence``."""
        from losssurf_fast.objective import kl_divergence  # which needs this module

        return kl_divergence(self, prior, exact=exact, prior_std=prior_std)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, parameterization={self.parameterization!r}"

    def _apply(self, fn, recurse=True):
        scale = self._parameters.get(self.scale_name)  # None where it is parametrized
        kept = set() if scale is None else {id(scale), id(scale.grad)}

        def keep_wide(tensor):
            out = fn(tensor)
            if id(tensor) in kept and out.dtype in _HALF:
                return tensor.to(device=out.device, dtype=torch.float32)
            return out

        return super()._apply(keep_wide, recurse)


def check_parameterization(
    caller: str, parameterization: str, init_log_sigma2: float | None, init_log_alpha: float | None
) -> None:
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"{caller}: parameterization must be one of {PARAMETERIZATIONS}, got {parameterization!r}")
    if init_log_sigma2 is not None and parameterization not in ("additive", "variance"):
        raise ValueError(
            f"{caller}: init_log_sigma2 is for 'additive' and 'variance'; {parameterization!r} has log_alpha, "
            "so give init_log_alpha"
        )
    if init_log_alpha is not None and parameterization == "variance":
        raise ValueError(f"{caller}: init_log_alpha has no meaning for 'variance'; give init_log_sigma2")
    if init_log_sigma2 is not None and init_log_alpha is not None:
        raise ValueError(f"{caller}: give init_log_sigma2 or init_log_alpha, not both")
    for name, value in (("init_log_sigma2", init_log_sigma2), ("init_log_alpha", init_log_alpha)):
        if value is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{caller}: {name} must be a real number, got {type(value).__name__}")
        if not abs(value) <= torch.finfo(torch.float32).max:  # NaN neither
            raise ValueError(f"{caller}: {name} must be a finite float32 number, got {value}")


@torch.no_grad()
def initial_scale(
    weight: torch.Tensor, parameterization: str, init_log_sigma2: float | None, init_log_alpha: float | None
) -> torch.Tensor:
    """First value of ``log_alpha`` or ``log_sigma2`` for mean weights ``[O, I]``, in float32 (float64 for float64)."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    log_alpha = INIT_LOG_ALPHA if init_log_alpha is None else float(init_log_alpha)
    shape = {"layer": (1,), "neuron": weight.shape[:1]}.get(parameterization, weight.shape)
    if parameterization in ("layer", "neuron", "weight"):
        return wide.new_full(shape, log_alpha)
    if init_log_sigma2 is not None:
        return wide.new_full(shape, float(init_log_sigma2))
    square = wide.square()
    if parameterization == "additive":
        square = square.mean().expand(shape)
        return square.clamp(min=_SMALLEST_SQUARE).log() + log_alpha
    return square.clamp(min=_SMALLEST_SQUARE).log()


_SMALLEST_SQUARE = 1e-12  # of a weight: a weight of zero starts with little noise instead of none for ever
