"""philox_normal among torch's transforms, and what it refuses. Its numbers: test_noise.py."""

import pytest
import torch
from common import BF16, F16, F32, F64
from torch._subclasses.fake_tensor import FakeTensorMode

from losssurf_fast.ops import philox_normal
from losssurf_fast.ops.noise import MAX_COLUMNS, as_seed, check_stream

ops = torch.ops.losssurf_fast
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "arguments",
    [(3, 5), (0, 4), (2, 9, 2**40, 3, 7), (1, 1, 0, 0, 0, F64), (4, 70, 0, 1, 0, BF16), (2, 8, 1, 4, 1, F16)],
    ids=str,
)
def test_opcheck(arguments):
    torch.library.opcheck(ops.philox_normal.default, (torch.tensor(3), *arguments))


def test_words_opcheck():
    for counters in (torch.randint(0, 2**32, (5, 4)), torch.randint(0, 2**32, (3, 2, 8))[..., ::2]):
        torch.library.opcheck(ops.philox_words.default, (torch.tensor(3), counters))


# ---- compile, vmap, fake tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def noisy(x, seed, row_offset):
        return x + philox_normal(x, seed, row_offset=row_offset, col_offset=3)

    compiled = torch.compile(noisy, fullgraph=True, dynamic=dynamic)
    for rows, cols, offset in ((6, 10, 0), (7, 12, 2**33)):
        x, seed = torch.randn(rows, cols), torch.tensor(rows)
        assert torch.equal(compiled(x, seed, offset), noisy(x, seed, offset))


def test_compile_reads_the_seed_at_run_time():
    compiled = torch.compile(lambda seed: philox_normal((3, 5), seed), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2, -3):
            assert torch.equal(compiled(torch.tensor(seed)), philox_normal((3, 5), seed))


def test_compile_draws_the_seed_from_the_generator():
    def noisy(x):
        return x + philox_normal(x, as_seed("noisy", None, x.device))

    compiled = torch.compile(noisy, fullgraph=True, backend="aot_eager")
    x = torch.zeros(4, 6)
    torch.manual_seed(1)
    expected = [noisy(x), noisy(x)]
    torch.manual_seed(1)
    assert torch.equal(compiled(x), expected[0]) and torch.equal(compiled(x), expected[1])


def test_vmap_over_seeds():
    seeds = torch.tensor([[4, -7], [0, 2**62]])
    expected = torch.stack([torch.stack([philox_normal((3, 5), int(s), col_offset=2) for s in row]) for row in seeds])
    draw = lambda seed: philox_normal((3, 5), seed, col_offset=2)
    assert torch.equal(torch.vmap(draw)(seeds[0]), expected[0])
    assert torch.equal(torch.vmap(torch.vmap(draw))(seeds), expected)
    assert torch.equal(torch.vmap(torch.vmap(draw), in_dims=1)(seeds), expected.transpose(0, 1))


def test_vmap_over_another_tensor():
    x = torch.randn(4, 3, 5)
    noisy = lambda row: row + philox_normal(row, 9)
    assert torch.equal(torch.vmap(noisy)(x), x + philox_normal((3, 5), 9))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_fake(dtype):
    with FakeTensorMode():
        out = philox_normal((2, 3, 5), 1, dtype=dtype)
        assert isinstance(out, torch._subclasses.FakeTensor)
    assert out.shape == (2, 3, 5) and out.dtype == dtype and out.is_contiguous()
    out = philox_normal((2, 3, 5), 1, dtype=dtype, device="meta")
    assert out.is_meta and out.shape == (2, 3, 5) and out.dtype == dtype


def test_noise_has_no_gradient():
    x = torch.ones(3, 4, requires_grad=True)
    noise = philox_normal(x, 1)
    assert not noise.requires_grad
    (x * noise).sum().backward()
    assert torch.equal(x.grad, noise)


def test_result_owns_its_memory():
    first, second = philox_normal(64, 1), philox_normal(64, 1)
    first.zero_()
    assert second.any() and torch.equal(second, philox_normal(64, 1))


# ---- seeds -------------------------------------------------------------------------------------------------------


def test_int_and_tensor_seeds_agree():
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        assert torch.equal(philox_normal((3, 5), seed), philox_normal((3, 5), torch.tensor(seed)))


