"""What is measured: one :class:`Case` per operator, variant, shape, dtype and mode.

A family is one file of this package, named after the module it measures, with a function ``cases(tiny, device_type)``;
nothing else has to know of it. ``tiny`` asks for the same cases at sizes of a few elements, for the dry run;
``device_type`` chooses shapes, dtypes and targets: those for two cores of a CPU would measure launches on a GPU. The
cases of every device type run on every device.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import nn

DEVICE_TYPES = ("cpu", "cuda")
MODES = ("forward", "backward", "full")  # full = forward and backward
BASELINES = ("eager", "compiled", "torch")
# Measured first where time may be short; the others follow.
IMPORTANT = ("lrt", "averaging", "curve", "swag", "kl", "noise", "gaussian_weights", "curve_linear", "lrt_conv")
GPU_COPY = 0.9  # on a GPU, of what it copies: the target of everything that memory bounds
PROVIDERS = (*BASELINES, "ours", "floor")


@dataclass
class Setup:
    """The live half of a case, made anew in the process that measures it.

    Attributes:
        inputs: what every provider is called with; those that require grad are differentiated, together with the
            parameters of a provider that is a module. Parameters are ``nn.Parameter``, activations are not.
        providers: "eager" is what a user writes, "compiled" what ``torch.compile`` is given, "torch" the strongest
            thing the library has where that is neither, "ours" the operator.
        floor: the least work any implementation must do on this machine: the bare GEMMs, or one pass over the bytes.
    """

    inputs: tuple
    providers: dict[str, Callable | nn.Module]
    floor: Callable[[], object]


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    mode: str
    setup: Callable[[torch.device], Setup] = field(compare=False)
    bytes: int  # least memory traffic
    flops: int
    variant: str = ""
    dtype: str = "fp32"
    targets: dict[int, float] = field(default_factory=dict, compare=False)  # threads -> speedup over eager
    compiled_target: float | None = None  # speedup over torch.compile, on one thread or a GPU
    copy_target: float | None = None  # bytes a second, as a share of what the machine copies
    peak_target: float | None = None  # most memory of a call, as a share of eager's; on a GPU
    saved_target: float | None = None  # bytes saved for backward, as a share of eager's
    compiles: bool = True  # False: a list of tensors so long that torch.compile takes more than the rest of the run
    headline: bool = False  # --quick measures only these, --minutes begins with them

    @property
    def key(self) -> tuple:
        return (self.op, self.variant, tuple(self.shape), self.dtype, self.mode)

    def __str__(self) -> str:
        return title(self.key)


def title(key: tuple) -> str:
    op, variant, shape, dtype, mode = key
    return " ".join(filter(None, (op, variant, "x".join(map(str, shape)), dtype, mode)))


def families(only: Sequence[str] | None = None) -> list[str]:
    """Families whose module is part of the package, in the order of ``only`` or else of the alphabet.

    Raises:
        ValueError: ``only`` names a family that has no cases, or whose module does not exist.
    """
    written = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [name for name in written if _is_module(f"losssurf_fast.{name}") or _is_module(f"losssurf_fast.ops.{name}")]
    for name in only or ():
        if name not in found:
            raise ValueError(f"benchmarks: families are {', '.join(found)}, got {name!r}")
    return list(dict.fromkeys(only)) if only else found


def _is_module(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder without files has no origin


def load(family: str, tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    cases = importlib.import_module(f"{__name__}.{family}").cases(tiny, device_type)
    return list({case.key: case for case in cases}.values()) if tiny else cases  # tiny shapes coincide


def dtype_of(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@torch.no_grad()
def captured(function: Callable, inputs: tuple, device: torch.device) -> Callable:
    """``function`` of these inputs as a CUDA graph: its kernels without what their launches cost. On a CPU itself."""
    if device.type != "cuda":
        return function
    aside = torch.cuda.Stream(device)  # what compiles or is cached comes before the capture, on another stream
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        function(*inputs)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)

    def replay(*_):
        graph.replay()
        return output

    return replay
