"""Why a layer cannot become a stochastic one."""

from torch import nn
from torch.nn.parameter import is_lazy

from losssurf_fast.conversion.classes import CONVERTIBLE, TWINS
from losssurf_fast.nn.lrt import LRTLayer
from losssurf_fast.ops.lrt_sample import LRT_DTYPES

_COMPUTED = "is computed (parametrized, pruned or normalised)"


def holds_weights(module: nn.Module) -> bool:
    """Whether the module itself holds a weight matrix, so that the report has to mention it."""
    return isinstance(module, CONVERTIBLE) or _is_quantised(module) or bool(matrices(module))


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Its own parameters of two or more dimensions."""
    return [p for p in module.parameters(recurse=False) if not is_lazy(p) and p.dim() >= 2]


def why_left(module: nn.Module, parameterization: str) -> str | None:
    """Why the module stays as it is, None where it can become an LRT layer."""
    kind = type(module).__name__
    if isinstance(module, LRTLayer):
        return f"already an {kind} ({module.parameterization})"
    base = next((base for base in CONVERTIBLE if isinstance(module, base)), None)
    if base is None:
        what = "quantised, and " if _is_quantised(module) else ""
        return f"{kind}: {what}there is no stochastic layer for it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{kind}: its sizes are unknown until a first forward"
    own_class = type(module) if type(module) in TWINS else base
    names = TWINS[own_class].layer.gaussian_weights(module)
    weights = [module._parameters.get(name) for name in names]
    if not all(isinstance(weight, nn.Parameter) for weight in weights):
        return f"{kind}: its weight {_COMPUTED}"
    if any(name not in module._parameters for name in _biases(base)):
        return f"{kind}: its bias {_COMPUTED}"
    if any(hasattr(weight, "device_mesh") for weight in weights):  # a DTensor, whose import costs what few models need
        return f"{kind} is sharded already; convert the model before sharding it"
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"{kind} has a forward of its own"
    if type(module) not in TWINS:
        return f"{kind} is a subclass of nn.{base.__name__}, whose class and methods would be lost"
    if unknown := {weight.dtype for weight in weights} - set(LRT_DTYPES):
        return f"{kind}: there is no noise in {unknown.pop()}"
    if parameterization == "variance" and getattr(module, "max_norm", None) is not None:
        return f"{kind}: max_norm has no meaning for means of 0"
    return None


def _biases(base: type[nn.Module]) -> tuple[str, ...]:
    if base is nn.Embedding:
        return ()
    return ("in_proj_bias",) if base is nn.MultiheadAttention else ("bias",)


def _is_quantised(module: nn.Module) -> bool:
    """Whether it holds a packed weight, which is no parameter."""
    packed = type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized"))
    return packed and callable(getattr(module, "weight", None))
