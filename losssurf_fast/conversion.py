"""Turning the linear layers of an existing model into stochastic ones, in place."""

import dataclasses
import fnmatch
import logging
from collections.abc import Iterable, Sequence

from torch import nn

from losssurf_fast.nn.lrt import LRTLayer, check_parameterization, initial_scale
from losssurf_fast.nn.lrt_conv import LRTConv1d, LRTConv2d, LRTConv3d
from losssurf_fast.nn.lrt_linear import LRTLinear
from losssurf_fast.nn.stochastic import StochasticLayer, fast_path_skips_noise
from losssurf_fast.ops.lrt import LRT_DTYPES

logger = logging.getLogger("losssurf_fast")
_REPORT = "_losssurf_conversion_report"
_STOCHASTIC = {nn.Linear: LRTLinear, nn.Conv1d: LRTConv1d, nn.Conv2d: LRTConv2d, nn.Conv3d: LRTConv3d}


@dataclasses.dataclass
class ConversionReport:
    """What ``to_lrt`` did: ``converted`` maps names to parameterizations, ``left`` maps names to reasons."""

    converted: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} layers, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.converted.items()]
        lines += [f"  {name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def to_lrt(
    model: nn.Module,
    parameterization: str = "additive",
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init_log_sigma2: float | None = None,
    init_log_alpha: float | None = None,
) -> nn.Module:
    """Turn the ``nn.Linear`` layers of ``model`` into :class:`lsf.nn.LRTLinear`, in place, and return the model.

    The modules, their Parameter objects, names, hooks, dtypes, devices and flags stay; each layer gains
    ``log_alpha`` or ``log_sigma2`` (trainable where its weight is), so make the optimizer afterwards. Layers that
    share a weight share that too. A "variance" layer starts with log_sigma2 = log(weight^2) and gives up its weight,
    so layers that share one have to become "variance" in one call.

    Layers that cannot be converted keep working without noise; they are logged as a warning and listed with the
    reason by :func:`conversion_report`: subclasses of ``nn.Linear``, parametrized or pruned ones, ``out_proj`` of
    ``nn.MultiheadAttention`` (read without being called), convolutions, and other modules with weight matrices. The
    fast path of ``nn.TransformerEncoderLayer`` reads its layers' weights past their forward, so it is turned off
    where one of them is converted.

    Args:
        model: any module, a bare ``nn.Linear`` included.
        parameterization: "layer", "neuron", "weight", "additive" or "variance".
        include, exclude: shell patterns of layer names, such as ``"encoder.*"``: only what matches ``include`` and not
            ``exclude`` is converted.
        init_log_sigma2, init_log_alpha: first values, as for :class:`lsf.nn.LRTLinear`.

    Raises:
        TypeError, ValueError: bad arguments, a pattern that matches no layer, or no layer to convert; the model is
            as it was.
    """
    check_parameterization("to_lrt", parameterization, init_log_sigma2, init_log_alpha)
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_lrt: model must be a torch.nn.Module, got {type(model).__name__}")
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    weighted = {name: module for name, module in model.named_modules() if _has_matrix(module)}
    known = [name for name, module in weighted.items() if isinstance(module, tuple(_STOCHASTIC))]
    for pattern in (*(include or ()), *(exclude or ())):
        if not fnmatch.filter(known, pattern):
            raise ValueError(
                f"to_lrt: pattern {pattern!r} matches no layer; the model has {', '.join(known) or 'none'}"
            )

    attention_outputs = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    report, chosen, problems = ConversionReport(), {}, []
    for name, module in weighted.items():
        if isinstance(module, tuple(_STOCHASTIC)) and not _selected(name, include, exclude):
            report.left[name] = "not selected by include and exclude"
        elif reason := _why_left(module, attention_outputs):
            report.left[name] = reason
            if not isinstance(module, StochasticLayer):
                problems.append(f"{name or type(module).__name__}: {reason}")
        else:
            report.converted[name] = parameterization
            chosen[name] = module
    if not chosen:
        raise ValueError(f"to_lrt: the model has no layer to convert; {report}")

    # id of a weight -> the scale of the layers that share it, also of those that an earlier call converted
    earlier = [m for m in model.modules() if isinstance(m, LRTLayer) and m.parameterization == parameterization]
    scales = {id(layer.weight): layer.scale for layer in earlier if layer.weight is not None}
    for module in chosen.values():  # all that may fail, before a layer changes
        weight = module.weight
        if id(weight) not in scales:
            start = initial_scale(weight, parameterization, init_log_sigma2, init_log_alpha, _outputs(module))
            scales[id(weight)] = nn.Parameter(start, requires_grad=weight.requires_grad)
    for module in chosen.values():
        module.__class__ = _STOCHASTIC[type(module)]
        module.become_stochastic(parameterization, init_log_sigma2, init_log_alpha, scales[id(module.weight)])
    _turn_off_fast_paths(model)

    before = getattr(model, _REPORT, None)
    if before is not None:  # what an earlier call converted stays in the report
        report.converted = {**before.converted, **report.converted}
        report.left = {name: why for name, why in report.left.items() if name not in report.converted}
    setattr(model, _REPORT, report)
    logger.info("to_lrt: %s", report)
    if problems:
        logger.warning("to_lrt: these stay without noise:\n  %s", "\n  ".join(problems))
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What ``to_lrt`` converted in ``model`` (or in the model it wraps) and what it left, with the reasons.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``to_lrt`` was never called on this model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"conversion_report: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        report = getattr(module, _REPORT, None)
        if report is not None:
            return report
    raise ValueError(f"conversion_report: to_lrt was not called on this {type(model).__name__}")


def _patterns(argument: str, patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise TypeError(f"to_lrt: {argument} must be a pattern or several, got {type(patterns).__name__}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"to_lrt: {argument} must hold names or patterns, got {type(pattern).__name__}")
    return patterns


def _selected(name: str, include, exclude) -> bool:
    matches = lambda patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return (include is None or matches(include)) and not (exclude is not None and matches(exclude))


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module itself holds a weight matrix, so that the report has to mention it."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return True
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _why_left(module: nn.Module, attention_outputs: set[int]) -> str | None:
    """Why the module stays as it is, None where it can become an LRT layer."""
    kind = type(module).__name__
    if isinstance(module, LRTLayer):
        return f"already an {kind} ({module.parameterization})"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention: its projections are no nn.Linear"
    base = next((base for base in _STOCHASTIC if isinstance(module, base)), None)
    if base is None:
        return f"{kind}: there is no stochastic layer for it"
    if id(module) in attention_outputs:
        return "nn.MultiheadAttention reads its weight without calling it, noise would be lost"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{kind}: its sizes are unknown until a first forward"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"{kind}: its weight is computed (parametrized, pruned or normalised)"
    if "bias" not in module._parameters:
        return f"{kind}: its bias is computed (parametrized, pruned or normalised)"
    if hasattr(module.weight, "device_mesh"):  # a DTensor, whose import costs what few models need
        return f"{kind} is sharded already; convert the model before sharding it"
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"{kind} has a forward of its own"
    if type(module) is not base:
        return f"{kind} is a subclass of nn.{base.__name__}, whose class and methods would be lost"
    if module.weight.dtype not in LRT_DTYPES:
        return f"{kind}: there is no noise in {module.weight.dtype}"
    return None


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _turn_off_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        if fast_path_skips_noise(module):
            module.activation_relu_or_gelu = 0  # only the fast path asks for it
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, StochasticLayer) for m in module.modules()):
            module.use_nested_tensor = False  # nested tensors are for the layers' fast path
