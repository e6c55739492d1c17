"""The convolution with local reparameterization against the formula a user writes.

The shapes are layers of LeNet-5 on MNIST and of VGG on CIFAR. The first layer of a network is measured as it is
trained: its input, the data, needs no gradient.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases import Case, Setup, dtype_of
from benchmarks.eager import eager_lrt
from losssurf_fast.ops.lrt_conv_functions import lrt_conv2d

# batch, input channels, size, output channels, kernel size, padding
LENET_1 = (128, 1, 28, 20, 5, 0)
LENET_2 = (128, 20, 12, 50, 5, 0)
VGG_1 = (128, 3, 32, 64, 3, 1)
VGG_2 = (128, 64, 16, 128, 3, 1)
VGG_3 = (128, 256, 8, 256, 3, 1)
# Layers of VGG and of a ResNet on ImageNet, in batches that fill a GPU.
GPU_SHAPES = ((1024, 3, 32, 64, 3, 1), (1024, 64, 32, 64, 3, 1), (256, 256, 14, 256, 3, 1))
TINY = (2, 3, 4, 5, 3, 1)
FIRST_LAYERS = 3  # input channels at most


def inputs(shape, dtype: torch.dtype, parameterization: str, memory_format, device) -> tuple:
    """(x, weight, scale, bias): activations in ``dtype``, parameters in fp32."""
    batch, channels, size, outputs, kernel, _ = shape
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, channels, size, size, device=device, generator=draw).to(dtype)
    x = x.contiguous(memory_format=memory_format).requires_grad_(channels > FIRST_LAYERS)
    place = (outputs, channels, kernel, kernel)
    weight = torch.randn(place, device=device, generator=draw) / math.sqrt(channels * kernel**2)
    scale = torch.randn(place, device=device, generator=draw) * 0.1 - 5
    weight, scale = (nn.Parameter(t.contiguous(memory_format=memory_format)) for t in (weight, scale))
    bias = nn.Parameter(torch.zeros(outputs, device=device))
    return x, None if parameterization == "variance" else weight, scale, bias


def convolutions(x, matrix, padding: int, mode: str, streams: int) -> Callable[[], None]:
    """The library's convolutions that each stream (mean and var, or var alone) needs, in x's dtype."""
    a, w = x.detach(), matrix.detach().to(x.dtype)
    grad = torch.randn_like(F.conv2d(a, w, padding=padding))
    geometry = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1)

    def floor():
        for _ in range(streams):
            if mode != "backward":
                torch.convolution(a, w, None, *geometry)
            if mode != "forward":
                torch.ops.aten.convolution_backward(grad, a, w, None, *geometry, [x.requires_grad, True, False])

    return floor


def _output_size(shape) -> int:
    _, _, size, _, kernel, padding = shape
    return size + 2 * padding - kernel + 1


def traffic(shape, itemsize: int, parameterization: str, mode: str) -> int:
    """Bytes that must be read and written: backward reads grad, var and the inputs and writes their gradients."""
    batch, channels, size, outputs, kernel, _ = shape
    x = itemsize * batch * channels * size**2
    y = itemsize * batch * outputs * _output_size(shape) ** 2
    parameters = 4 * outputs * (1 + (1 if parameterization == "variance" else 2) * channels * kernel**2)
    forward = x + y + parameters
    backward = x * (2 if channels > FIRST_LAYERS else 1) + 2 * y + 2 * parameters
    return {"forward": forward, "backward": backward, "full": forward + backward}[mode]


def _setup(shape, dtype: torch.dtype, parameterization: str, mode: str, memory_format):
    padding = shape[-1]

    def setup(device: torch.device) -> Setup:
        tensors = inputs(shape, dtype, parameterization, memory_format, device)
        x, weight, scale, _ = tensors

        def eager(x, weight, log_sigma2, bias):
            return eager_lrt(functools.partial(F.conv2d, padding=padding), 2, x, weight, log_sigma2.exp(), bias)

        if dtype != torch.float32:
            eager = torch.autocast(device.type, dtype)(eager)

        def ours(x, weight, scale, bias):
            return lrt_conv2d(x, weight, scale, bias, padding=padding, parameterization=parameterization)

        matrix, streams = (scale, 1) if weight is None else (weight, 2)
        return Setup(
            inputs=tensors,
            providers={"eager": eager, "compiled": eager, "ours": ours},
            floor=convolutions(x, matrix, padding, mode, streams),
        )

    return setup


def _case(shape, mode="full", parameterization="additive", dtype="fp32", channels_last=False, **extra) -> Case:
    batch, channels, _, outputs, kernel, _ = shape
    passes = {"forward": 1, "backward": 1, "full": 2}[mode]
    if mode != "forward" and channels > FIRST_LAYERS:
        passes += 1
    streams = 1 if parameterization == "variance" else 2
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return Case(
        op="lrt_conv2d",
        shape=shape,
        mode=mode,
        variant=parameterization + (" channels_last" if channels_last else ""),
        dtype=dtype,
        setup=_setup(shape, dtype_of(dtype), parameterization, mode, memory_format),
        bytes=traffic(shape, dtype_of(dtype).itemsize, parameterization, mode),
        flops=2 * passes * streams * batch * outputs * channels * (kernel * _output_size(shape)) ** 2,
        **extra,
    )


def _both(target: float) -> dict[int, float]:
    return {1: target, 2: target}


def gpu_cases(tiny: bool = False) -> list[Case]:
    first, wide, deep = (TINY,) * 3 if tiny else GPU_SHAPES
    return [
        _case(wide, "forward", dtype="bf16", channels_last=True, headline=True),
        _case(wide, dtype="bf16", channels_last=True, headline=True),
        _case(deep, "forward", dtype="bf16", channels_last=True),
        _case(deep, dtype="bf16", channels_last=True),
        _case(first, dtype="bf16", channels_last=True),
        *(_case(shape, "forward", dtype="bf16") for shape in (wide, deep)),
        _case(deep, "forward"),
    ]


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    if device_type == "cuda":
        return gpu_cases(tiny)
    lenet_1, lenet_2, vgg_1, vgg_2, vgg_3 = (TINY,) * 5 if tiny else (LENET_1, LENET_2, VGG_1, VGG_2, VGG_3)
    result = [
        _case(lenet_1, targets=_both(2.0), saved_target=0.5, headline=True),
        _case(lenet_2, targets=_both(1.0), saved_target=0.5, headline=True),
        _case(vgg_1, targets=_both(2.0), saved_target=0.5, headline=True),
        _case(vgg_2, targets=_both(1.0), saved_target=0.5, headline=True),
        _case(vgg_3, targets=_both(1.0), saved_target=0.5, headline=True),
        *(_case(shape, "forward", targets=_both(1.0)) for shape in (lenet_1, lenet_2, vgg_1, vgg_2, vgg_3)),
        _case(vgg_1, "backward", targets=_both(1.0)),
        *(_case(shape, channels_last=True, targets=_both(1.0)) for shape in (lenet_2, vgg_1, vgg_2, vgg_3)),
        _case(vgg_1, parameterization="variance", targets=_both(2.0), headline=True),
        _case(vgg_2, parameterization="variance", targets=_both(1.0)),
        _case(vgg_1, dtype="bf16", targets=_both(1.0)),
        _case(vgg_2, dtype="bf16", targets=_both(1.0)),
    ]
    return result
