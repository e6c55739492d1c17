"""Weights on a path between networks, for a whole model's list of tensors in one call.

A curve has K bends (control points), the two networks at its ends among them; at t in [0, 1] its weights are::

    w(t) = sum_j c_j(t) w_j

    bezier      c_j(t) = C(K-1, j) t^j (1 - t)^(K-1-j)
    polychain   c_j(t) = max(0, 1 - |t (K-1) - j|)          straight segments through all bends

Source: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", NeurIPS 2018, section 3; K = 3
gives the talk's two formulas.

K bends, P tensors in each, j and p their numbers. Numerics: in fp32 whatever the dtype, in fp64 for fp64; the sum runs
by fma in the order of j, starting from c_0 w_0, so every backend returns the same bits. A bend whose coefficient is 0
in that precision is not read (a chain has K - 2 such bends): NaN or infinity in one does not show. Gradients, with g_p
that of weight p::

    d/dw_jp = c_j g_p                 d/dc_j = sum_p <g_p, w_jp>

The second is summed in fp32 over 2048 elements and in fp64 beyond, alike for any number of threads, over all bends
(under torch.func and forward mode without what is not finite where c_j = 0). A frozen bend costs backward nothing, nor
does a weight that was not used: its bends get no gradient. Bends are saved for the coefficients' gradient alone. On the
CPU small results share allocations of up to 8 MiB, which live as long as any tensor in them.

Floor per element, fp32, K = 3 with the inner bend trainable: forward reads 3 and writes 1, backward reads 1 and writes
1: 24 bytes; the gradient of t makes backward read all bends.
"""

import numbers
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from losssurf_fast._library import composite_backward, composite_needed, define, explain_missing, register_autograd
from losssurf_fast.ops.averaging import NO_CUDA, as_tensors
from losssurf_fast.ops.noise import fma

CURVE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("bezier", "polychain")

# ---- coefficients ---------------------------------------------------------------------------------------------------


def curve_coefficients(t: torch.Tensor | float, num_bends: int, kind: str = "bezier") -> torch.Tensor:
    """The K coefficients c_j(t) of a curve's bends; they sum to 1.

    Differentiable in t, any number of times. A chain's derivative at an inner bend is that of the segment after it.

    Args:
        t: places on the curve in [0, 1], a number or a floating tensor of any shape. (A tensor outside the CPU is not
            looked at, which would wait for the device: there a t outside [0, 1] extrapolates.)
        num_bends: K, at least 2; the two ends count.
        kind: "bezier" or "polychain".

    Returns:
        ``[*t.shape, K]`` in t's dtype, at least float32 (float64 for float64; float32 for a number).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    t = check_t("curve_coefficients", t)
    check_kind("curve_coefficients", num_bends, kind)
    dtype = torch.promote_types(t.dtype, torch.float32)
    t, last = t.double().unsqueeze(-1), num_bends - 1
    if kind == "bezier":
        c = torch.ones_like(t)
        for _ in range(last):  # de Casteljau: a curve of one degree more
            c = F.pad(c * (1 - t), (0, 1)) + F.pad(c * t, (1, 0))
        return c.to(dtype)
    j = torch.arange(num_bends, dtype=torch.float64, device=t.device)
    segment = (t.detach() * last).floor().clamp(0, last - 1)
    along = t * last - segment
    return ((j == segment) * (1 - along) + (j == segment + 1) * along).to(dtype)


def check_t(caller: str, t) -> torch.Tensor:
    """``t`` as a tensor, refused where it can be seen to lie outside [0, 1]."""
    if isinstance(t, bool) or not isinstance(t, numbers.Real | torch.Tensor | torch.SymFloat):
        raise TypeError(f"{caller}: t must be a number or a tensor, got {type(t).__name__}")
    if not isinstance(t, torch.Tensor):
        if not 0 <= t <= 1:
            raise ValueError(f"{caller}: t must lie in [0, 1], got {t}")
        return as_tensor(t, torch.float32)
    if not t.is_floating_point():
        raise TypeError(f"{caller}: t must have a floating dtype, got {t.dtype}")
    visible = t.device.type == "cpu" and not torch.compiler.is_compiling() and not composite_needed()
    if visible and t.numel() and not (t.min() >= 0 and t.max() <= 1):  # NaN fails it, too
        raise ValueError(f"{caller}: t must lie in [0, 1], got {t.min().item():g} to {t.max().item():g}")
    return t


def as_tensor(t: numbers.Real | torch.SymFloat, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor, of NumPy's or a fraction, too."""
    return torch.tensor(t if isinstance(t, torch.SymFloat) else float(t), dtype=dtype)


def check_kind(caller: str, num_bends: int, kind: str) -> None:
    if isinstance(num_bends, bool) or not isinstance(num_bends, int):
        raise TypeError(f"{caller}: num_bends must be an int, got {type(num_bends).__name__}")
    if num_bends < 2:
        raise ValueError(f"{caller}: num_bends counts the two ends and must be at least 2, got {num_bends}")
    if kind not in KINDS:
        raise ValueError(f"{caller}: kind must be one of {KINDS}, got {kind!r}")


