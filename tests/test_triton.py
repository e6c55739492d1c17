"""Triton kernels against the references: on a GPU compiled, elsewhere in Triton's interpreter (see conftest.py).

The interpreter has no bf16 arithmetic, so bf16 is tested on a GPU only; tests/test_triton_aot.py compiles it.
"""

import itertools

import pytest
import torch
from common import BF16, F16, F32, F64, assert_as_good_as_eager, double, lrt_inputs

import losssurf_fast as lsf
from losssurf_fast.ops import lrt
from losssurf_fast.ops.lrt_operand import operand_dtype
from losssurf_fast.ops.lrt_strategy import Tile, dual_tile, linear_strategy, shared_memory
from losssurf_fast.ops.noise import _box_muller, philox_normal_reference

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from losssurf_fast.ops import (  # noqa: E402
    lrt_linear_backward_triton,
    lrt_linear_triton,
    lrt_operand_triton,
    lrt_sample_triton,
    noise_triton,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [(F32, F32), (F16, F16), (F16, F32)] + ([(BF16, BF16), (BF16, F32)] if ON_GPU else [])
PLACES = [(0, 0, 0), (2**32 - 3, 2**33 + 6, 2**32 - 1)]  # row offset, col offset, sample
LINEAR_CASES = [  # (M, O, I), (dtype of x, of parameters), place
    ((1, 1, 1), (F32, F32), PLACES[0]),
    ((32, 32, 32), (F32, F32), PLACES[0]),
    *(((17, 63, 33), dtypes, PLACES[1]) for dtypes in DTYPES),
]
SMALL_TILE = Tile(32, 16, 16, 4, 2)  # several programs and steps at small sizes


@pytest.fixture(autouse=True)
def one_rounding_per_fma(monkeypatch):
    """The interpreter's fma rounds the product before it adds; ours goes by way of fp64, as the reference does."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


def seed_tensor(seed=-1234567890123456789):
    return torch.tensor(seed, device=DEVICE)


def to_device(tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


# ---- noise ---------------------------------------------------------------------------------------------------------


@triton.jit
def _words_kernel(out_ptr, seed_ptr, row_ptr, quad_ptr, sample_ptr):
    quad = tl.load(quad_ptr + tl.arange(0, 1)).to(tl.uint32)
    row = tl.load(row_ptr + tl.arange(0, 1))
    words = noise_triton.philox_words(tl.load(seed_ptr), row, quad, tl.load(sample_ptr))
    for i in tl.static_range(4):
        tl.store(out_ptr + i + tl.arange(0, 1), words[i].to(tl.int64))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_words_known_answers(counter, key, words):
    c0, c1, c2, c3 = (int(c, 16) for c in counter.split())
    low, high = (int(k, 16) for k in key.split())
    signed = lambda value: value - 2**64 if value >= 2**63 else value
    arguments = [signed(v) for v in (low | high << 32, c1 | c2 << 32, c0, c3)]
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](out, *(torch.tensor([v], device=DEVICE) for v in arguments))
    assert out.tolist() == [int(w, 16) for w in words.split()]


@triton.jit
def _box_muller_kernel(a_ptr, b_ptr, even_ptr, odd_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    even, odd = noise_triton.box_muller(tl.load(a_ptr + offs).to(tl.uint32), tl.load(b_ptr + offs).to(tl.uint32))
    tl.store(even_ptr + offs, even)
    tl.store(odd_ptr + offs, odd)


def test_box_muller_bits():
    """Words at the borders of quadrants, exponents and the logarithm's range; the sign of zero counts."""
    a = [0, 1, 2**31 - 1, 2**31, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 129, 2**32 - 1]
    b = [k * 2**29 + d for k in range(8) for d in (-1, 0, 1, 2)]
    a, b = (t.reshape(-1) % 2**32 for t in torch.meshgrid(torch.tensor(a), torch.tensor(b), indexing="ij"))
    even, odd = torch.empty(2, a.numel(), device=DEVICE)
    _box_muller_kernel[(1,)](*to_device((a, b)), even, odd, SIZE=a.numel(), **noise_triton.EXACT)
    for actual, expected in zip((even, odd), _box_muller(a, b), strict=True):
        assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("place", [*PLACES, (0, 1, 0), (5, 3, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (3, 1030), (1030, 3), (0, 4), (4, 0)])
def test_philox_normal_bits(shape, place):
    for dtype in (F64, F32, F16) + ((BF16,) if ON_GPU else ()):
        expected = philox_normal_reference(torch.tensor(seed_tensor().item()), *shape, *place, dtype)
        actual = noise_triton.philox_normal_triton(seed_tensor(), *shape, *place, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual.cpu(), expected)


@triton.jit
def _column_blocks_kernel(out_ptr, cols, SHIFT: tl.constexpr, BLOCK_N: tl.constexpr):
    tl.store(out_ptr, noise_triton.column_blocks(cols, SHIFT, BLOCK_N))


@pytest.mark.parametrize("cols", [1, 1021, 1022, 2**31 - 1, 2**33])
def test_column_blocks(cols):
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _column_blocks_kernel[(1,)](out, cols, SHIFT=3, BLOCK_N=1024)
    assert out.item() == -(-(cols + 3) // 1024)


# ---- lrt_sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 63), (150, 5), (0, 4)])
def test_lrt_sample(shape, place):
    for dtype, var_dtype in DTYPES:
        mean, var = torch.randn(shape).to(dtype), torch.randn(shape).to(var_dtype)  # half of var is negative
        grad = torch.randn(()).to(dtype).expand(shape)
        inputs, seed = (mean, var), torch.tensor(7)
        y = lrt_sample_triton.lrt_sample_triton(*to_device(inputs), seed.to(DEVICE), *place)
        eager, exact = (lrt.lrt_sample_reference(*t, seed, *place) for t in (inputs, double(inputs)))
        assert_as_good_as_eager(y.cpu(), eager, exact)
        inputs = (grad, var)
        grad_var = lrt_sample_triton.lrt_sample_backward_triton(*to_device(inputs), seed.to(DEVICE), *place)
        eager, exact = (lrt.lrt_sample_backward_reference(*t, seed, *place) for t in (inputs, double(inputs)))
        assert_as_good_as_eager(grad_var.cpu(), eager, exact)


def test_lrt_sample_extremes():
    """var = 0 gives finite values and gradients in fp16, NaN stays NaN."""
    mean, var = torch.ones(2, 4, dtype=F16), torch.zeros(2, 4, dtype=F16)
    var[1] = torch.nan
    seed = seed_tensor()
    y = lrt_sample_triton.lrt_sample_triton(mean.to(DEVICE), var.to(DEVICE), seed)
    grad_var = lrt_sample_triton.lrt_sample_backward_triton(mean.to(DEVICE), var.to(DEVICE), seed)
    assert torch.equal(y[0].cpu(), mean[0]) and y[1].isnan().all()
    assert (grad_var[0].abs() == torch.finfo(F16).max).all() and grad_var[1].isnan().all()


# ---- lrt_linear ----------------------------------------------------------------------------------------------------


def contiguous(tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def linear_kernels():
    """Every way ``lrt_linear`` can run: the launcher's choice, and each strategy forced."""
    yield lrt_linear_triton.lrt_linear_triton
    yield lambda *args, **operand: lrt_linear_triton.linear_two_gemms(*contiguous(args[:5]), *args[5:], **operand)
    yield lambda *args, **operand: lrt_linear_triton.linear_dual(
        *contiguous(args[:5]), *args[5:], SMALL_TILE, **operand
    )


def backward_kernels():
    passes = lrt_linear_backward_triton.backward_passes
    yield lrt_linear_backward_triton.lrt_linear_backward_triton
    for tile in (None, SMALL_TILE):
        yield lambda *args, tile=tile: passes(*contiguous(args[:4]), *args[4:9], args[9:], tile)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear(parameterization):
    """Every kernel is as good as eager in every dtype, at odd sizes and offsets."""
    seed = torch.tensor(5)
    for shape, (dtype, param_dtype), place in LINEAR_CASES:
        inputs = lrt_inputs(parameterization, shape, dtype, param_dtype)
        rest = (parameterization, *place)
        exact = lrt.lrt_linear_reference(*double(inputs), seed, *rest)
        eager = lrt.lrt_linear_reference(*inputs, seed, *rest)
        for kernel in linear_kernels():
            result = kernel(*to_device(inputs), seed.to(DEVICE), *rest)
            for actual, e, x in zip(result, eager, exact, strict=True):
                assert_as_good_as_eager(actual.cpu(), e, x)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_with_a_variance_operand(parameterization):
    """sigma^2 made ahead of time gives the bits of sigma^2 made on the way, in either strategy."""
    for shape, (dtype, param_dtype), place in LINEAR_CASES:
        inputs = to_device(lrt_inputs(parameterization, shape, dtype, param_dtype))
        sigma2, row_scale = lrt_operand_triton.lrt_variance_operand_triton(
            *inputs[1:3], parameterization, operand_dtype(dtype)
        )
        expected = lrt.variance_operand(*inputs[1:3], parameterization, F32).to(sigma2.dtype)
        torch.testing.assert_close(sigma2, expected, rtol=1e-2 if sigma2.dtype == BF16 else 1e-6, atol=0)
        assert row_scale.shape == (0,)
        rest = (seed_tensor(), parameterization, *place)
        for kernel in linear_kernels():
            for made_before, made_here in zip(
                kernel(*inputs, *rest, sigma2=sigma2), kernel(*inputs, *rest), strict=True
            ):
                assert torch.equal(made_before, made_here)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_backward(parameterization):
    """Every gradient is as good as eager's."""
    seed = torch.tensor(5)
    for shape, (dtype, param_dtype), place in [*LINEAR_CASES, ((160, 40, 5), (F32, F32), PLACES[0])]:
        inputs = lrt_inputs(parameterization, shape, dtype, param_dtype)
        exact_var = lrt.lrt_linear_reference(*double(inputs), seed, parameterization, *place)[1]
        var = lrt.lrt_linear_reference(*inputs, seed, parameterization, *place)[1]
        grad = torch.randn(shape[:2]).to(dtype)
        rest = (parameterization, [t is not None for t in inputs], *place)
        eager = lrt.lrt_linear_backward_reference(grad, *inputs[:3], True, var, seed, *rest)
        exact = lrt.lrt_linear_backward_reference(grad.double(), *double(inputs[:3]), True, exact_var, seed, *rest)
        for kernel in backward_kernels():
            grads = kernel(*to_device((grad, *inputs[:3])), True, *to_device((var, seed)), *rest)
            for actual, e, x in zip(grads, eager, exact, strict=True):
                if actual.numel() == 1:  # a maximum over one number says nothing
                    torch.testing.assert_close(actual.cpu(), e)
                else:
                    assert_as_good_as_eager(actual.cpu(), e, x)


@pytest.mark.parametrize("parameterization", lrt.PARAMETERIZATIONS)
def test_lrt_linear_backward_needed(parameterization):
    """Any subset of the gradients is that of all of them; an expanded grad is read as what it stands for."""
    inputs = to_device(lrt_inputs(parameterization, (5, 6, 7)))
    grad, seed = torch.randn(6, device=DEVICE).expand(5, 6), seed_tensor()
    var = lrt_linear_triton.lrt_linear_triton(*inputs, seed, parameterization)[1]
    possible = [t is not None for t in inputs]

    rest = (*inputs[:3], True, var, seed, parameterization)
    for kernel in backward_kernels():
        all_grads = kernel(grad.contiguous(), *rest, possible, 0, 0, 0)
        for needed in itertools.product(*[(False, True) if p else (False,) for p in possible]):
            for actual, full, need in zip(kernel(grad, *rest, needed, 0, 0, 0), all_grads, needed, strict=True):
                assert torch.equal(actual, full) if need else actual.shape == (0,)


@pytest.mark.parametrize("magnitude", [400.0, 1e-4])
def test_lrt_linear_fp16_range(magnitude):
    """Squares of fp16 inputs neither overflow nor vanish, in either strategy, forward and backward."""
    x, weight, _, _ = to_device(lrt_inputs("additive", (8, 16, 32), F16))
    x = x.sign() * magnitude
    scale = torch.full_like(weight, -9.0)
    seed = torch.tensor(3)
    expected = (x.double().square() @ scale.double().exp().t()).cpu()
    for kernel in linear_kernels():
        y, var = kernel(x, weight, scale, None, seed.to(DEVICE), "additive", 0, 0, 0)
        torch.testing.assert_close(var.double().cpu(), expected, rtol=2e-3, atol=0)
        assert y.isfinite().all()
    needed = [True, True, True, False]
    for kernel in backward_kernels():
        grads = kernel(torch.ones_like(y), x, weight, scale, False, var, seed.to(DEVICE), "additive", needed, 0, 0, 0)
        assert all(g.isfinite().all() for g in grads)


def test_lrt_linear_without_variance():
    """log sigma^2 = -inf gives the plain linear layer, to the 1e-8 that the epsilon in the square root leaves."""
    x, weight, scale, bias = to_device(lrt_inputs("additive", (9, 12, 20)))
    scale = torch.full_like(scale, -torch.inf)
    for kernel in linear_kernels():
        y, var = kernel(x, weight, scale, bias, seed_tensor(), "additive", 0, 0, 0)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
        assert (var == 0).all()


def test_lrt_linear_shards():
    """A shard of the rows and features draws what the whole layer draws, whatever the tiles."""
    x, weight, scale, bias = to_device(lrt_inputs("neuron", (20, 37, 16)))
    whole = [kernel(x, weight, scale, bias, seed_tensor(), "neuron", 0, 0, 0)[0] for kernel in linear_kernels()]
    for kernel in linear_kernels():
        part = kernel(x[3:], weight[5:], scale[5:], bias[5:], seed_tensor(), "neuron", 3, 5, 0)[0]
        for y in whole:
            torch.testing.assert_close(part, y[3:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 3, 0)])
def test_lrt_linear_empty(shape):
    inputs = to_device(lrt_inputs("weight", shape))
    rest = (seed_tensor(), "weight")
    y, var = lrt_linear_triton.lrt_linear_triton(*inputs, *rest)
    expected = lrt.lrt_linear_reference(*inputs, *rest)
    torch.testing.assert_close((y, var), expected)
    rest = (True, var, *rest, [True] * 4)
    grads = lrt_linear_backward_triton.lrt_linear_backward_triton(y, *inputs[:3], *rest)
    torch.testing.assert_close(grads, lrt.lrt_linear_backward_reference(y, *inputs[:3], *rest))


# ---- dispatch ------------------------------------------------------------------------------------------------------


def test_kernels_are_attached():
    linear = ("lrt_linear", "lrt_linear_backward", "lrt_variance_operand")
    for op in ("philox_normal", "lrt_sample", "lrt_sample_backward", *linear):
        assert lsf.kernel_for(op, "cuda") == "Triton"


def test_linear_strategy():
    choose = lambda rows, dtype=BF16, name="additive", capability=(9, 0), out=4096, features=4096: linear_strategy(
        rows, out, features, dtype, name, capability
    )
    assert choose(1) == choose(64) == choose(128) == "dual"
    assert choose(129) == choose(8192) == "two_gemms"
    assert choose(256, name="variance") == "dual" and choose(257, name="variance") == "two_gemms"
    assert choose(64, F32) == "dual" and choose(65, F32) == "two_gemms"
    assert choose(8192, F16) == "dual"  # the library would multiply in fp32
    assert choose(64, capability=(7, 5)) == choose(64, features=0) == "two_gemms"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_dual_tile(capability):
    """Two stages at least, all of them in shared memory; rows of 64 only where the tensor cores take 64."""
    for rows, (x, p) in itertools.product(
        (1, 16, 17, 64, 65, 4096), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]
    ):
        tile = dual_tile(rows, x, p, capability)
        stage = tile.block_k * (tile.block_m * x.itemsize + 2 * tile.block_n * p.itemsize)
        assert 2 <= tile.num_stages <= 4 and stage * (tile.num_stages - 1) <= shared_memory(capability)
        assert tile.block_m == 16 or tile.block_m == (64 if capability[0] in (9, 10) else 32)


def test_tiles_have_room_for_what_is_loaded():
    """Not for the scale where sigma^2 is ready, nor for one alpha for all."""
    x, weight, wide = torch.empty(64, 128, dtype=BF16), torch.empty(256, 128, dtype=BF16), torch.empty(256, 128)
    narrow_tile, wide_tile = (dual_tile(64, BF16, dtype, (9, 0)) for dtype in (BF16, F32))
    assert narrow_tile != wide_tile
    for arguments, expected in (
        ((None, wide, "variance"), wide_tile),
        ((None, wide, "variance", weight), narrow_tile),
        ((weight, wide, "additive"), wide_tile),
        ((weight, wide, "additive", weight), narrow_tile),
        ((wide, wide, "additive", weight), wide_tile),
        ((weight, torch.empty(1), "layer"), narrow_tile),
    ):
        assert lrt_linear_triton.choose(x, *arguments) == expected


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 512])
def test_lrt_linear_in_a_cuda_graph(rows):
    """Forward and backward can be captured, and a replay draws with the seed that is in memory then."""
    inputs = [t.cuda().contiguous().requires_grad_() for t in lrt_inputs("additive", (rows, 128, 96), BF16)]
    seed = torch.tensor(1, device="cuda")

    def step():
        y = lsf.ops.lrt_linear(*inputs, parameterization="additive", seed=seed)
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected)
