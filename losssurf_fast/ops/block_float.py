"""Block floating point: integers of a few bits that share one exponent, rounded stochastically.

A block is a whole tensor or one row (all elements with one index in the first dimension). With W = ``word_length``
bits, 2 to 16, and uniform u in [0, 1)::

    e     = floor(log2(max |x| over the block)), at least -126
    i     = floor(x 2^(W - 2 - e) + u), clamped to [-2^(W - 1), 2^(W - 1) - 1]        the mantissa
    value = i 2^(e - W + 2)

so that E[value] = x wherever nothing is clamped, and a multiple of 2^(e - W + 2) stays what it is. Without stochastic
rounding u = 1/2.

Source: Yang et al., "SWALP: stochastic weight averaging in low-precision training", ICML 2019, section 3.

Noise: u = (word >> 8) 2^-24 of the Philox words of ops/noise.py, with row = ``row_offset``, which names the tensor,
column = ``col_offset`` + the flat index, word = column mod 4 of the counter (column >> 2, row, sample). So every
backend, number of threads and instruction set rounds alike.

Numerics: in fp32 whatever x's dtype (fp64 is rounded to it first); with f = floor(x 2^(W - 2 - e)) exact, the sum with
u is f + 1 where u >= 1 - (x 2^(W - 2 - e) - f), else f. A block of zeros has e = -126 and gives zeros. A NaN or an
infinity makes its whole block NaN: mantissas 0, e = 128. At e = 127 the lowest mantissa is -2^(W - 1) + 1, for the
value below it is infinite in fp32.

Floor per element of fp32: x is read twice (the exponent needs all of a block), W <= 8 bits are written as one byte,
otherwise two.
"""

import torch

from losssurf_fast._library import composite_needed, define, register_vmap
from losssurf_fast.ops.averaging import AVERAGING_DTYPES
from losssurf_fast.ops.noise import as_seed, check_stream, philox_words_reference

LOWEST_EXPONENT, NOT_FINITE = -126, 128

# ---- definition -----------------------------------------------------------------------------------------------------


def block_float_quantize_reference(
    x, seed, word_length, per_row, row_offset=0, col_offset=0, sample=0, stochastic=True
):
    _check_quantize(x, word_length, per_row)
    rows = x.shape[0] if per_row else 1
    blocks = (x.reshape(rows, -1) if x.numel() else x.new_zeros(rows, 1)).float().contiguous()
    top = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True)  # as integers NaN > infinity > finite
    exponent = ((top >> 23) - 127).clamp(min=LOWEST_EXPONENT)
    scaled = _scale(blocks, word_length - 2 - exponent)
    whole = scaled.floor()
    u = _uniform(seed, x, row_offset, col_offset, sample).view(blocks.shape) if stochastic and x.numel() else 0.5
    rounded = whole + (u >= 1 - (scaled - whole))
    lowest = -(2 ** (word_length - 1)) + (exponent == 127)
    mantissa = torch.maximum(rounded, lowest).clamp(max=2 ** (word_length - 1) - 1)
    mantissa = torch.where(exponent == NOT_FINITE, 0, mantissa).to(_mantissa_dtype(word_length))
    exponent = exponent.view(x.shape[:1] if per_row else ())
    return mantissa.view(-1)[: x.numel()].view(x.shape), exponent


def block_float_dequantize_reference(mantissa, exponent, word_length):
    _check_dequantize(mantissa, exponent, word_length)
    shared = exponent.view(-1, *(1,) * (mantissa.dim() - 1)) if exponent.dim() else exponent
    return torch.where(shared == NOT_FINITE, torch.nan, _scale(mantissa.float(), shared - word_length + 2))


def _mantissa_dtype(word_length):
    return torch.int8 if word_length <= 8 else torch.int16


def _scale(x, power):
    """x 2^power by two factors, each of which fp32 holds."""
    half = power >> 1
    return x * _power_of_two(half) * _power_of_two(power - half)


def _power_of_two(exponent):
    return ((exponent + 127) << 23).view(torch.float32)


