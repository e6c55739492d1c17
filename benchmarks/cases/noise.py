"""Normal noise against torch's generators."""

import torch

from benchmarks.cases import GPU_COPY, Case, Setup, dtype_of
from losssurf_fast.ops.noise import philox_normal

SIZES = {"cpu": (2**14, 2**20, 2**24), "cuda": (2**20, 2**24, 2**27)}
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


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    on_gpu = device_type == "cuda"
    sizes = (64,) if tiny else SIZES[device_type]
    chosen = sizes[-1] if on_gpu else sizes[len(sizes) // 2]
    result = []
    for dtype in ("fp32", "bf16"):
        for size in sizes if dtype == "fp32" else (chosen,):
            headline = size == chosen and dtype == "fp32"
            result.append(
                Case(
                    op="philox_normal",
                    shape=(size,),
                    mode="forward",
                    dtype=dtype,
                    setup=_setup(size, dtype_of(dtype)),
                    bytes=size * dtype_of(dtype).itemsize,
                    flops=0,
                    targets={1: 5.0, 2: 10.0} if headline and not on_gpu else {},
                    copy_target=GPU_COPY if on_gpu and size == chosen else None,
                    headline=headline,
                )
            )
    return result
