"""One update of a running average of a whole model, against torch's own ways to do it."""

import functools
import itertools

import torch
from torch import nn
from torch.optim import swa_utils

from benchmarks.cases import GPU_COPY, Case, Setup, dtype_of
from losssurf_fast.averaging import AveragedModel
from losssurf_fast.ops import ema_, lerp_

WEIGHT = 1 / 11  # of the eleventh model


def convolutions(kernels: int, channels: int) -> list[tuple[int, ...]]:
    """Shapes of ``kernels`` convolutions with their BatchNorm."""
    return kernels * [(channels, channels, 3, 3), (channels,), (channels,)]


# Many small tensors: 167 of a residual network, 1.7M elements in all.
SMALL = [*convolutions(2, 16), *convolutions(9, 32), *convolutions(44, 64), (10, 64), (10,)]
# Few large ones: 20 of 5M.
LARGE = 20 * [(5000, 1000)]
TINY = [(3, 5), (2,), (0,)]
# On a GPU the small ones, 7.4M elements, leave its L2 cache as well.
GPU_SMALL = 200 * [(64, 64, 3, 3)]


def lists(tiny: bool, device_type: str) -> tuple[list, list]:
    """Shapes of (many small tensors, few large ones)."""
    if tiny:
        return TINY, TINY[:2]
    return (GPU_SMALL if device_type == "cuda" else SMALL), LARGE


def numel(shapes) -> int:
    return sum(functools.reduce(lambda a, b: a * b, shape, 1) for shape in shapes)


class Weights(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, shapes, dtype: str, device: torch.device):
        super().__init__()
        draw = torch.Generator(device).manual_seed(0)
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, device=device, generator=draw).to(dtype_of(dtype))
            self.register_parameter(f"weight_{i}", nn.Parameter(value))


def eager_lerp(averages, values):
    torch._foreach_lerp_(averages, values, WEIGHT)


def eager_lerp_widening(averages, values):
    torch._foreach_lerp_(averages, [v.float() for v in values], WEIGHT)


def eager_ema(averages, values):
    for k, decay in enumerate((0.9, 0.99, 0.999)):
        torch._foreach_lerp_(averages[k], values, 1 - decay)


def _operator(shapes, dtype, eager, ours, copies=None):
    """``copies`` lists of averages, or one list alone, of the same values."""

    def setup(device: torch.device) -> Setup:
        values = [p.detach() for p in Weights(shapes, dtype, device).parameters()]
        draw = lambda: [v.float().mul(0.5) for v in values]
        averages = draw() if copies is None else [draw() for _ in range(copies)]
        every = averages if copies is None else list(itertools.chain(*averages))

        def read_and_write():
            for average in every:
                average.add_(1e-3)

        return Setup((averages, values), {"eager": eager, "compiled": eager, "ours": ours}, read_and_write)

    return setup


def _model(shapes, dtype, average_dtype=None):
    """The update of a model by each class; torch's averages have the model's dtype, ours are fp32 or of 8 bits."""

    def setup(device: torch.device) -> Setup:
        model = Weights(shapes, dtype, device)
        default, multi = swa_utils.AveragedModel(model), swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_swa_multi_avg_fn()
        )  # fmt: skip
        ours = AveragedModel(model, average_dtype=average_dtype)
        for averaged in (default, multi, ours):
            averaged.update_parameters(model)
        averages = [p.detach() for p in ours.module.parameters()]

        def read_and_write():
            for average in averages:
                average.add_(1e-3)

        providers = {
            "eager": default.update_parameters,
            "torch": multi.update_parameters,
            "ours": ours.update_parameters,
        }
        return Setup((model,), providers, read_and_write)

    return setup


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    on_gpu = device_type == "cuda"
    small, large = lists(tiny, device_type)

    def case(op, variant, shapes, dtype, setup, width, flops=2, goal=None, headline=False):
        """``width`` bytes and ``flops`` operations for each element; ``goal`` for one thread."""
        return Case(
            op=op,
            variant=f"{variant}{len(shapes)} tensors",
            shape=(numel(shapes),),
            mode="forward",
            dtype=dtype,
            setup=setup,
            bytes=width * numel(shapes),
            flops=flops * numel(shapes),
            targets={} if goal is None or on_gpu else {1: goal},
            copy_target=GPU_COPY if on_gpu and shapes is large else None,
            compiles=not on_gpu or shapes is large,
            headline=headline and not (on_gpu and shapes is small and dtype == "bf16"),
        )

    lerp = functools.partial(lerp_, weight=WEIGHT)
    result = []
    for dtype, width, eager, goals, model_goal in (
        ("fp32", 12, eager_lerp, (None, 0.95), 4.0),
        ("bf16", 10, eager_lerp_widening, (4.0, 2.0), None),
    ):
        for shapes, goal in zip((small, large), goals, strict=True):
            operator = _operator(shapes, dtype, eager, lerp)
            result.append(case("lerp_", "", shapes, dtype, operator, width, goal=goal, headline=True))
            model = _model(shapes, dtype)
            result.append(case("AveragedModel", "", shapes, dtype, model, width, goal=model_goal, headline=True))
    for shapes in (small, large) if on_gpu else (small,):
        three = _operator(shapes, "fp32", eager_ema, lambda a, v: ema_(a, v, (0.9, 0.99, 0.999)), copies=3)
        result.append(case("ema_", "3 decays, ", shapes, "fp32", three, 28, flops=6))
    result.append(case("AveragedModel", "int8, ", small, "fp32", _model(small, "fp32", torch.int8), 6, flops=0))
    return result
