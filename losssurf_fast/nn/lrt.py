"""What the layers with Gaussian weights share: their parameters, their schemes and ways to sample.

``ops/lrt.py`` has the formulas. Each layer is a subclass of the torch layer it replaces and of :class:`LRTLayer`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from losssurf_fast.nn.stochastic import StochasticLayer, named_stochastic_layers
from losssurf_fast.nn.variance_cache import VarianceCache
from losssurf_fast.nn.weight_space import Drawn, sample_output
from losssurf_fast.ops.gaussian_weights import log_sigma2_of
from losssurf_fast.ops.lrt_operand import PARAMETERIZATIONS
from losssurf_fast.ops.lrt_sample import HALF_DTYPES

INIT_LOG_ALPHA = -5.0  # that of Neklyudov et al., "Variance networks"


@dataclass(frozen=True)
class Posterior:
    """One tensor of Gaussian weights of a layer, which knows it as ``name``; ``weight`` is None for "variance"."""

    name: str
    weight: torch.Tensor | None
    scale: torch.Tensor
    parameterization: str
    spread: Callable[[torch.Tensor], torch.Tensor]  # a "neuron" scale [O] -> broadcastable to the weight
    tie: int = 0  # equal for weights that layers share: the id of the Parameter that holds their scale

    @property
    def shape(self) -> torch.Size:
        return (self.scale if self.weight is None else self.weight).shape

    def log_sigma2(self) -> torch.Tensor:
        """log of the variances, of the weight's shape, in the scale's dtype."""
        if self.parameterization in ("additive", "variance"):
            return self.scale
        return log_sigma2_of(self.weight, self.spread(self.scale) if self.parameterization == "neuron" else self.scale)


class LRTLayer(StochasticLayer):
    """Base of the layers whose weights are Gaussian; a subclass also derives from the torch layer it replaces.

    A subclass says which weights are Gaussian and how many outputs they have (:meth:`gaussian_weights`), along which
    dimension those are (:meth:`spread`), how it computes with given weights (:meth:`plain`) and how it draws by local
    reparameterization (:meth:`local`).
    ``nn/weight_space.py`` has the other ways to draw, which :attr:`sampling` chooses: "local", "weights", "flipout".
    """

    parameterization: str
    init_log_sigma2: float | None
    init_log_alpha: float | None
    sampling: str = "local"
    variance_dtype: torch.dtype | None = None  # of the variance GEMM where not x's; LRTLinear can have one
    variances: VarianceCache | None = None  # those that lsf.cached_variances has it keep
    drawn: Drawn | None = None  # the weights that lsf.sample_weights has it compute with, by their posteriors' names

    def become_stochastic(
        self,
        parameterization: str,
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
        scale: nn.Parameter | dict[str, nn.Parameter] | None = None,
    ) -> None:
        """Add ``scale`` (a new one if None) to what the torch layer has; a "variance" layer gives up its weight.

        A layer of several Gaussian weights takes their scales by the weights' names.
        """
        self.parameterization = parameterization
        self.init_log_sigma2, self.init_log_alpha = init_log_sigma2, init_log_alpha
        given = scale if isinstance(scale, dict) else {"weight": scale}
        if parameterization == "variance":  # whose weight's dtype nothing else keeps: scales are float32
            weight = getattr(self, next(iter(self.gaussian_weights(self))))
            self.register_buffer("like", weight.detach().new_empty(0), persistent=False)
        for name, outputs in self.gaussian_weights(self).items():
            weight, scale = getattr(self, name), given.get(name)
            if scale is None:
                start = initial_scale(weight, parameterization, init_log_sigma2, init_log_alpha, outputs)
                scale = nn.Parameter(start, requires_grad=weight.requires_grad)
            self.register_parameter(self.scale_name_of(name), scale)
            if parameterization == "variance":
                setattr(self, name, None)

    def reset_parameters(self) -> None:
        """Draw new initial values, as after ``to_empty`` of a layer made on the meta device."""
        if not hasattr(self, "parameterization"):  # called by the torch layer's own constructor
            self.reset_torch_parameters()
            return
        weightless = self.parameterization == "variance"
        gaussian = self.gaussian_weights(self)
        if weightless:  # the weights that a variance layer starts from
            for name in gaussian:
                setattr(self, name, nn.Parameter(torch.empty_like(getattr(self, self.scale_name_of(name)))))
        self.reset_torch_parameters()
        start = (self.parameterization, self.init_log_sigma2, self.init_log_alpha)
        for name, outputs in gaussian.items():
            with torch.no_grad():
                getattr(self, self.scale_name_of(name)).copy_(initial_scale(getattr(self, name), *start, outputs))
            if weightless:
                setattr(self, name, None)

    def reset_torch_parameters(self) -> None:
        """What the torch layer calls ``reset_parameters``."""
        super().reset_parameters()

    @staticmethod
    def gaussian_weights(layer: nn.Module) -> dict[str, int]:
        """Names of the weights that are Gaussian -> outputs, the length of a "neuron" ``log_alpha``.

        ``layer`` is one of this class, or of the torch class that it replaces.
        """
        raise NotImplementedError

    @property
    def scale_name(self) -> str:
        """Name of the parameter that holds the noise: "log_alpha" or "log_sigma2"."""
        return "log_sigma2" if self.parameterization in ("additive", "variance") else "log_alpha"

    def scale_name_of(self, weight_name: str) -> str:
        """:attr:`scale_name` of one weight of several: "in_proj_log_alpha" for "in_proj_weight"."""
        return weight_name.removesuffix("weight") + self.scale_name

    @property
    def scale(self) -> nn.Parameter:
        """``log_alpha`` or ``log_sigma2``, as :attr:`scale_name` says."""
        return getattr(self, self.scale_name)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale ``[O]``, broadcastable to the weight ``[O, ...]``."""
        return scale.view(-1, *[1] * (len(self.posteriors()[0].shape) - 1))

    def posteriors(self) -> list[Posterior]:
        """The Gaussian weights of this layer, those of its children excluded."""
        found = []
        for name in self.gaussian_weights(self):
            scale_name = self.scale_name_of(name)
            scale, tie = getattr(self, scale_name), id(self._held(scale_name))
            found.append(Posterior(name, getattr(self, name), scale, self.parameterization, self.spread, tie))
        return found

    def _held(self, name: str) -> nn.Parameter:
        """The Parameter behind an attribute, also where that is parametrized."""
        if name in self._parameters:
            return self._parameters[name]
        return self.parametrizations[name].original if is_parametrized(self, name) else getattr(self, name)

    def forward(self, input: torch.Tensor, seed: int | torch.Tensor | None = None) -> torch.Tensor:
        """As the torch layer's forward.

        ``seed`` (int or 0-d int64 tensor) fixes the noise; by default one is drawn from torch's default generator.
        Pass it through ``torch.utils.checkpoint`` where that is told not to preserve the generator's state. Inside
        ``with lsf.sample_weights(model):`` the weights are drawn already and no other noise is.
        """
        return self.respond(input, seed)

    def respond(self, input: torch.Tensor, seed: int | torch.Tensor | None, **geometry) -> torch.Tensor:
        """A draw or the mean; ``geometry`` is what a layer's own forward tells its :meth:`local` and :meth:`plain`."""
        if self.drawn is not None:
            return self.plain(input, self.drawn["weight"], **geometry)
        if self.draws_noise:
            return sample_output(self, input, seed, **geometry)
        return self.plain(input, self.weight, **geometry)

    def plain(self, input: torch.Tensor, weight: torch.Tensor | None, with_bias: bool = True) -> torch.Tensor:
        """The torch layer's output with ``weight``, which has the weight's shape; None stands for zeros."""
        raise NotImplementedError

    def local(self, input: torch.Tensor, seed: int | torch.Tensor | None) -> torch.Tensor:
        """A draw of the output by local reparameterization."""
        raise NotImplementedError

    def kl(self, prior: str = "log_uniform", *, exact: bool = True, prior_std: float = 1.0) -> torch.Tensor:
        """KL divergence of this layer's weights from their prior, a scalar; see ``lsf.kl_divergence``."""
        from losssurf_fast.objective import kl_divergence  # which needs this module

        return kl_divergence(self, prior, exact=exact, prior_std=prior_std)

    def extra_repr(self) -> str:
        own = [f"parameterization={self.parameterization!r}"]
        if self.sampling != "local":
            own.append(f"sampling={self.sampling!r}")
        return ", ".join([*filter(None, [super().extra_repr()]), *own])

    def _apply(self, fn, recurse=True):
        scales = [self._held(self.scale_name_of(name)) for name in self.gaussian_weights(self)]
        kept = {id(t) for scale in scales for t in (scale, scale.grad)}

        def keep_wide(tensor):
            out = fn(tensor)
            if id(tensor) in kept and out.dtype in HALF_DTYPES:
                return tensor.to(device=out.device, dtype=torch.float32)
            return out

        return super()._apply(keep_wide, recurse)


def lrt_layers(model: nn.Module, caller: str) -> list[tuple[str, LRTLayer]]:
    """The layers with Gaussian weights and their names, as ``named_modules`` has them; without any, ValueError."""
    found = [named for named in named_stochastic_layers(model, caller) if isinstance(named[1], LRTLayer)]
    if not found:
        raise ValueError(f"{caller}: {type(model).__name__} has no stochastic layers; convert it with lsf.to_lrt first")
    return found


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
    weight: torch.Tensor,
    parameterization: str,
    init_log_sigma2: float | None,
    init_log_alpha: float | None,
    outputs: int,
) -> torch.Tensor:
    """First value of ``log_alpha`` or ``log_sigma2`` for mean weights, in float32 (float64 for float64)."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    log_alpha = INIT_LOG_ALPHA if init_log_alpha is None else float(init_log_alpha)
    shape = {"layer": (1,), "neuron": (outputs,)}.get(parameterization, weight.shape)
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
