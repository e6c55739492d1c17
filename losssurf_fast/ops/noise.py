"""Normal noise from a counter: every operator of the package draws it here, on every backend.

The output is a matrix ``[rows, cols]`` (a tensor of any rank is ``[product of leading sizes, last size]``). Element
(row, col) is a pure function of (seed, sample, row, col), so noise does not depend on tiles, threads, device, padding
or memory format, and backward passes draw it again instead of storing it.

* Words: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the 64 bits of
  ``seed`` as key, low word first, and the counter ``(col >> 2, row mod 2^32, row >> 32, sample)``.
* Normals: words (0, 1) give columns 4q and 4q + 1, words (2, 3) columns 4q + 2 and 4q + 3. With words (a, b), in fp32::

      u = fma(a, 2^-32, 2^-33)      r = sqrt(-2 ln u)      theta = 2 pi b / 2^32
      even column: r cos(theta)     odd column: r sin(theta)

  The logarithm, sine and cosine are the polynomials of ``csrc/philox.h``, made of add, mul, fma, sqrt.rn and integer
  steps alone, so C++, CUDA, Triton and this reference return the same bits. They lie within 1e-6 of the exact
  transform of u. fp64 noise is the fp32 normal widened; bf16 and fp16 noise is the fp32 normal rounded.

``row_offset`` and ``col_offset`` let a shard of a batch or of the features draw what the whole tensor would draw.
"""

import math
from collections.abc import Sequence

import torch

from losssurf_fast._library import define, register_vmap

MAX_COLUMNS = 2**34  # col >> 2 is one 32-bit counter word
MAX_SAMPLE = 2**32
NOISE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# ---- words ---------------------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF


