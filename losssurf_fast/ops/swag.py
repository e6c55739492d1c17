"""SWAG: the moments of weights along training, and samples from the Gaussian that they describe.

P parameters, of numel elements each; K columns kept; n models collected so far; r = min(n, K) columns held::

    swag_collect_   delta = value - mean         mean <- mean + delta / (n + 1)        (Welford)
                    deviation = value - mean     m2 <- m2 + delta deviation
                    deviations[n mod K] <- deviation                                    a ring buffer [K, numel]
    swag_sample     mean + sqrt(scale) (sqrt(m2 / n) z1 + cov D^T z2 / sqrt(r - 1))     D: the r columns held

Source: Maddox et al., "A simple baseline for Bayesian uncertainty in deep learning", NeurIPS 2019; scale = 1/2 is its
N(mean, (Sigma_diag + D^T D / (r - 1)) / 2). Welford, 1962: E[w^2] - E[w]^2 would cancel where the weights hardly move.

Noise (ops/noise.py): z1 of a parameter is row = its place in ``named_parameters()``, column = the flat index in the
whole, unsharded tensor. z2 is row = the number of parameters, column = the slot in the ring buffer; with ``block``, z2
of a parameter is row = number of parameters + 1 + its place. Sample s of one seed has ``sample`` = s. So a shard draws
what the whole would draw, and many samples in one call are those of single calls, bit for bit.

Numerics: fp32 (fp64 where the mean is fp64) by single fmas in a fixed order::

    low_rank = sum_j fma(c_j, D_j, .) from 0, c_j = z2_j fp32(sqrt(scale / (r - 1)));  c = 0 while r < 2
    weight   = mean + fma(sqrt(m2 fp32(scale / n)), z1, low_rank)

Floors per element in fp32: collecting reads mean, m2 and the value and writes mean, m2 and the deviation, 24 bytes;
sampling reads mean, m2 and r deviations and writes one weight per sample, 4 (r + 2 + S) bytes, with S normals.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from losssurf_fast._library import define, explain_missing
from losssurf_fast.ops.averaging import (
    AVERAGING_DTYPES,
    NO_CUDA,
    as_tensors,
    call_in_place,
    refuse_leaves,
    refuse_shared,
)
from losssurf_fast.ops.noise import MAX_COLUMNS, as_seed, check_stream, fma, philox_normal_reference


class Place(NamedTuple):
    """Where a parameter's elements lie in the noise: element i has column offset + i // run * stride + i % run.

    ``row`` is the parameter's place in ``named_parameters()``. A whole tensor has offset 0 and one run; a shard along
    the first dimension has its first element's flat index as offset; other shards are several runs, ``stride`` apart.
    """

    row: int
    offset: int = 0
    run: int | None = None  # elements of a run; None for one run that holds them all
    stride: int = 0


# ---- definition -----------------------------------------------------------------------------------------------------


def swag_collect_reference(mean, m2, deviations, values, n):
    _check_collect(mean, m2, deviations, values, n)
    for i, value in enumerate(values):
        a, b = mean[i], m2[i]
        v = value.to(a.dtype)
        if n == 0:
            delta = deviation = v - v
            a.copy_(v), b.zero_()
        else:
            delta = v - a
            a.copy_(fma(delta, 1 / (n + 1), a))
            deviation = v - a
            b.copy_(fma(delta, deviation, b))
        if deviations:
            slots = deviations[i]
            slots[n % slots.shape[0]].copy_(deviation.reshape(-1))


def swag_sample_reference(
    out, mean, m2, deviations, seed, n, scale, cov, block, sample, num_samples, places, num_params
):
    _check_sample(out, mean, m2, deviations, n, num_samples, places)
    for i, centre in enumerate(mean):
        row, offset, run, stride = places[4 * i : 4 * i + 4]
        wide = centre.dtype
        held = min(n, deviations[i].shape[0]) if deviations else 0
        index = torch.arange(centre.numel(), device=centre.device)
        columns = offset + index // max(run, 1) * stride + index % max(run, 1)
        for s in range(num_samples):
            low_rank = torch.zeros_like(centre, memory_format=torch.contiguous_format).view(-1)
            if cov and held > 1:
                z2_row = num_params + 1 + row if block else num_params
                z2 = philox_normal_reference(seed, 1, held, z2_row, 0, sample + s, wide)[0]
                coefficients = z2 * math.sqrt(scale / (held - 1))
                for c, column in zip(coefficients.unbind(), deviations[i], strict=False):
                    low_rank = fma(column.to(wide), c, low_rank)
            std = _sqrt(m2[i].reshape(-1) * (scale / n))
            noise = _noise_at(seed, row, columns, sample + s, wide)
            weight = centre.reshape(-1) + fma(std, noise, low_rank)
            target = out[i][s] if out[i].dim() > centre.dim() else out[i]
            target.copy_(weight.view(centre.shape))


def _noise_at(seed, row, columns, sample, dtype):
    if columns.numel() == 0:
        return columns.to(dtype)
    first, last = int(columns[0]), int(columns[-1])
    return philox_normal_reference(seed, 1, last - first + 1, row, first, sample, dtype)[0][columns - first]


def _sqrt(x):
    return x.double().sqrt().to(x.dtype)  # the vector library behind torch.sqrt does not round fp32 correctly


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_state(name: str, mean, m2, deviations, out=()) -> None:
    if len(m2) != len(mean):
        raise ValueError(f"{name}: m2 must hold {len(mean)} tensors like mean, got {len(m2)}")
    if len(deviations) not in (0, len(mean)):
        raise ValueError(f"{name}: deviations must hold no tensor or {len(mean)} like mean, got {len(deviations)}")
    for i, (a, b) in enumerate(zip(mean, m2, strict=True)):
        if a.dtype not in (torch.float32, torch.float64) or b.dtype != a.dtype:
            raise TypeError(f"{name}: mean[{i}] and m2[{i}] must be both float32 or float64, got {a.dtype}, {b.dtype}")
        if b.shape != a.shape or b.device != a.device:
            wanted, got = f"{tuple(a.shape)} on {a.device}", f"{tuple(b.shape)} on {b.device}"
            raise ValueError(f"{name}: m2[{i}] must be like mean[{i}], {wanted}, got {got}")
        if not (a.is_contiguous() and b.is_contiguous()):
            raise ValueError(f"{name}: mean[{i}] and m2[{i}] must be contiguous")
    for i, slots in enumerate(deviations):
        if slots.dtype not in AVERAGING_DTYPES or (slots.dtype == torch.float64) != (mean[i].dtype == torch.float64):
            wanted = "float64" if mean[i].dtype == torch.float64 else "float32, bfloat16 or float16"
            raise TypeError(
                f"{name}: deviations[{i}] must be {wanted} beside a {mean[i].dtype} mean, got {slots.dtype}"
            )
        if (
            slots.dim() != 2
            or slots.shape[0] < 1
            or slots.shape[1] != mean[i].numel()
            or slots.device != mean[i].device
        ):
            wanted, got = f"[K, {mean[i].numel()}] on {mean[i].device}", f"{tuple(slots.shape)} on {slots.device}"
            raise ValueError(f"{name}: deviations[{i}] must be {wanted}, got {got}")
        if slots.shape[0] != deviations[0].shape[0]:
            got, wanted = slots.shape[0], deviations[0].shape[0]
            raise ValueError(f"{name}: deviations[{i}] must hold {wanted} columns like deviations[0], got {got}")
        if not slots.is_contiguous():
            raise ValueError(f"{name}: deviations[{i}] must be contiguous")
    refuse_shared(name, out=out, mean=mean, m2=m2, deviations=deviations)


def _check_collect(mean, m2, deviations, values, n) -> None:
    name = "swag_collect_"
    _check_state(name, mean, m2, deviations)
    if len(values) != len(mean):
        raise ValueError(f"{name}: values must hold {len(mean)} tensors like mean, got {len(values)}")
    for i, (a, v) in enumerate(zip(mean, values, strict=True)):
        if v.dtype not in AVERAGING_DTYPES:
            raise TypeError(f"{name}: values[{i}] must have a floating dtype of {AVERAGING_DTYPES}, got {v.dtype}")
        if v.shape != a.shape or v.device != a.device:
            wanted, got = f"{tuple(a.shape)} on {a.device}", f"{tuple(v.shape)} on {v.device}"
            raise ValueError(f"{name}: values[{i}] must be like mean[{i}], {wanted}, got {got}")
    if n < 0:
        raise ValueError(f"{name}: n must not be negative, got {n}")


def _check_sample(out, mean, m2, deviations, n, num_samples, places) -> None:
    name = "swag_sample"
    _check_state(name, mean, m2, deviations, out)
    if n < 1:
        raise ValueError(f"{name}: n must be at least 1, nothing has been collected, got {n}")
    if len(out) != len(mean) or len(places) != 4 * len(mean):
        raise ValueError(f"{name}: out and places must hold {len(mean)} like mean, got {len(out)}, {len(places) // 4}")
    for i, (o, a) in enumerate(zip(out, mean, strict=True)):
        single = num_samples == 1 and o.shape == a.shape
        if o.dtype not in AVERAGING_DTYPES:
            raise TypeError(f"{name}: out[{i}] must have a floating dtype of {AVERAGING_DTYPES}, got {o.dtype}")
        if not single and tuple(o.shape) != (num_samples, *a.shape):
            raise ValueError(f"{name}: out[{i}] must be {(num_samples, *a.shape)}, got {tuple(o.shape)}")
        if o.device != a.device:
            raise ValueError(f"{name}: out[{i}] must be on mean's {a.device}, got {o.device}")


# ---- operators ------------------------------------------------------------------------------------------------------

define(
    "swag_collect_(Tensor(a!)[] mean, Tensor(b!)[] m2, Tensor(c!)[] deviations, Tensor[] values, SymInt n) -> ()",
    reference=swag_collect_reference,
    fake=_check_collect,
)
# places: row, offset, run and stride of each parameter, one after the other
define(
    "swag_sample_(Tensor(a!)[] out, Tensor[] mean, Tensor[] m2, Tensor[] deviations, Tensor seed, SymInt n, "
    "float scale, bool cov, bool block, SymInt sample, SymInt num_samples, SymInt[] places, SymInt num_params) -> ()",
    reference=swag_sample_reference,
    fake=lambda out, mean, m2, deviations, seed, n, scale, cov, block, sample, num_samples, places, num_params: (
        _check_sample(out, mean, m2, deviations, n, num_samples, places)
    ),
)
explain_missing("cuda", NO_CUDA, "swag_collect_", "swag_sample_")

# ---- public functions -----------------------------------------------------------------------------------------------


def swag_collect_(
    mean: Sequence[torch.Tensor],
    m2: Sequence[torch.Tensor],
    deviations: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    n: int,
) -> None:
    """Take one model into the moments and the ring buffer, in place and in one pass.

    Args:
        mean, m2: P contiguous tensors each, float32 or float64: the running mean and the sum of squared deviations.
            What they hold is ignored where ``n`` is 0.
        deviations: P contiguous ring buffers [K, numel] (float32, bfloat16, float16; float64 beside a float64 mean), of
            which row ``n mod K`` is written; an empty list keeps none (SWAG-diagonal).
        values: P tensors of mean's shapes, in any floating dtype: the model's weights.
        n: how many models were collected before this one.

    Raises:
        TypeError, ValueError: a list, dtype, shape, device or number is not as above. Nothing is changed.
        RuntimeError: a tensor that is changed requires grad.
    """
    name = "swag_collect_"
    mean, m2 = as_tensors(name, "mean", mean), as_tensors(name, "m2", m2)
    deviations, values = as_tensors(name, "deviations", deviations), as_tensors(name, "values", values)
    _check_count(name, "n", n, 0)
    changed = [*mean, *m2, *deviations]
    refuse_leaves(name, "mean, m2 and deviations", changed)
    op = torch.ops.losssurf_fast.swag_collect_.default
    call_in_place(swag_collect_reference, op, changed, mean, m2, deviations, values, n)


def swag_sample(
    mean: Sequence[torch.Tensor],
    m2: Sequence[torch.Tensor],
    deviations: Sequence[torch.Tensor],
    n: int,
    seed: int | torch.Tensor | None = None,
    *,
    scale: float = 0.5,
    cov: bool = True,
    block: bool = False,
    num_samples: int | None = None,
    sample: int = 0,
    places: Sequence[Place] | None = None,
    num_params: int | None = None,
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Draw weights from the Gaussian that ``swag_collect_`` gathered; all samples of a call in one pass over D.

    Args:
        mean, m2, deviations, n: as :func:`swag_collect_` left them, n models after the last call. Empty deviations or
            fewer than two columns give the diagonal part alone; a GPU takes up to 4096 columns, 2048 in float64.
        seed: an int or a 0-d int64 tensor on mean's device; None draws one from the default generator.
        scale: of the covariance, not negative. 1/2 is the paper's SWAG, 0 the mean.
        cov: whether the low-rank part is added.
        block: draw z2 for each parameter alone, instead of once for the model.
        num_samples: None for one sample in mean's shapes; S for samples [S, *shape].
        sample: number of the first sample; those of a call are sample, sample + 1, ...
        places: where the tensors lie in the noise, for parts of a model or of its tensors; by default tensor i is
            the whole parameter number i.
        num_params: number of parameters of the whole model; by default the length of mean.
        out: P tensors of the result's shapes in any floating dtype to write to, for example a model's parameters.

    Returns:
        P tensors in mean's dtype, or ``out``.

    Raises:
        TypeError, ValueError: a list, dtype, shape, device or number is not as above, or nothing has been collected.
        RuntimeError: a tensor of ``out`` requires grad where gradients are recorded.
    """
    name = "swag_sample"
    mean, m2 = as_tensors(name, "mean", mean), as_tensors(name, "m2", m2)
    deviations = as_tensors(name, "deviations", deviations)
    _check_count(name, "n", n, 1)
    if num_samples is not None:
        _check_count(name, "num_samples", num_samples, 1)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"{name}: scale must be a number, got {type(scale).__name__}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"{name}: scale must be finite and not negative, got {scale}")
    for argument, value in (("cov", cov), ("block", block)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {argument} must be a bool, got {type(value).__name__}")
    places = [Place(i) for i in range(len(mean))] if places is None else list(places)
    if len(places) != len(mean):
        raise ValueError(f"{name}: places must hold {len(mean)} like mean, got {len(places)}")
    flat = [x for place, t in zip(places, mean, strict=True) for x in _check_place(name, place, t.numel())]
    num_params = len(mean) if num_params is None else num_params
    _check_count(name, "num_params", num_params, 1 + max([-1, *(p.row for p in places)]))
    count = num_samples or 1
    check_stream(name, 0, 0, sample, 0)
    check_stream(name, 0, 0, sample + count - 1, 0)
    seed = as_seed(name, seed, mean[0].device if mean else torch.device("cpu"))
    if out is None:
        sizes = [t.shape if num_samples is None else (count, *t.shape) for t in mean]
        out = [t.new_empty(size) for t, size in zip(mean, sizes, strict=True)]
    else:
        out = as_tensors(name, "out", out)
        refuse_leaves(name, "out", out)
    op = torch.ops.losssurf_fast.swag_sample_.default
    arguments = (out, mean, m2, deviations, seed, n, float(scale), cov, block, sample, count, flat, num_params)
    call_in_place(swag_sample_reference, op, out, *arguments)
    return out


def _check_count(name: str, argument: str, value: int, least: int) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value}")


def _check_place(name: str, place: Place, numel: int) -> tuple[int, int, int, int]:
    row, offset, run, stride = place
    run = numel if run is None else run
    if not (type(row) is type(offset) is type(run) is type(stride) is int and min(row, offset, run, stride) >= 0):
        for argument, value in (("row", row), ("offset", offset), ("run", run), ("stride", stride)):
            _check_count(name, f"places' {argument}", value, 0)
    if numel and (run < 1 or numel % run or (numel > run and stride < run)):
        raise ValueError(f"{name}: a place of {numel} elements must be whole runs that do not overlap, got {place}")
    last = offset + (numel // run - 1) * stride + run if numel else offset
    if last > MAX_COLUMNS:
        raise ValueError(f"{name}: columns must lie in [0, 2**34), got {place} of {numel} elements")
    return row, offset, run, stride
