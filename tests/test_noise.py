"""Words, bits, accuracy and statistics of the noise; test_noise_calling.py has the rest."""

import itertools
import pathlib
import subprocess

import numpy as np
import pytest
import torch
from common import BF16, F16, F32, F64, INSTRUCTION_SETS, instruction_set

from losssurf_fast.ops import philox_normal
from losssurf_fast.ops.noise import _box_muller, philox_normal_reference, philox_words_reference

ROOT = pathlib.Path(__file__).parent.parent
ops = torch.ops.losssurf_fast

# key, counter, words: kat_vectors of Random123, Philox4x32-10
KNOWN_ANSWERS = [
    ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# seed, sample, row, first column, bits of four normals. Whoever changes these changes what every seed means.
GOLDEN = [
    (0, 0, 0, 0, "3f7dbb31 bf6cb6b0 bf1e1b9e bef6d1b1"),
    (-1, 2**32 - 1, 2**63 - 1, 2**34 - 4, "3ea93ec0 3f40c56a 3f03b2d2 bf66c681"),
    (1234567890123456789, 3, 2**32 + 5, 1, "bf899bb5 bfc4e961 3bd79a2e 3db235e5"),
]

# rows, cols, row_offset, col_offset, sample: whole quads and not, narrow and wide, past every carry
PLACES = [
    (1, 1, 0, 0, 0),
    (3, 4, 0, 0, 0),
    (700, 1, 0, 3, 0),
    (300, 3, 2**32 - 100, 2, 2**32 - 1),
    (257, 10, 3, 1, 5),
    (64, 64, 0, 0, 0),
    (40, 127, 0, 0, 0),
    (40, 128, 2**32 - 7, 4, 0),
    (21, 132, 0, 6, 1),
    (3, 2051, 1, 1, 1),
    (2, 4096, 2**62, 0, 0),
    (5, 1001, 2**63 - 5, 3, 1),
    (1, 5000, 0, 2**34 - 5000, 0),
    (1, 40001, 0, 0, 0),
]


def words_of(text):
    return [int(word, 16) for word in text.split()]


def seed_of(key):
    low, high = words_of(key)
    return torch.tensor((high << 32 | low) - (2**64 if high >> 31 else 0))


def bits(x):
    return x.view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


@pytest.fixture(params=INSTRUCTION_SETS)
def each_instruction_set(request):
    """Each set's kernels in turn; the best set's once more in place of one that this CPU lacks."""
    with instruction_set(request.param):
        yield


@pytest.fixture(scope="module")
def scalar_philox(tmp_path_factory):
    """csrc/philox.h without vectors, as CUDA sees it: call(mode, uint32 array) -> bytes."""
    program = tmp_path_factory.mktemp("philox") / "philox_scalar"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/philox_scalar.cpp"), "-o", str(program)], check=True)
    return lambda mode, array: (
        subprocess.run([program, mode], input=array.astype("<u4").tobytes(), stdout=subprocess.PIPE, check=True).stdout
    )


# ---- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_words_known_answers_reference(key, counter, words):
    assert philox_words_reference(seed_of(key), torch.tensor(words_of(counter))).tolist() == words_of(words)


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_words_known_answers(each_instruction_set, key, counter, words):
    assert ops.philox_words(seed_of(key), torch.tensor(words_of(counter))).tolist() == words_of(words)


@pytest.mark.parametrize("key, counter, words", KNOWN_ANSWERS)
def test_words_known_answers_scalar(scalar_philox, key, counter, words):
    out = scalar_philox("words", np.array(words_of(key) + words_of(counter)))
    assert np.frombuffer(out, "<u4").tolist() == words_of(words)


def test_words_equal(each_instruction_set, scalar_philox):
    seed = torch.tensor(-987654321987654321)
    counters = torch.randint(0, 2**32, (7, 143, 6))[..., 1:5]  # not contiguous, no multiple of the lanes
    expected = philox_words_reference(seed, counters)
    assert torch.equal(ops.philox_words(seed, counters), expected)
    key = np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF])
    flat = counters.reshape(-1, 4).numpy()
    scalar = np.frombuffer(scalar_philox("words", np.hstack([np.tile(key, (len(flat), 1)), flat])), "<u4")
    assert scalar.tolist() == expected.flatten().tolist()


# ---- bits of the normals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, sample, row, col, golden", GOLDEN)
def test_normals_golden(each_instruction_set, seed, sample, row, col, golden):
    where = dict(row_offset=row, col_offset=col, sample=sample)
    assert [x & 0xFFFFFFFF for x in bits(philox_normal(4, seed, **where)).tolist()] == words_of(golden)
    reference = philox_normal_reference(torch.tensor(seed), 1, 4, row, col, sample)
    assert [x & 0xFFFFFFFF for x in bits(reference)[0].tolist()] == words_of(golden)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_normals_bit_equal(each_instruction_set, place):
    seed = torch.tensor(-12345678901234567)
    expected = philox_normal_reference(seed, *place)
    assert_same_bits(ops.philox_normal(seed, *place), expected)
    for dtype in (F64, BF16, F16):
        rounded = ops.philox_normal(seed, *place, dtype=dtype)
        assert_same_bits(rounded, expected.to(dtype))
        assert_same_bits(rounded, philox_normal_reference(seed, *place, dtype=dtype))