def _mul_hi_lo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``a * m`` for 32-bit values held in int64."""
    high = ((a >> 16) * m + (((a & 0xFFFF) * m) >> 16)) >> 16
    return high & _MASK, (a * m) & _MASK


def philox_words_reference(seed: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 words ``[..., 4]`` of the counters ``[..., 4]``, both int64 holding 32-bit values."""
    c0, c1, c2, c3 = counters.unbind(-1)
    key_lo, key_hi = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = _mul_hi_lo(c0, 0xD2511F53), _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key_lo, lo1, hi0 ^ c3 ^ key_hi, lo0
        key_lo, key_hi = (key_lo + 0x9E3779B9) & _MASK, (key_hi + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


define(
    "philox_words(Tensor seed, Tensor counters) -> Tensor",
    reference=philox_words_reference,
    fake=lambda seed, counters: torch.empty_like(counters, memory_format=torch.contiguous_format),
)

# ---- normals -------------------------------------------------------------------------------------------------------


def fma(a: torch.Tensor, b, c) -> torch.Tensor:
    """``a * b + c`` rounded once, b and c tensors or numbers: for references, in fp32, and plainly in fp64.

    By way of fp64, which rounds twice: 1 ulp off in a handful of values per billion.
    """
    if a.dtype == torch.float64:
        return a * b + c
    b, c = (v.double() if isinstance(v, torch.Tensor) else _fp32(v) for v in (b, c))
    return (a.double() * b + c).float()


def _fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _polynomial(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = fma(result, x, coefficient)
    return result


# csrc/philox.h says where these come from.
LOG_COEFFICIENTS = (
    0.13199958205223083, -0.28356441855430603, 0.34856998920440674, -0.4021680951118469,
    0.4994148910045624, -0.6665959358215332, 1.0000079870224, -2.0,
)  # fmt: skip
MINUS_TWO_LN_TWO = -1.3862943649291992
SIN_COEFFICIENTS = (-0.004602177068591118, 0.07968022674322128, -0.6459634900093079, 1.5707963705062866)
COS_COEFFICIENTS = (0.0009067435166798532, -0.02086152881383896, 0.253669410943985, -1.2337005138397217, 1.0)


def _minus_two_log(u: torch.Tensor) -> torch.Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F400000) >> 23  # of the mantissa in [3/4, 3/2)
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return fma(exponent.float(), MINUS_TWO_LN_TWO, _polynomial(f, LOG_COEFFICIENTS) * f)


def _box_muller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # By way of fp64: the vector library behind torch.sqrt does not round fp32 correctly.
    r = _minus_two_log(fma(a.float(), 2.0**-32, 2.0**-33)).double().sqrt().float()
    quadrant = ((b + 2**29) >> 30) & 3
    x = ((b + 2**29) % 2**30 - 2**29).float() * 2.0**-30  # in quarter turns, [-1/2, 1/2)
    x2 = x * x
    sin, cos = _polynomial(x2, SIN_COEFFICIENTS) * x, _polynomial(x2, COS_COEFFICIENTS)
    odd = (quadrant & 1).bool()
    signed_r = torch.where(quadrant >= 2, -r, r)
    return signed_r * torch.where(odd, -sin, cos), signed_r * torch.where(odd, cos, sin)


def philox_normal_reference(
    seed: torch.Tensor,
    rows: int,
    cols: int,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Noise of rows ``row_offset + [0, rows)`` and columns ``col_offset + [0, cols)``, as ``[rows, cols]``."""
    first, skip = divmod(col_offset, 4)
    quads = (skip + cols + 3) // 4
    row = torch.arange(rows, device=seed.device).unsqueeze(1) + row_offset  # [rows, 1]
    quad = torch.arange(quads, device=seed.device).unsqueeze(0) + first  # [1, quads]
    parts = torch.broadcast_tensors(quad, row & _MASK, (row >> 32) & _MASK, torch.full_like(row, sample))
    words = philox_words_reference(seed, torch.stack(parts, dim=-1))  # [rows, quads, 4]
    pairs = [_box_muller(words[..., k], words[..., k + 1]) for k in (0, 2)]
    normals = torch.stack([n for pair in pairs for n in pair], dim=-1).reshape(rows, 4 * quads)
    return normals[:, skip : skip + cols].to(dtype, copy=True, memory_format=torch.contiguous_format)


def _philox_normal_fake(seed, rows, cols, row_offset=0, col_offset=0, sample=0, dtype=torch.float32):
    return seed.new_empty((rows, cols), dtype=dtype)


def _philox_normal_vmap(info, in_dims, seed, rows, cols, row_offset=0, col_offset=0, sample=0, dtype=torch.float32):
    op = torch.ops.losssurf_fast.philox_normal.default
    draws = [op(s, rows, cols, row_offset, col_offset, sample, dtype) for s in seed.unbind(in_dims[0])]
    return torch.stack(draws), 0


define(
    "philox_normal(Tensor seed, SymInt rows, SymInt cols, SymInt row_offset=0, SymInt col_offset=0, SymInt sample=0, "
    "ScalarType dtype=float) -> Tensor",
    reference=philox_normal_reference,
    fake=_philox_normal_fake,
)
register_vmap("philox_normal", _philox_normal_vmap)


def check_stream(name: str, row_offset: int, col_offset: int, sample: int, cols: int) -> None:
    """Refuse offsets and samples that do not fit the counter; ``name`` is the operator that was called."""
    for argument, value, limit in (("row_offset", row_offset, 2**63), ("sample", sample, MAX_SAMPLE)):
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
            raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
        if not 0 <= value < limit:
            raise ValueError(f"{name}: {argument} must lie in [0, {limit}), got {value}")
    if not isinstance(col_offset, int | torch.SymInt) or isinstance(col_offset, bool):
        raise TypeError(f"{name}: col_offset must be an int, got {type(col_offset).__name__}")
    if not (col_offset >= 0 and col_offset + cols <= MAX_COLUMNS):
        raise ValueError(
            f"{name}: columns col_offset + [0, {cols}) must lie in [0, 2**34), got col_offset {col_offset}"
        )


def as_seed(name: str, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """``seed`` as a 0-d int64 tensor on ``device``; None draws one from the default generator."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{name}: seed must fit in 64 bits, got {seed}")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
        got = f"{seed.dtype} tensor" if isinstance(seed, torch.Tensor) else type(seed).__name__
        raise TypeError(f"{name}: seed must be an int or a 0-d int64 tensor, got {got}")
    if seed.dim() != 0:
        raise ValueError(f"{name}: seed must be a 0-d tensor, got shape {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"{name}: seed must be on {device}, got {seed.device}")
    return seed


def philox_normal(
    shape: int | Sequence[int] | torch.Tensor,
    seed: int | torch.Tensor,
    *,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normal noise that is the same on every device: see the module's docstring.

    Args:
        shape: sizes of the result, or a tensor whose shape, dtype and device it takes. The noise is that of the
            matrix ``[product of leading sizes, last size]``; a 1-d result is one row, a 0-d one a single element.
        seed: an int of 64 bits, or a 0-d int64 tensor (read on its device, never on the host).
        row_offset, col_offset: position of the result in a larger matrix.
        sample: which of 2^32 independent draws of this seed.
        dtype: float64, float32, bfloat16 or float16; float32 by default.
        device: the seed's by default, the CPU where ``seed`` is an int.

    Raises:
        TypeError, ValueError: seed, offsets, sample or dtype are not of the kind or range above.
    """
    if isinstance(shape, torch.Tensor):
        dtype = shape.dtype if dtype is None else dtype
        device, sizes = shape.device if device is None else device, tuple(shape.shape)
    else:
        sizes = (shape,) if isinstance(shape, int | torch.SymInt) else tuple(shape)
        for size in sizes:
            if not isinstance(size, int | torch.SymInt) or isinstance(size, bool):
                raise TypeError(f"philox_normal: shape must be ints or a tensor, got {shape!r}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"philox_normal: sizes must not be negative, got {sizes}")
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in NOISE_DTYPES:
        raise TypeError(f"philox_normal: dtype must be one of {NOISE_DTYPES}, got {dtype}")
    if device is None:
        device = seed.device if isinstance(seed, torch.Tensor) else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if seed is None:
        raise TypeError("philox_normal: seed must be an int or a 0-d int64 tensor, got None")
    cols = sizes[-1] if sizes else 1
    rows = math.prod(sizes[:-1])
    check_stream("philox_normal", row_offset, col_offset, sample, cols)
    seed = as_seed("philox_normal", seed, device)
    out = torch.ops.losssurf_fast.philox_normal.default(seed, rows, cols, row_offset, col_offset, sample, dtype)
    return out.view(sizes)
