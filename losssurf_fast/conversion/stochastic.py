"""Turning the layers of an existing model into stochastic ones, in place."""

import fnmatch
import logging
from collections.abc import Iterable, Sequence

from torch import nn

from losssurf_fast.conversion.classes import CONVERTIBLE, TWINS, turn_off_fast_paths
from losssurf_fast.conversion.reasons import holds_weights, why_left
from losssurf_fast.conversion.report import ConversionReport, add_report
from losssurf_fast.conversion.sharing import conflicts, sharing
from losssurf_fast.nn.lrt import LRTLayer, check_parameterization, initial_scale
from losssurf_fast.nn.stochastic import StochasticLayer

logger = logging.getLogger("losssurf_fast")
_NOT_SELECTED = "not selected by include and exclude"


def to_lrt(
    model: nn.Module,
    parameterization: str = "additive",
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init_log_sigma2: float | None = None,
    init_log_alpha: float | None = None,
) -> nn.Module:
    """Turn the layers of ``model`` into stochastic ones (``lsf.nn.LRT...``), in place, and return the model.

    ``nn.Linear``, ``nn.Conv1d`` to ``nn.ConvTranspose3d`` and ``nn.MultiheadAttention`` are converted; an
    ``nn.Embedding`` only where ``include`` matches it (``include="*"`` converts everything) or where it shares its
    weight with a layer that is converted, such as a language model's output.

    The modules, their Parameter objects, names, hooks, dtypes, devices and flags stay; each layer gains
    ``log_alpha`` or ``log_sigma2`` (trainable where its weight is), so make the optimizer afterwards. Layers that
    share a weight share that too. A "variance" layer starts with log_sigma2 = log(weight^2) and gives up its weight,
    so layers that share one become "variance" in one call or not at all.

    Layers that cannot be converted keep working without noise; they are logged as a warning and listed with the
    reason by :func:`conversion_report`: subclasses of these classes, parametrized or pruned layers, recurrent,
    quantised and lazy ones, and other modules with weight matrices. The fast path of ``nn.TransformerEncoderLayer``
    reads its layers' weights past their forward, so it is turned off where one of them is converted; it is found from
    ``model`` downwards, so convert the encoder layer, by ``include``, and not a child of it alone.
    :func:`from_lrt` is the way back.

    Args:
        model: any module, a bare layer included.
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
    weighted = {name: module for name, module in model.named_modules() if holds_weights(module)}
    known = [name for name, module in weighted.items() if isinstance(module, CONVERTIBLE)]
    for pattern in (*(include or ()), *(exclude or ())):
        if not fnmatch.filter(known, pattern):
            raise ValueError(
                f"to_lrt: pattern {pattern!r} matches no layer; the model has {', '.join(known) or 'none'}"
            )

    reasons = {name: _reason(name, m, parameterization, include, exclude) for name, m in weighted.items()}
    _follow(weighted, reasons, parameterization, exclude)
    for names in sharing(weighted):
        reasons.update(conflicts(weighted, names, reasons, parameterization))
    _settle_attention(weighted, reasons)
    chosen = {name: weighted[name] for name, reason in reasons.items() if reason is None}
    report = ConversionReport(
        dict.fromkeys(chosen, parameterization), {name: reason for name, reason in reasons.items() if reason}
    )
    if not chosen:
        raise ValueError(f"to_lrt: the model has no layer to convert; {report}")
    scales = _scales(model, chosen, parameterization, init_log_sigma2, init_log_alpha)  # all that may fail
    for name, module in chosen.items():
        module.__class__ = TWINS[type(module)].layer
        module.become_stochastic(parameterization, init_log_sigma2, init_log_alpha, scales[name])
    turn_off_fast_paths(model)

    problems = [
        f"{name or type(weighted[name]).__name__}: {reason}"
        for name, reason in report.left.items()
        if reason not in (_NOT_SELECTED, _EMBEDDING) and not isinstance(weighted[name], StochasticLayer)
    ]
    add_report(model, report)
    logger.info("to_lrt: %s", report)
    if problems:
        logger.warning("to_lrt: these stay without noise:\n  %s", "\n  ".join(problems))
    return model


_EMBEDDING = "an nn.Embedding is converted where include matches it, or with a layer that shares its weight"


def _reason(name: str, module: nn.Module, parameterization: str, include, exclude) -> str | None:
    """Why the module stays as it is, as far as it alone decides; None where it may be converted."""
    if isinstance(module, CONVERTIBLE) and not isinstance(module, LRTLayer):
        if not _selected(name, include, exclude):
            return _NOT_SELECTED
        if include is None and isinstance(module, nn.Embedding):
            return why_left(module, parameterization) or _EMBEDDING
    return why_left(module, parameterization)


def _follow(weighted, reasons: dict[str, str | None], parameterization: str, exclude) -> None:
    """Let embeddings follow the layers they share a weight with, unless ``exclude`` names them."""
    for names in sharing(weighted):
        if any(reasons[name] is None for name in names):
            for name in names:
                module = weighted[name]
                if type(module) is nn.Embedding and reasons[name] is not None and not _matches(name, exclude):
                    reasons[name] = why_left(module, parameterization)


def _settle_attention(weighted, reasons: dict[str, str | None]) -> None:
    """``out_proj`` of an ``nn.MultiheadAttention`` that stays must stay too: it is read, not called."""
    for attention, module in weighted.items():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, LRTLayer) and reasons[attention]:
            name = next((name for name, other in weighted.items() if other is module.out_proj), None)
            if name is not None and reasons[name] is None:
                reasons[name] = "nn.MultiheadAttention reads its weight without calling it, noise would be lost"


def _scales(model, chosen, parameterization, init_log_sigma2, init_log_alpha) -> dict[str, dict[str, nn.Parameter]]:
    """The noise's parameters of each chosen layer by weight name; layers that share a weight share them."""
    known = {}  # id of a weight -> its scale, also of layers that an earlier call converted
    for layer in model.modules():
        if isinstance(layer, LRTLayer) and layer.parameterization == parameterization:
            known.update({id(p.weight): p.scale for p in layer.posteriors() if p.weight is not None})
    scales: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in chosen.items():
        scales[name] = {}
        for weight_name, outputs in TWINS[type(module)].layer.gaussian_weights(module).items():
            weight = getattr(module, weight_name)
            if id(weight) not in known:
                start = initial_scale(weight, parameterization, init_log_sigma2, init_log_alpha, outputs)
                known[id(weight)] = nn.Parameter(start, requires_grad=weight.requires_grad)
            scales[name][weight_name] = known[id(weight)]
    return scales


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
    return (include is None or _matches(name, include)) and not _matches(name, exclude)


def _matches(name: str, patterns) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ())
