"""Running averages of weights, in place, for a whole model's list of tensors in one call.

Per element, with P tensors in a list::

    lerp_   average <- average + weight (value - average)          SWA with weight = 1 / (n + 1)
    ema_    average <- decay average + (1 - decay) value           = lerp_ with weight = 1 - decay

Sources: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018 (SWA); Polyak
and Juditsky, 1992 (averaging of iterates).

Numerics: in fp32 whatever the dtypes, in fp64 where an average or a value is fp64; an average may be wider than its
values, and should be: in bf16 an average of a thousand weights is 20 % off, and an average with decay 0.9999 never
moves. The formula is ``torch.lerp``'s, one fma from whichever end is nearer, so that weight = 1 copies the value and
every backend returns the same bits::

    average + weight (value - average)           where |weight| < 1/2
    value + (weight - 1) (value - average)       elsewhere

Floor per element and average: the average is read and written, the value is read once for all averages; 12 bytes in
fp32, 10 for an fp32 average of bf16 values. Gradients do not flow; ``_version`` of every average goes up.
"""

from collections.abc import Sequence

import torch

from losssurf_fast._library import composite_needed, define, explain_missing
from losssurf_fast.ops.noise import fma

AVERAGING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NO_CUDA = "this build has no CUDA C++ kernels"

# ---- definition -----------------------------------------------------------------------------------------------------


def lerp_reference(averages, values, weight):
    _check_lists("lerp_", averages, values)
    for average, value in zip(averages, values, strict=True):
        wide = torch.promote_types(torch.promote_types(average.dtype, value.dtype), torch.float32)
        a, v = average.to(wide), value.to(wide)
        average.copy_(fma(v - a, weight, a) if abs(weight) < 0.5 else fma(v - a, weight - 1, v))


def ema_reference(averages, values, decays):
    """``averages`` holds the P tensors of the first decay, then those of the second, and so on."""
    _check_lists("ema_", averages, values, len(decays))
    for k, decay in enumerate(decays):
        lerp_reference(averages[k * len(values) : (k + 1) * len(values)], values, 1 - decay)


def _check_lists(name: str, averages, values, copies: int = 1) -> None:
    """Refuse what the kernels cannot average. The C++ kernels check the same, in the same words."""
    if len(averages) != copies * len(values):
        wanted = f"{len(values)}" if copies == 1 else f"{copies} times {len(values)}"
        raise ValueError(f"{name}: averages must hold {wanted} tensors like values, got {len(averages)}")
    for i, average in enumerate(averages):
        value = values[i % len(values)]
        for label, t in (("averages", average), ("values", value)):
            if t.dtype not in AVERAGING_DTYPES:
                raise TypeError(f"{name}: {label}[{i}] must have a floating dtype of {AVERAGING_DTYPES}, got {t.dtype}")
        if average.shape != value.shape:
            raise ValueError(
                f"{name}: averages[{i}] must have the value's shape {tuple(value.shape)}, got {tuple(average.shape)}"
            )
        if average.device != value.device:
            raise ValueError(f"{name}: averages[{i}] must be on the value's {value.device}, got {average.device}")
    refuse_shared(name, averages=averages)


def refuse_shared(name: str, **lists) -> None:
    """Refuse a tensor that is expanded, or twice in the lists. (The C++ kernels see other shared memory, too.)"""
    seen = {}
    for label, tensors in lists.items():
        for i, t in enumerate(tensors):
            if t.numel() == 0:
                continue
            if torch._debug_has_internal_overlap(t) == 1:
                raise ValueError(
                    f"{name}: {label}[{i}] must not be expanded, several of its elements are one in memory"
                )
            if id(t) in seen:
                raise ValueError(f"{name}: {seen[id(t)]} and {label}[{i}] must not share memory")
            seen[id(t)] = f"{label}[{i}]"


# ---- operators ------------------------------------------------------------------------------------------------------

define(
    "lerp_(Tensor(a!)[] averages, Tensor[] values, float weight) -> ()",
    reference=lerp_reference,
    fake=lambda averages, values, weight: _check_lists("lerp_", averages, values),
)
define(
    "ema_(Tensor(a!)[] averages, Tensor[] values, float[] decays) -> ()",
    reference=ema_reference,
    fake=lambda averages, values, decays: _check_lists("ema_", averages, values, len(decays)),
)
explain_missing("cuda", NO_CUDA, "lerp_", "ema_")  # where it has, this is not asked