def _uniform(seed, x, row_offset, col_offset, sample):
    first, last = col_offset // 4, (col_offset + x.numel() + 3) // 4
    column = torch.arange(first, last, device=x.device)
    row = torch.full_like(column, row_offset)
    counters = (column, row & 0xFFFFFFFF, (row >> 32) & 0xFFFFFFFF, torch.full_like(column, sample))
    words = philox_words_reference(seed, torch.stack(counters, dim=-1)).view(-1)[col_offset % 4 :][: x.numel()]
    return (words >> 8).float() * 2.0**-24


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_word_length(name, word_length):
    if not 2 <= word_length <= 16:
        raise ValueError(f"{name}: word_length must lie in [2, 16], got {word_length}")


def _check_quantize(x, word_length, per_row, name="block_float_quantize") -> None:
    if x.dtype not in AVERAGING_DTYPES:
        raise TypeError(f"{name}: x must have a floating dtype of {AVERAGING_DTYPES}, got {x.dtype}")
    _check_word_length(name, word_length)
    if per_row and x.dim() == 0:
        raise ValueError(f"{name}: x must have rows, got a 0-d tensor")


def _check_dequantize(mantissa, exponent, word_length) -> None:
    name = "block_float_dequantize"
    _check_word_length(name, word_length)
    wanted = _mantissa_dtype(word_length)
    if mantissa.dtype != wanted:
        raise TypeError(f"{name}: mantissa must be {wanted} for word_length {word_length}, got {mantissa.dtype}")
    if exponent.dtype != torch.int32:
        raise TypeError(f"{name}: exponent must be torch.int32, got {exponent.dtype}")
    if exponent.dim() != 0 and exponent.shape != mantissa.shape[:1]:
        got = f"{tuple(exponent.shape)} for {tuple(mantissa.shape)}"
        raise ValueError(f"{name}: exponent must be 0-d or hold one number for each row of mantissa, got {got}")
    if exponent.device != mantissa.device:
        raise ValueError(f"{name}: exponent must be on mantissa's {mantissa.device}, got {exponent.device}")


# ---- operators ------------------------------------------------------------------------------------------------------


def _block_float_quantize_fake(x, seed, word_length, per_row, row_offset=0, col_offset=0, sample=0, stochastic=True):
    _check_quantize(x, word_length, per_row)
    exponent = x.new_empty(x.shape[:1] if per_row else (), dtype=torch.int32)
    return x.new_empty(x.shape, dtype=_mantissa_dtype(word_length)), exponent


def _block_float_dequantize_fake(mantissa, exponent, word_length):
    _check_dequantize(mantissa, exponent, word_length)
    return mantissa.new_empty(mantissa.shape, dtype=torch.float32)


define(
    "block_float_quantize(Tensor x, Tensor seed, int word_length, bool per_row, SymInt row_offset=0, "
    "SymInt col_offset=0, SymInt sample=0, bool stochastic=True) -> (Tensor mantissa, Tensor exponent)",
    reference=block_float_quantize_reference,
    fake=_block_float_quantize_fake,
)
define(
    "block_float_dequantize(Tensor mantissa, Tensor exponent, int word_length) -> Tensor",
    reference=block_float_dequantize_reference,
    fake=_block_float_dequantize_fake,
)


