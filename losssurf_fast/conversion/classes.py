"""Which torch layer becomes which stochastic one, and the torch modules that would pass over their noise."""

import dataclasses

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from losssurf_fast.nn.lrt import LRTLayer
from losssurf_fast.nn.lrt_attention import LRTMultiheadAttention
from losssurf_fast.nn.lrt_conv import (
    LRTConv1d,
    LRTConv2d,
    LRTConv3d,
    LRTConvTranspose1d,
    LRTConvTranspose2d,
    LRTConvTranspose3d,
)
from losssurf_fast.nn.lrt_embedding import LRTEmbedding
from losssurf_fast.nn.lrt_linear import LRTLinear
from losssurf_fast.nn.stochastic import StochasticLayer, fast_path_skips_noise


@dataclasses.dataclass(frozen=True)
class Twin:
    """The stochastic class of a torch layer, and which dimension of its weights the outputs are."""

    layer: type[LRTLayer]
    outputs_dim: int = 0


TWINS: dict[type[nn.Module], Twin] = {
    nn.Linear: Twin(LRTLinear),
    NonDynamicallyQuantizableLinear: Twin(LRTLinear),
    nn.Conv1d: Twin(LRTConv1d),
    nn.Conv2d: Twin(LRTConv2d),
    nn.Conv3d: Twin(LRTConv3d),
    nn.ConvTranspose1d: Twin(LRTConvTranspose1d, 1),
    nn.ConvTranspose2d: Twin(LRTConvTranspose2d, 1),
    nn.ConvTranspose3d: Twin(LRTConvTranspose3d, 1),
    nn.Embedding: Twin(LRTEmbedding, 1),
    nn.MultiheadAttention: Twin(LRTMultiheadAttention),
}
CONVERTIBLE = tuple(TWINS)
PLAIN: dict[type[LRTLayer], type[nn.Module]] = {twin.layer: plain for plain, twin in reversed(TWINS.items())}


def outputs_dim(module: nn.Module) -> int:
    """Which dimension of its weight the outputs of a layer are, plain or stochastic."""
    return next(twin.outputs_dim for plain, twin in TWINS.items() if isinstance(module, plain))


_FAST_PATH = "_losssurf_fast_path"  # what a module's switch was before it was turned off


def turn_off_fast_paths(model: nn.Module) -> None:
    """Those of ``nn.TransformerEncoder`` and its layers, which read weights without calling the layers."""
    for module in model.modules():
        if fast_path_skips_noise(module):
            _switch(module, "activation_relu_or_gelu", 0)  # only the fast path asks for it
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, StochasticLayer) for m in module.modules()):
            _switch(module, "use_nested_tensor", False)  # nested tensors are for the layers' fast path


def restore_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).pop(_FAST_PATH, {}).items():
            setattr(module, name, value)


def _switch(module: nn.Module, name: str, off) -> None:
    vars(module).setdefault(_FAST_PATH, {}).setdefault(name, getattr(module, name))
    setattr(module, name, off)
