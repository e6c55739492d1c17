"""A whole model's weights on a curve, and their gradients to the bends that are trained.

Full is what a curve adds to a step of training: the weights are made, and given gradients of theirs become gradients of
the inner bends. Bytes of an element of w bytes, R bends read and T trained: forward (R + 1) w, full (R + T + 2) w.
Targets of full on one thread with three bends: many small tensors 4x eager and 2x torch, few large ones 1.8x and 1.4x.
A step of training a whole curve is in curve_step.py.
"""

import torch

from benchmarks.cases import GPU_COPY, Case, Setup, curve_step, dtype_of
from benchmarks.cases.averaging import lists, numel
from losssurf_fast.ops import curve_coefficients, curve_weights

PLACE = 0.3


def eager(bends, coefficients):
    """Each tensor by itself, as timgaripov/dnn-mode-connectivity combines the bends of a layer (curves.py)."""
    weights = []
    for column in zip(*bends, strict=True):
        weight = None
        for c, bend in zip(coefficients, column, strict=True):
            if weight is None:
                weight = bend * c
            else:
                weight += bend * c
        weights.append(weight)
    return weights


class ForeachCurve(torch.autograd.Function):
    """What torch's own passes over lists make of it; a quarter faster than to leave their gradients to autograd."""

    @staticmethod
    def forward(ctx, coefficients, *bends):
        ctx.coefficients, ctx.needed = coefficients, ctx.needs_input_grad[1:]
        size = len(bends) // len(coefficients)
        terms = [(c, bends[j * size : (j + 1) * size]) for j, c in enumerate(coefficients) if c != 0]
        (c, first), *others = terms
        weights = torch._foreach_mul(first, c)
        for c, bend in others:
            torch._foreach_add_(weights, bend, alpha=c)
        return tuple(weights)

    @staticmethod
    def backward(ctx, *grads):
        result, size = [], len(grads)
        for j, c in enumerate(ctx.coefficients):
            needed = ctx.needed[j * size]
            result += torch._foreach_mul(grads, c) if needed else size * [None]
        return None, *result


def foreach(bends, numbers):
    return ForeachCurve.apply(numbers, *[w for bend in bends for w in bend])


def _setup(shapes, dtype, num_bends, kind, full):
    def setup(device: torch.device) -> Setup:
        draw = torch.Generator(device).manual_seed(0)
        make = lambda: [torch.randn(s, device=device, generator=draw).to(dtype_of(dtype)) for s in shapes]
        bends = [[w.requires_grad_(0 < j < num_bends - 1) for w in make()] for j in range(num_bends)]
        coefficients = curve_coefficients(PLACE, num_bends, kind).to(device)
        # The floor's lists are as many bytes in fp32, which torch passes over faster than over bf16.
        words = [-(-w.nbytes // 4) for w in bends[0]]
        plain = lambda count: [[torch.ones(n, device=device) for n in words] for _ in range(count)]
        read, (made,), written = plain(_num_read(num_bends, kind) - 1), plain(1), plain(num_bends - 3)

        @torch.no_grad()
        def floor():
            """The same traffic; what is written lies where something was read, so that no line is fetched for it."""
            if len(read) == 1:
                torch._foreach_add_(made, read[0], alpha=0.0)
            else:
                torch._foreach_addcmul_(made, read[0], read[1], value=0.0)
            for others in read[2:]:
                torch._foreach_max(others)
            if full:
                torch._foreach_mul_(read[0], 1.0)
                for others in written:
                    torch._foreach_zero_(others)

        numbers = coefficients.tolist()  # known on the CPU, where t is drawn: no step waits for a GPU to tell
        library = lambda bends, _: foreach(bends, numbers)
        providers = {"eager": eager, "compiled": eager, "torch": library, "ours": curve_weights}
        return Setup((bends, coefficients), providers, floor)

    return setup


def _num_read(num_bends: int, kind: str) -> int:
    return int(curve_coefficients(PLACE, num_bends, kind).count_nonzero())


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    on_gpu = device_type == "cuda"
    small, large = lists(tiny, device_type)
    small = large if tiny else small  # no empty tensor

    def case(shapes, dtype, mode, num_bends=3, kind="bezier", goal=None, headline=False):
        read, trained, width = _num_read(num_bends, kind), num_bends - 2, dtype_of(dtype).itemsize
        passes = read + 1 + (mode == "full") * (1 + trained)
        return Case(
            op="curve_weights",
            variant=f"{kind}, {num_bends} bends, {len(shapes)} tensors",
            shape=(numel(shapes),),
            mode=mode,
            dtype=dtype,
            setup=_setup(shapes, dtype, num_bends, kind, mode == "full"),
            bytes=passes * width * numel(shapes),
            flops=(2 * read - 1 + (mode == "full") * trained) * numel(shapes),
            targets={} if goal is None or on_gpu else {1: goal},
            copy_target=GPU_COPY if on_gpu and shapes is large else None,
            compiles=not on_gpu or shapes is large,
            headline=headline or (on_gpu and shapes is large and dtype == "fp32"),
        )

    result = []
    for shapes, goal in ((small, 4.0), (large, 1.8)):
        for dtype in ("fp32", "bf16"):
            result.append(case(shapes, dtype, "forward"))
            result.append(case(shapes, dtype, "full", goal=goal if dtype == "fp32" else None, headline=dtype == "fp32"))
    result.append(case(small, "fp32", "full", num_bends=5))
    result.append(case(small, "fp32", "full", num_bends=5, kind="polychain"))
    return result + curve_step.cases(tiny, device_type)
