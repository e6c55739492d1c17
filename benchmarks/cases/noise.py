"""Normal noise against torch's generators."""

import torch

from benchmarks.cases import Case, Setup, dtype_of
from losssurf_fast.ops.noise import philox_normal

SIZES = (2**14, 2**20, 2**24)
SEED = 20260511


def _setup(size: int, dtype: torch.dtype):
    def setup(device: torch.device) -> Setup:
        generator = torch.Generator(device)
        out = torch.empty(size, dtype=dtype, device=device)

        def randn():
            return torch.randn(size, dtype=dtype, device=device)

        return Setup(
            inputs=(),
            providers={
                # Noise that can be drawn again is what philox_normal gives; this is how a user gets it.
                "eager": lambda: torch.randn(size, dtype=dtype, device=device, generator=generator.manual_seed(SEED)),
                "compiled": randn,  # torch.compile takes no generator
                "torch": randn,
                "ours": lambda: philox_normal(size, SEED, dtype=dtype, device=device),
            },
            floor=lambda: out.fill_(1.0),
        )

    return setup


def cases(tiny: bool = False) -> list[Case]:
    result = []
    for dtype in ("fp32", "bf16"):
        for size in (64,) if tiny else SIZES if dtype == "fp32" else SIZES[1:2]:
            headline = size == 2**20 and dtype == "fp32"
            result.append(
                Case(
                    op="philox_normal",
                    shape=(size,),
                    mode="forward",
                    dtype=dtype,
                    setup=_setup(size, dtype_of(dtype)),
                    bytes=size * dtype_of(dtype).itemsize,
                    flops=0,
                    targets={1: 5.0, 2: 10.0} if headline else {},
                    headline=headline,
                )
            )
    return result