# ---- public functions -----------------------------------------------------------------------------------------------


def as_tensors(name: str, argument: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``tensors`` as a list; ``name`` is the operator that was called."""
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: {argument} must be a sequence of tensors, got {type(tensors).__name__}")
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: {argument}[{i}] must be a tensor, got {type(t).__name__}")
        if not torch.compiler.is_compiling() and t.layout != torch.strided:
            raise TypeError(f"{name}: {argument}[{i}] must be a dense tensor, got one of layout {t.layout}")
    return list(tensors)


def refuse_leaves(name: str, argument: str, tensors: list[torch.Tensor]) -> None:
    """As torch does for in-place operators: no leaf that requires grad where gradients are recorded."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{name}: {argument} are changed in place and must not require grad; call it in no_grad()")


def call_in_place(reference, op, changed: list[torch.Tensor], *arguments) -> None:
    """Call an operator that changes the tensors ``changed``; autograd learns of it by their versions."""
    with torch.no_grad():
        if composite_needed():
            reference(*arguments)
        else:
            op(*arguments)
            torch.autograd.graph.increment_version(changed)


def lerp_(averages: Sequence[torch.Tensor], values: Sequence[torch.Tensor], weight: float) -> None:
    """``average += weight * (value - average)`` for every pair, in place and in one pass.

    Equivalent to ``torch._foreach_lerp_(averages, values, weight)``, but the average may be of a wider dtype than the
    value. With ``weight = 1 / (n + 1)`` the average of n models takes in one more (SWA).

    Args:
        averages: tensors (float64, float32, bfloat16, float16) that share no memory, changed in place. None may
            require grad where gradients are recorded.
        values: as many tensors of the same shapes on the same devices, each of any of these dtypes.
        weight: a finite number; 1 copies the values.

    Raises:
        TypeError, ValueError: a list, dtype, shape or device is not as above. Nothing is changed.
        RuntimeError: an average requires grad.
    """
    averages, values = as_tensors("lerp_", "averages", averages), as_tensors("lerp_", "values", values)
    weight = _number("lerp_", "weight", weight)
    if not abs(weight) < float("inf"):
        raise ValueError(f"lerp_: weight must be finite, got {weight}")
    refuse_leaves("lerp_", "averages", averages)
    call_in_place(lerp_reference, torch.ops.losssurf_fast.lerp_.default, averages, averages, values, weight)


def ema_(
    averages: Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]],
    values: Sequence[torch.Tensor],
    decay: float | Sequence[float],
) -> None:
    """``average = decay * average + (1 - decay) * value`` for every pair, in place and in one pass.

    Args:
        averages: tensors as in :func:`lerp_`; with D decays, D such lists, and the values are read once for
            all of them.
        values: tensors as in :func:`lerp_`.
        decay: a number in [0, 1], or a sequence of D of them.

    Raises:
        TypeError, ValueError: a list, dtype, shape, device or decay is not as above. Nothing is changed.
        RuntimeError: an average requires grad.
    """
    values = as_tensors("ema_", "values", values)
    if isinstance(decay, Sequence) and not isinstance(decay, str):
        if not isinstance(averages, Sequence) or len(averages) != len(decay):
            raise ValueError(f"ema_: averages must be {len(decay)} lists, one for each decay")
        decays = [_decay(d) for d in decay]
        lists = [as_tensors("ema_", f"averages[{k}]", a) for k, a in enumerate(averages)]
        for k, tensors in enumerate(lists):
            if len(tensors) != len(values):
                wanted, got = len(values), len(tensors)
                raise ValueError(f"ema_: averages[{k}] must hold {wanted} tensors like values, got {got}")
        flat = [t for tensors in lists for t in tensors]
    else:
        decays, flat = [_decay(decay)], as_tensors("ema_", "averages", averages)
    refuse_leaves("ema_", "averages", flat)
    call_in_place(ema_reference, torch.ops.losssurf_fast.ema_.default, flat, flat, values, decays)


def _number(name: str, argument: str, value: float) -> float:
    if not isinstance(value, int | float | torch.SymFloat | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")
    return value


def _decay(value: float) -> float:
    if not 0 <= _number("ema_", "decay", value) <= 1:
        raise ValueError(f"ema_: decay must lie in [0, 1], got {value}")
    return float(value)