# ---- definition -----------------------------------------------------------------------------------------------------


def curve_weights_reference(bends, coefficients):
    """``bends`` holds the P tensors of the first bend, then those of the second, and so on."""
    _check_curve_weights(bends, coefficients)
    size = len(bends) // len(coefficients)
    weights = []
    for p in range(size):
        first, *others = bends[p::size]
        wide = torch.promote_types(first.dtype, torch.float32)
        c = coefficients.to(wide).unbind()
        total = _read(first.to(wide), c[0]) * c[0]
        for bend, coefficient in zip(others, c[1:], strict=True):
            total = fma(_read(bend.to(wide), coefficient), coefficient, total)
        weights.append(total.to(first.dtype))
    return weights


def _read(bend, coefficient):
    """``bend`` without what would show in the sum if its coefficient is 0; the gradient of the coefficient needs it."""
    return torch.where((coefficient == 0) & ~bend.isfinite(), 0, bend)


def curve_weights_backward_reference(grads, bends, coefficients, needed, need_coefficients):
    """Gradients of the bends where ``needed``, in their order, and of the coefficients at the end where that is.

    ``needed`` has a flag for every bend's every tensor; ``bends`` may be empty where the coefficients need no gradient.
    """
    _check_curve_weights_backward(grads, bends, coefficients, needed, need_coefficients)
    size = len(grads)
    result = []
    for i, need in enumerate(needed):
        if need:
            grad = grads[i % size]
            wide = torch.promote_types(grad.dtype, torch.float32)
            result.append((grad.to(wide) * coefficients[i // size].to(wide)).to(grad.dtype))
    if need_coefficients:
        sums = [
            torch.stack([(g.double() * w.double()).sum() for g, w in zip(grads, bends[j : j + size], strict=True)])
            for j in range(0, len(bends), size)
        ]
        result.append(torch.stack([s.sum() for s in sums]).to(coefficients.dtype))
    return result


def _check_coefficients(name: str, coefficients) -> None:
    if coefficients.dim() != 1 or coefficients.numel() < 1:
        raise ValueError(f"{name}: coefficients must be [K], one for each bend, got {tuple(coefficients.shape)}")
    if coefficients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: coefficients must be float32 or float64, got {coefficients.dtype}")


def _check_curve_weights(bends, coefficients) -> None:
    """Refuse what the kernels cannot combine. The C++ kernels check the same, in the same words."""
    name = "curve_weights"
    _check_coefficients(name, coefficients)
    count = len(coefficients)
    if len(bends) % count:
        raise ValueError(f"{name}: bends must be {count} lists of equal length, got {len(bends)} tensors")
    size = len(bends) // count
    for i, bend in enumerate(bends):
        j, p = divmod(i, size)
        first = bends[p]
        if bend.dtype not in CURVE_DTYPES:
            raise TypeError(f"{name}: bends[{j}][{p}] must have a floating dtype of {CURVE_DTYPES}, got {bend.dtype}")
        if bend.shape != first.shape:
            shapes = f"{tuple(first.shape)} of bends[0][{p}], got {tuple(bend.shape)}"
            raise ValueError(f"{name}: bends[{j}][{p}] must have the shape {shapes}")
        if bend.dtype != first.dtype:
            raise TypeError(f"{name}: bends[{j}][{p}] must be {first.dtype} as bends[0][{p}], got {bend.dtype}")
        if bend.device != coefficients.device:
            raise ValueError(
                f"{name}: bends[{j}][{p}] must be on the coefficients' {coefficients.device}, got {bend.device}"
            )


def _check_curve_weights_backward(grads, bends, coefficients, needed, need_coefficients) -> None:
    """As :func:`_check_curve_weights`."""
    name, size = "curve_weights_backward", len(grads)
    _check_coefficients(name, coefficients)
    total = size * len(coefficients)
    if len(needed) != total:
        raise ValueError(f"{name}: needed must hold {total} flags, got {len(needed)}")
    if len(bends) != total and (len(bends) or need_coefficients):
        raise ValueError(f"{name}: bends must hold {total} tensors, got {len(bends)}")
    for p, grad in enumerate(grads):
        if grad.dtype not in CURVE_DTYPES:
            raise TypeError(f"{name}: grads[{p}] must have a floating dtype of {CURVE_DTYPES}, got {grad.dtype}")
        if grad.device != coefficients.device:
            raise ValueError(
                f"{name}: grads[{p}] must be on the coefficients' {coefficients.device}, got {grad.device}"
            )
        for bend in bends[p::size]:
            if bend.dtype != grad.dtype:
                raise TypeError(f"{name}: grads[{p}] must be {bend.dtype} as its bends, got {grad.dtype}")
            if bend.shape != grad.shape:
                raise ValueError(
                    f"{name}: grads[{p}] must have its bends' shape {tuple(bend.shape)}, got {tuple(grad.shape)}"
                )
            if bend.device != grad.device:
                raise ValueError(f"{name}: grads[{p}] must be on its bends' {bend.device}, got {grad.device}")


# ---- operators ------------------------------------------------------------------------------------------------------


def _curve_weights_fake(bends, coefficients):
    _check_curve_weights(bends, coefficients)
    return [torch.empty_like(b) for b in bends[: len(bends) // len(coefficients)]]


def _curve_weights_backward_fake(grads, bends, coefficients, needed, need_coefficients):
    _check_curve_weights_backward(grads, bends, coefficients, needed, need_coefficients)
    like, size = bends or grads, len(grads)
    result = [torch.empty_like(like[i % size]) for i, need in enumerate(needed) if need]
    return [*result, torch.empty_like(coefficients)] if need_coefficients else result


define(
    "curve_weights(Tensor[] bends, Tensor coefficients) -> Tensor[]",
    reference=curve_weights_reference,
    fake=_curve_weights_fake,
)
define(
    "curve_weights_backward(Tensor[] grads, Tensor[] bends, Tensor coefficients, bool[] needed, "
    "bool need_coefficients) -> Tensor[]",
    reference=curve_weights_backward_reference,
    fake=_curve_weights_backward_fake,
)
explain_missing("cuda", NO_CUDA, "curve_weights", "curve_weights_backward")  # where it has, this is not asked


# The autograd formula of curve_weights is csrc/curve_autograd.cpp. This is that of its gradients, for double backward.


def _curve_weights_backward_setup(ctx, inputs, output):
    grads, bends, coefficients, needed, need_coefficients = inputs
    ctx.save_for_backward(*grads, *bends, coefficients)
    ctx.num_grads, ctx.rest = len(grads), (needed, need_coefficients)


def _curve_weights_backward_autograd(ctx, outgoing):
    *lists, coefficients = ctx.saved_tensors
    needs_grads, needs_bends, needs_coefficients, *_ = ctx.needs_input_grad
    size, (needed, need_coefficients) = ctx.num_grads, ctx.rest

    def formula(*inputs):
        *lists, coefficients = inputs
        found = curve_weights_backward_reference(lists[:size], lists[size:], coefficients, needed, need_coefficients)
        return [f for f, out in zip(found, outgoing, strict=True) if out is not None]

    wanted = [*needs_grads, *needs_bends, needs_coefficients]
    *found, coefficients = composite_backward(
        formula, (*lists, coefficients), [out for out in outgoing if out is not None], wanted
    )
    return found[:size], found[size:], coefficients, None, None


register_autograd("curve_weights_backward", _curve_weights_backward_autograd, _curve_weights_backward_setup)

# ---- public function ------------------------------------------------------------------------------------------------


def curve_weights(bends: Sequence[Sequence[torch.Tensor]], coefficients: torch.Tensor) -> list[torch.Tensor]:
    """``sum_j coefficients[j] * bends[j][p]`` for every p: a whole model's weights on a curve in one call.

    Args:
        bends: K lists of P tensors (float64, float32, bfloat16, float16); the K tensors of one p have one shape, dtype
            and device.
        coefficients: ``[K]`` in float32 or float64 on the bends' device, from :func:`curve_coefficients` or any others
            (a point of a plane is one with the coefficients ``[1, x, y]``). They are read on the device.

    Returns:
        P tensors of the bends' shapes and dtypes. Gradients flow to every bend that requires one and to the
        coefficients; they are sums over P and are made in one call, too.

    Raises:
        TypeError, ValueError: a list, dtype, shape or device is not as above.
    """
    if not isinstance(coefficients, torch.Tensor):
        raise TypeError(f"curve_weights: coefficients must be a tensor, got {type(coefficients).__name__}")
    if isinstance(bends, torch.Tensor) or not isinstance(bends, Sequence):
        raise TypeError(f"curve_weights: bends must be a sequence of lists of tensors, got {type(bends).__name__}")
    lists = [as_tensors("curve_weights", f"bends[{j}]", bend) for j, bend in enumerate(bends)]
    if coefficients.dim() == 1 and len(lists) != len(coefficients):
        raise ValueError(f"curve_weights: bends must be {len(coefficients)} lists, got {len(lists)}")
    for j, tensors in enumerate(lists):
        if len(tensors) != len(lists[0]):
            raise ValueError(f"curve_weights: bends[{j}] must hold {len(lists[0])} tensors, got {len(tensors)}")
    flat = [t for tensors in lists for t in tensors]
    if composite_needed():
        return curve_weights_reference(flat, coefficients)
    return list(torch.ops.losssurf_fast.curve_weights.default(flat, coefficients))