def _one_by_one(name):
    """A vmap rule: one call for each example, since a block is never larger than one of them."""

    def rule(info, in_dims, *args):
        op = getattr(torch.ops.losssurf_fast, name).default
        example = lambda i: [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        results = [op(*example(i)) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)

    return rule


for _name in ("block_float_quantize", "block_float_dequantize"):
    register_vmap(_name, _one_by_one(_name))

# ---- public functions -----------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """The value of its second argument, the gradient of its first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, value):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _StraightThroughForward(_StraightThrough):
    """The same with forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()


def block_float(
    x: torch.Tensor,
    word_length: int,
    seed: int | torch.Tensor | None = None,
    *,
    block: str = "tensor",
    stochastic: bool = True,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
) -> torch.Tensor:
    """``x`` rounded to block floating point: what its mantissas and exponents stand for.

    The gradient passes straight through, as if nothing had been rounded.

    Args, Raises: as :func:`block_float_quantize`.

    Returns:
        A contiguous tensor of x's shape and dtype; more than 8 bits do not fit bfloat16 and more than 12 not float16,
        and are rounded once more. What would lie outside a dtype of 16 bits is its largest or lowest number.
    """
    name = "block_float"
    per_row, seed = _check_arguments(name, x, word_length, seed, block, stochastic, row_offset, col_offset, sample)
    ops = torch.ops.losssurf_fast
    parts = ops.block_float_quantize.default(
        x.detach(), seed, word_length, per_row, row_offset, col_offset, sample, stochastic
    )
    value = _within(ops.block_float_dequantize.default(*parts, word_length), x.dtype)
    if composite_needed():
        return _StraightThroughForward.apply(x, value)
    return _StraightThrough.apply(x, value) if x.requires_grad and torch.is_grad_enabled() else value


def block_float_quantize(
    x: torch.Tensor,
    word_length: int,
    seed: int | torch.Tensor | None = None,
    *,
    block: str = "tensor",
    stochastic: bool = True,
    row_offset: int = 0,
    col_offset: int = 0,
    sample: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mantissas and shared exponents of ``x``. Not differentiable; :func:`block_float` is.

    Args:
        x: a tensor of any shape (float64, float32, bfloat16, float16).
        word_length: bits of a mantissa with its sign, 2 to 16.
        seed: an int or a 0-d int64 tensor on x's device; None draws one from the default generator.
        block: "tensor" for one exponent, "row" for one for each index of the first dimension.
        stochastic: round up with the probability that keeps the mean; otherwise to the nearest, halves up.
        row_offset: names the tensor: two tensors of one seed round independently where this differs.
        col_offset: place of x's first element in a larger tensor, whose noise x then takes.
        sample: which of 2^32 independent draws of this seed.

    Returns:
        (mantissa, exponent): x's shape in int8 up to 8 bits, int16 above; int32, 0-d or [rows].

    Raises:
        TypeError, ValueError: an argument is not of the kind or range above.
    """
    name = "block_float_quantize"
    per_row, seed = _check_arguments(name, x, word_length, seed, block, stochastic, row_offset, col_offset, sample)
    arguments = (x.detach(), seed, word_length, per_row, row_offset, col_offset, sample, stochastic)
    if composite_needed():
        return block_float_quantize_reference(*arguments)
    return torch.ops.losssurf_fast.block_float_quantize.default(*arguments)


def block_float_dequantize(mantissa: torch.Tensor, exponent: torch.Tensor, word_length: int) -> torch.Tensor:
    """The float32 values that :func:`block_float_quantize` stands for, in mantissa's shape.

    Raises:
        TypeError, ValueError: dtypes or shapes are not those of such a pair for this word_length. The numbers are not
            looked at: exponents outside [-126, 128] give values without meaning.
    """
    name = "block_float_dequantize"
    for argument, value in (("mantissa", mantissa), ("exponent", exponent)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    _check_int(name, "word_length", word_length)
    if composite_needed():
        return block_float_dequantize_reference(mantissa, exponent, word_length)
    return torch.ops.losssurf_fast.block_float_dequantize.default(mantissa, exponent, word_length)


def _within(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` in ``dtype``, whose range the lowest mantissa may lie below."""
    if dtype.itemsize == 2:
        value = value.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return value.to(dtype)


def _check_arguments(
    name, x, word_length, seed, block, stochastic, row_offset, col_offset, sample
) -> tuple[bool, torch.Tensor]:
    """Whether blocks are rows, and the seed as a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    _check_int(name, "word_length", word_length)
    if block not in ("tensor", "row"):
        raise ValueError(f'{name}: block must be "tensor" or "row", got {block!r}')
    if not isinstance(stochastic, bool):
        raise TypeError(f"{name}: stochastic must be a bool, got {type(stochastic).__name__}")
    _check_quantize(x, word_length, block == "row", name)
    check_stream(name, row_offset, col_offset, sample, x.numel())
    return block == "row", as_seed(name, seed if stochastic else 0, x.device)


def _check_int(name, argument, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
