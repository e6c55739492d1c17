"""The linear layer with local reparameterization, and on a GPU the draw alone, against the formula a user writes."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases import GPU_COPY, Case, Setup, captured, dtype_of
from benchmarks.eager import eager_lrt
from benchmarks.gemm import fastest_products
from losssurf_fast.ops.lrt import lrt_linear
from losssurf_fast.ops.lrt_operand import FLOAT8, lrt_variance_operand
from losssurf_fast.ops.lrt_sample import lrt_sample

SHAPES = ((32, 10, 500), (64, 512, 784), (128, 1024, 1024), (512, 4096, 1024))  # (M, N, K): batch, outputs, inputs
FEW_ROWS = (64, 4096, 4096)
GPU_SHAPES = ((8192, 4096, 4096), (8192, 8192, 8192), (4096, 4096, 1024), FEW_ROWS)
SAMPLE_SHAPE = (16384, 8192)
TINY = (4, 3, 5)


def eager_variances(weight, scale, parameterization: str) -> torch.Tensor:
    """sigma^2 ``[O, I]`` as users write it."""
    sigma2 = scale.exp()
    if parameterization not in ("additive", "variance"):
        sigma2 = (sigma2.unsqueeze(1) if parameterization == "neuron" else sigma2) * weight * weight
    return sigma2


def inputs(shape, dtype: torch.dtype, parameterization: str, device, parameter_dtype=torch.float32) -> tuple:
    """(x, weight, scale, bias): activations in ``dtype``, parameters in theirs, all differentiated."""
    m, n, k = shape
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(m, k, device=device, generator=draw).to(dtype).requires_grad_()
    parameter = lambda value: nn.Parameter(value.to(parameter_dtype))
    weight = parameter(torch.randn(n, k, device=device, generator=draw) / math.sqrt(k))
    scale_shape = {"layer": (1,), "neuron": (n,)}.get(parameterization, (n, k))
    scale = parameter(torch.randn(scale_shape, device=device, generator=draw) * 0.1 - 5)
    bias = parameter(torch.zeros(n, device=device))
    return x, None if parameterization == "variance" else weight, scale, bias


def products(x, matrix, shape, mode: str, streams: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of the GEMMs that each stream (mean and var, or var alone) needs, in x's dtype."""
    x, matrix = x.detach(), matrix.detach().to(x.dtype)
    grad = torch.randn(shape[0], shape[1], device=x.device).to(x.dtype)
    forward, backward = [(x, matrix.t())], [(grad, matrix), (grad.t(), x)]
    return streams * {"forward": forward, "backward": backward, "full": forward + backward}[mode]


def traffic(shape, itemsize: int, parameterization: str, mode: str, parameter_itemsize: int = 4, ready=False) -> int:
    """Bytes that must be read and written: backward reads grad, var and the inputs and writes their gradients.

    A ``ready`` sigma^2, in the activations' dtype, is read in place of the scale that it is made of.
    """
    m, n, k = shape
    scale = {"layer": 1, "neuron": n}.get(parameterization, n * k)
    parameters = parameter_itemsize * (scale + n + (0 if parameterization == "variance" else n * k))
    forward = itemsize * (m * k + m * n) + parameters
    if ready:
        forward += itemsize * n * k - parameter_itemsize * (scale if scale == n * k else 0)
    backward = itemsize * (2 * m * k + 2 * m * n) + 2 * parameters
    return {"forward": forward, "backward": backward, "full": forward + backward}[mode]


def _setup(shape, dtype: torch.dtype, parameterization: str, mode: str, parameter_dtype, in_graph, float8, ready):
    def setup(device: torch.device) -> Setup:
        tensors = inputs(shape, dtype, parameterization, device, parameter_dtype)
        x, weight, scale, _ = tensors

        operand = kept = None
        if ready:
            operand = lrt_variance_operand(weight, scale, parameterization=parameterization, dtype=dtype)
            kept = eager_variances(weight, scale, parameterization).detach().to(dtype)

        def eager(x, weight, scale, bias):
            sigma2 = eager_variances(weight, scale, parameterization) if kept is None else kept
            return eager_lrt(F.linear, 0, x, weight, sigma2, bias)

        if dtype != torch.float32:
            eager = torch.autocast(device.type, dtype)(eager)

        def ours(x, weight, scale, bias):
            options = {"variance_dtype": variance_dtype, "variance_operand": operand}
            return lrt_linear(x, weight, scale, bias, parameterization=parameterization, **options)

        variance_dtype = FLOAT8 if float8 and device.type == "cuda" else None  # a CPU has none, and runs the rest
        streams = 1 if weight is None else 2
        gemms = products(x, scale if weight is None else weight, shape, mode, streams)
        providers = {"eager": eager, "compiled": eager, "ours": ours}
        if in_graph:
            providers = {name: captured(providers[name], tensors, device) for name in ("eager", "ours")}
        return Setup(inputs=tensors, providers=providers, floor=fastest_products(gemms))

    return setup


