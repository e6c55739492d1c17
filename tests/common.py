"""What the test files share: kernels forced one by one, the comparison with eager, and samples of a layer."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losssurf_fast import _C

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")


@contextlib.contextmanager
def instruction_set(name):
    """Run one instruction set's kernels; yields False where this CPU lacks it."""
    before = _C.instruction_set()
    try:
        yield _C.use_instruction_set(name)
    finally:
        _C.use_instruction_set(before)


class CountReads(TorchDispatchMode):
    """How often a value goes from a tensor to Python, as by ``item()`` and ``tolist()``, which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def assert_as_good_as_eager(actual, eager, exact, factor=2.0):
    """The kernel's largest error is at most ``factor`` times that of the eager reference in the same dtype.

    Both are measured against ``exact``, the same computation in float64; one unit in the last place of the output's
    scale is allowed on top, so that an eager result that happens to be exact does not ask for the impossible.
    """
    assert actual.dtype == eager.dtype and actual.shape == exact.shape
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact)
        return
    assert torch.isfinite(actual).all()
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max()
    eager_error = (eager.double() - exact).abs().max()
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= factor * eager_error + ulp, f"error {error:.3g}, eager {eager_error:.3g}, ulp {ulp:.3g}"


def scale_shape(parameterization, out_features, in_features):
    return {"layer": (1,), "neuron": (out_features,)}.get(parameterization, (out_features, in_features))


def lrt_inputs(parameterization, shape=(17, 33, 63), dtype=F32, param_dtype=None, bias=True, seed=0):
    """(x, weight, scale, bias) of a layer; x is a slice of a wider tensor, so its rows are not adjacent."""
    rows, out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)
    param_dtype = param_dtype or dtype
    x = draw(rows, in_features + 3).to(dtype)[:, 1 : in_features + 1]
    weight = None if parameterization == "variance" else draw(out_features, in_features).mul(0.3).to(param_dtype)
    scale = (draw(*scale_shape(parameterization, out_features, in_features)) - 1).to(param_dtype)
    return x, weight, scale, draw(out_features).to(param_dtype) if bias else None


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def lrt_conv_inputs(parameterization, case, dtype=F32, param_dtype=None, channels_last=False, seed=0):
    """(x, weight, scale, bias) of a convolution in one memory format.

    ``case`` is (shape of x, shape of weight, geometry): (stride, padding, dilation, transposed, output_padding, groups)
    as ``lrt_conv`` takes it.
    """
    x_shape, weight_shape, geometry = case
    generator = torch.Generator().manual_seed(seed)
    param_dtype = param_dtype or dtype

    def draw(size, dtype):
        t = torch.randn(*size, generator=generator).to(dtype)
        return t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if channels_last and t.dim() in CHANNELS_LAST else t

    transposed, groups = geometry[3], geometry[5]
    outputs = weight_shape[1] * groups if transposed else weight_shape[0]
    weight = None if parameterization == "variance" else draw(weight_shape, param_dtype) * 0.3
    shape = {"layer": (1,), "neuron": (outputs,)}.get(parameterization, weight_shape)
    return draw(x_shape, dtype), weight, draw(shape, param_dtype) - 1, draw((outputs,), param_dtype)


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


def with_grad(tensors):
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
