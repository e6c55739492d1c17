"""Layers with Gaussian weights as users write them in plain torch: what ours is measured against."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases.kl import eager_additive
from losssurf_fast.nn import LRTConv2d, LRTLinear
from losssurf_fast.nn.lrt import LRTLayer


def eager_lrt(product, spatial: int, x, weight, sigma2, bias) -> torch.Tensor:
    """The published formula with torch's noise; our references draw theirs from the kernels under test.

    Args:
        product: ``F.linear`` or a convolution.
        spatial: how many sizes its output has behind the channels.
        weight: the means; None where they are zero.
        sigma2: the variances of the weights.
    """
    var = product(x * x, sigma2)  # CUDA's autocast takes square to fp32
    mean = bias if bias is None else bias.view(-1, *[1] * spatial)
    if weight is not None:
        mean = product(x, weight, bias)
    noise = torch.sqrt(var + 1e-16) * torch.randn_like(var)
    return noise if mean is None else mean + noise


class EagerLayer(nn.Module):
    """The published formula with torch's noise, from copies of the parameters of an "additive" or "variance" layer.

    Raises:
        NotImplementedError: another parameterization, another layer, or a convolution that pads with something else
            than zeros.
    """

    def __init__(self, layer: LRTLayer):
        super().__init__()
        if layer.parameterization not in ("additive", "variance"):
            raise NotImplementedError(f"EagerLayer: layer must be additive or variance, got {layer.parameterization!r}")
        copied = lambda p: None if p is None else nn.Parameter(p.detach().clone())
        self.weight, self.log_sigma2, self.bias = copied(layer.weight), copied(layer.log_sigma2), copied(layer.bias)
        self.product, self.spatial = _product(layer)

    def forward(self, x):
        return eager_lrt(self.product, self.spatial, x, self.weight, self.log_sigma2.exp(), self.bias)

    def kl(self):
        """From the log-uniform prior, by the published approximation; that of a variance layer is constant."""
        return 0.0 if self.weight is None else eager_additive(self.log_sigma2, self.weight)


def _product(layer: LRTLayer):
    """What the layer multiplies with, and how many sizes its output has behind the channels."""
    if isinstance(layer, LRTLinear):
        return F.linear, 0
    if isinstance(layer, LRTConv2d) and layer.padding_mode == "zeros":
        geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return functools.partial(F.conv2d, **geometry), 2
    raise NotImplementedError(f"EagerLayer: layer must be LRTLinear or LRTConv2d with zeros around, got {layer}")


def with_eager_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose LRT layers are :class:`EagerLayer`."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LRTLayer):
            model.set_submodule(name, EagerLayer(module))
    return model


def eager_kl(model: nn.Module) -> torch.Tensor | float:
    """The KL divergence of a model's eager layers, layer by layer."""
    return sum(module.kl() for module in model.modules() if isinstance(module, EagerLayer))