def _case(
    shape,
    mode="full",
    parameterization="additive",
    dtype="fp32",
    parameter_dtype="fp32",
    in_graph=False,
    float8=False,
    ready=False,
    **extra,
) -> Case:
    """``in_graph``: as a CUDA graph, so that the kernels alone are timed. ``float8``: ours has that variance stream.

    ``ready``: sigma^2 is there from before, as inside ``lsf.cached_variances``; also for the baselines.
    """
    variant = [parameterization]
    if parameter_dtype != "fp32":
        variant.append(f"{parameter_dtype} parameters")
    if in_graph:
        variant.append("in a CUDA graph")
    if float8:
        variant.append("float8 variance")
    if ready:
        variant.append("sigma2 ready")
    parameter_dtype = dtype_of(parameter_dtype)
    gemms = (1 if parameterization == "variance" else 2) * {"forward": 1, "backward": 2, "full": 3}[mode]
    return Case(
        op="lrt_linear",
        shape=shape,
        mode=mode,
        variant=", ".join(variant),
        dtype=dtype,
        setup=_setup(shape, dtype_of(dtype), parameterization, mode, parameter_dtype, in_graph, float8, ready),
        bytes=traffic(shape, dtype_of(dtype).itemsize, parameterization, mode, parameter_dtype.itemsize, ready),
        flops=2 * gemms * math.prod(shape),
        **extra,
    )


def _both(target: float) -> dict[int, float]:
    return {1: target, 2: target}


def _sample(shape, dtype: str, mode: str):
    """mean + sqrt(var) eps of given streams; the gradient of the mean is that of y, which moves nothing."""

    def setup(device: torch.device) -> Setup:
        draw = torch.Generator(device).manual_seed(0)
        make = lambda: torch.rand(shape, device=device, generator=draw).to(dtype_of(dtype)).requires_grad_()
        mean, var = make(), make()
        passes = [torch.empty_like(mean) for _ in range(2)]

        def eager(mean, var):
            return mean + torch.sqrt(var + 1e-16) * torch.randn_like(var)

        @torch.no_grad()
        def floor():
            for _ in range(1 if mode == "forward" else 2):
                torch.add(passes[0], passes[1], out=passes[0])

        return Setup((mean, var), {"eager": eager, "compiled": eager, "ours": lrt_sample}, floor)

    return setup


def _sample_case(shape, dtype: str, mode: str, **extra) -> Case:
    passes = 3 if mode == "forward" else 6  # backward reads grad and var, writes the gradient of var
    return Case(
        op="lrt_sample",
        shape=shape,
        mode=mode,
        dtype=dtype,
        setup=_sample(shape, dtype, mode),
        bytes=passes * dtype_of(dtype).itemsize * math.prod(shape),
        flops=0,
        copy_target=GPU_COPY,
        **extra,
    )


def gpu_cases(tiny: bool = False) -> list[Case]:
    large, largest, shallow, few = (TINY,) * 4 if tiny else GPU_SHAPES
    sample = TINY[:2] if tiny else SAMPLE_SHAPE
    bf16 = {"dtype": "bf16", "headline": True}
    more = {"dtype": "bf16"}
    return [
        _case(large, "forward", targets={1: 1.15}, compiled_target=1.0, **bf16),
        _case(largest, "forward", targets={1: 1.15}, compiled_target=1.0, **bf16),
        *(_case(shape, "forward", targets={1: 1.4}, float8=True, **bf16) for shape in (large, largest)),
        _case(shallow, "forward", targets={1: 1.4}, **bf16),
        _case(few, "forward", targets={1: 2.0}, **bf16),
        _case(few, "forward", targets={1: 2.0}, in_graph=True, **bf16),
        _case(few, "forward", ready=True, **bf16),
        _case(large, targets={1: 1.1}, peak_target=0.5, **bf16),
        _case(largest, targets={1: 1.1}, peak_target=0.5, **bf16),
        _case(shallow, peak_target=0.5, **bf16),
        _case(few, **more),
        _sample_case(sample, "bf16", "forward", headline=True),
        _sample_case(sample, "bf16", "full"),
        _sample_case(sample, "fp32", "forward"),
        *(_case(shallow, "forward", parameterization=p, **more) for p in ("variance", "neuron", "layer", "weight")),
        *(_case(shape, "forward", parameter_dtype="bf16", **more) for shape in (large, few)),
        _case(shallow, "forward"),
        _case(few, "forward"),
    ]


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    if device_type == "cuda":
        return gpu_cases(tiny)
    smallest, small, middle, large = (TINY,) * 4 if tiny else SHAPES
    wide = TINY if tiny else FEW_ROWS
    result = [
        _case(smallest, targets=_both(1.2), headline=True),
        _case(small, targets=_both(2.0), headline=True),
        _case(middle, targets=_both(2.0), headline=True),
        _case(large, targets=_both(2.0), saved_target=0.3, headline=True),
        *(_case(shape, "forward", targets=_both(1.0)) for shape in (smallest, small, middle, large)),
        _case(middle, "backward", targets=_both(1.0)),
        _case(small, dtype="bf16", targets=_both(1.8)),
        _case(middle, dtype="bf16", targets=_both(1.4), headline=True),
        _case(large, dtype="bf16", targets=_both(1.1)),
        _case(middle, parameterization="variance", targets=_both(1.8), headline=True),
        *(_case(middle, parameterization=p, targets=_both(1.0)) for p in ("layer", "neuron", "weight")),
        *(_case(wide, "forward", dtype=dtype, ready=ready) for dtype in ("fp32", "bf16") for ready in (False, True)),
        *(_case(middle, "forward", dtype=dtype, ready=True) for dtype in ("fp32", "bf16")),
    ]
    return result