@pytest.mark.parametrize("shape", [(300, 257), (1, 70001), (5000, 10), (64, 4096)], ids=str)
def test_normals_threads(shape):
    threads = torch.get_num_threads()
    try:
        draws = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            draws.append(philox_normal(shape, 7))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(draws[0], draws[1])
    assert_same_bits(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_normals_of_parts(each_instruction_set, dtype):
    where = dict(row_offset=2**32 - 9, col_offset=5, sample=3)
    whole = philox_normal((23, 301), 11, dtype=dtype, **where)
    row_cuts, col_cuts = [0, 1, 8, 9, 23], [0, 1, 2, 7, 64, 130, 298, 301]
    for top, bottom in itertools.pairwise(row_cuts):
        for left, right in itertools.pairwise(col_cuts):
            part = philox_normal(
                (bottom - top, right - left), 11, dtype=dtype, sample=3,
                row_offset=where["row_offset"] + top, col_offset=where["col_offset"] + left,
            )  # fmt: skip
            assert_same_bits(part, whole[top:bottom, left:right].clone())


def test_normals_of_any_shape():
    expected = philox_normal((6, 5), 3)
    assert_same_bits(philox_normal((2, 3, 5), 3), expected.view(2, 3, 5))
    assert_same_bits(philox_normal((5,), 3), expected[0])
    assert_same_bits(philox_normal(5, 3), expected[0])
    assert_same_bits(philox_normal((), 3), expected[0, 0])
    assert_same_bits(philox_normal(torch.empty(6, 5, dtype=F16), 3), expected.half())
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 3)):
        assert philox_normal(shape, 3).shape == shape


def test_normals_of_other_seeds_differ():
    draws = [philox_normal(64, seed, sample=sample) for seed in (0, 1, 2**32, -1) for sample in (0, 1)]
    draws.append(philox_normal(64, 0, row_offset=1))
    draws.append(philox_normal(64, 0, row_offset=2**32))
    values = torch.cat(draws).tolist()
    assert len(set(values)) == len(values)


@pytest.mark.slow  # 4.3 GB
def test_normals_past_int32():
    n = 2**31 + 8
    out = philox_normal(n, 5, dtype=BF16)
    assert_same_bits(out[-100:], philox_normal(100, 5, col_offset=n - 100, dtype=BF16))
    del out
    out = philox_normal((2**21, 1025), 5, dtype=BF16)
    assert_same_bits(out[-1], philox_normal(1025, 5, row_offset=2**21 - 1, dtype=BF16))


# ---- accuracy --------------------------------------------------------------------------------------------------


def exact_normals(a, b):
    """The transform of the fp32 u in float64, for words (a, b) as int64."""
    u = (a.float().double() * 2.0**-32 + 2.0**-33).float().double()
    r, theta = (-2 * u.log()).sqrt(), b.double() * (2 * torch.pi / 2**32)
    return torch.stack((r * theta.cos(), r * theta.sin()), dim=-1)


def extreme_words():
    edges = torch.arange(9)[:, None] * 2**29 + torch.tensor([-130, -2, -1, 0, 1, 2, 130])  # octants
    b = torch.cat((edges.flatten() % 2**32, torch.randint(0, 2**32, (2000,))))
    powers = 2 ** torch.arange(33)
    mantissas = (torch.tensor([0.5, 0.75, 1.0, 1.5])[:, None] * powers).long().flatten()  # where the exponent changes
    a = (mantissas[:, None] + torch.tensor([-129, -2, -1, 0, 1, 2, 129])).flatten()
    a = torch.cat((a[(a >= 0) & (a < 2**32)], torch.randint(0, 2**32, (500,)))).unique()
    assert a[0] == 0 and a[-1] == 2**32 - 1
    a, b = torch.meshgrid(a, b, indexing="ij")
    return a.flatten(), b.flatten()


def test_normals_accuracy(each_instruction_set):
    seed, rows, quads = torch.tensor(17), 1000, 250
    row, quad = torch.meshgrid(torch.arange(rows), torch.arange(quads), indexing="ij")
    zero = torch.zeros_like(row)
    a, b = ops.philox_words(seed, torch.stack((quad, row, zero, zero), -1)).view(rows, 2 * quads, 2).unbind(-1)
    error = philox_normal((rows, 4 * quads), seed).double() - exact_normals(a, b).view(rows, 4 * quads)
    assert error.abs().max() <= 1e-6
    assert error.square().mean().sqrt() <= 2.0**-24  # half an ulp at 1


def test_normals_accuracy_of_extreme_words(scalar_philox):
    a, b = extreme_words()
    out = np.frombuffer(scalar_philox("normals", torch.stack((a, b), -1).numpy()), "<f4").copy()
    normals = torch.from_numpy(out).view(-1, 2)
    assert (normals.double() - exact_normals(a, b)).abs().max() <= 1e-6
    assert_same_bits(torch.stack(_box_muller(a, b), -1), normals)


# ---- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1000, 1000), (100000, 10)], ids=str)
def test_normals_statistics(shape):
    x = philox_normal(shape, 20240229).double()
    n = x.numel()
    for value, expected, variance in (
        (x.mean(), 0, 1),
        (x.square().mean(), 1, 2),
        (x.pow(3).mean(), 0, 15),
        (x.pow(4).mean(), 3, 96),
        ((x.abs() > 3).double().mean(), 0.0026997961, 0.0026925),
    ):
        assert abs(value - expected) <= 5 * (variance / n) ** 0.5
    other_sample = philox_normal(shape, 20240229, sample=1).double()
    other_seed = philox_normal(shape, 20240230).double()
    pairs = [(x[:, lag:], x[:, :-lag]) for lag in (1, 2, 3, 4, 5, 8)]
    pairs += [(x[lag:], x[:-lag]) for lag in (1, 2, 3, 4)]
    pairs += [(x, other_sample), (x, other_seed), (x[:, 1:], other_sample[:, :-1])]
    for left, right in pairs:
        count = left.numel()
        assert abs((left * right).mean()) <= 5 / count**0.5
        assert abs(((left**2 - 1) * (right**2 - 1)).mean()) <= 5 * 2 / count**0.5