def test_no_seed_follows_the_default_generator():
    torch.manual_seed(3)
    first, second = as_seed("f", None, CPU), as_seed("f", None, CPU)
    assert first.dtype == torch.int64 and first.dim() == 0 and first != second
    torch.manual_seed(3)
    with torch.random.fork_rng():
        assert as_seed("f", None, CPU) == first
    assert as_seed("f", None, CPU) == first


def test_given_seed_leaves_the_generator_alone():
    before = torch.get_rng_state()
    philox_normal((3, 5), 1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(seed=None), TypeError, "philox_normal: seed must be an int or a 0-d int64 tensor, got None"),
        (dict(seed=1.5), TypeError, "philox_normal: seed must be an int or a 0-d int64 tensor, got float"),
        (dict(seed=True), TypeError, "philox_normal: seed must be an int or a 0-d int64 tensor, got bool"),
        (dict(seed=2**63), ValueError, r"philox_normal: seed must fit in 64 bits, got 9223372036854775808"),
        (dict(seed=torch.tensor(1.0)), TypeError, "philox_normal: seed must be .* got torch.float32 tensor"),
        (dict(seed=torch.tensor([1])), ValueError, r"philox_normal: seed must be a 0-d tensor, got shape \(1,\)"),
        (dict(seed=torch.tensor(1), device="meta"), ValueError, "philox_normal: seed must be on meta, got cpu"),
        (dict(row_offset=-1), ValueError, r"philox_normal: row_offset must lie in \[0, 9223.*\), got -1"),
        (dict(row_offset=2**63), ValueError, r"philox_normal: row_offset must lie in .* got 9223372036854775808"),
        (dict(row_offset=1.0), TypeError, "philox_normal: row_offset must be an int, got float"),
        (dict(sample=-1), ValueError, r"philox_normal: sample must lie in \[0, 4294967296\), got -1"),
        (dict(sample=2**32), ValueError, r"philox_normal: sample must lie in \[0, 4294967296\), got 4294967296"),
        (dict(sample=False), TypeError, "philox_normal: sample must be an int, got bool"),
        (dict(col_offset="2"), TypeError, "philox_normal: col_offset must be an int, got str"),
        (dict(col_offset=-4), ValueError, r"philox_normal: columns col_offset \+ \[0, 5\) .* got col_offset -4"),
        (dict(col_offset=MAX_COLUMNS - 4), ValueError, r"must lie in \[0, 2\*\*34\), got col_offset 17179869180"),
        (dict(shape=(3, -5)), ValueError, r"philox_normal: sizes must not be negative, got \(3, -5\)"),
        (dict(dtype=torch.int32), TypeError, "philox_normal: dtype must be one of .*, got torch.int32"),
        (dict(shape=torch.ones(2, dtype=torch.bool)), TypeError, "philox_normal: dtype must be one of .* torch.bool"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        philox_normal(**{"shape": (3, 5), "seed": 1, **arguments})


def test_device_0_is_a_gpu_and_not_the_default():
    with pytest.raises((RuntimeError, ValueError), match="accelerator|cuda:0"):
        philox_normal((3, 5), torch.tensor(1), device=0)


def test_errors_name_the_caller():
    with pytest.raises(ValueError, match="lrt_linear: sample must lie in"):
        check_stream("lrt_linear", 0, 0, -1, 5)
    with pytest.raises(TypeError, match="lrt_linear: seed must be"):
        as_seed("lrt_linear", "7", CPU)
    check_stream("f", 2**63 - 1, MAX_COLUMNS - 5, 2**32 - 1, 5)


# ---- CUDA C++ ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize(
    "place",
    [(300, 257, 2**32 - 7, 3, 5), (5000, 10, 0, 0, 0), (7, 4096, 0, 0, 1), (3, 2050, 2**62, 1, 2**32 - 1), (0, 4)],
    ids=str,
)
def test_cuda_kernel_draws_the_same_bits(dtype, place):
    seed = torch.tensor(-12345678901234567)
    expected = ops.philox_normal(seed, *place, dtype=dtype)
    assert torch.equal(ops.philox_normal_cuda(seed.cuda(), *place, dtype=dtype).cpu(), expected)
    assert torch.equal(ops.philox_normal(seed.cuda(), *place, dtype=dtype).cpu(), expected)
