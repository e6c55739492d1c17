"""Ways to sample a layer besides local reparameterization: by drawing its weights.

"weights"    y = f(x, w), w one draw for the whole batch: Blundell et al., "Weight uncertainty in neural networks"
             (Bayes by backprop), ICML 2015.
"flipout"    y = f(x, mean) + s f(r x, sigma eps): one draw of sigma eps for the whole batch, turned into nearly
             independent ones by random signs r of each sample's input channels and s of its output channels: Wen,
             Vicol, Ba, Tran and Grosse, "Flipout", ICLR 2018, equation 4. The variance is that of "weights", the
             samples of a batch are uncorrelated; the price is a second product.

Noise (ops/noise.py), all from one seed: the weights are sample 0, row 0, column = the flat index. The signs are those
of normals: row = the sample's place along the first dimension, column = the channel, sample 1 for the input, 2 for the
output. A bias is never random.
"""

from collections.abc import Sequence

import torch

from losssurf_fast import ops
from losssurf_fast.ops.noise import as_seed

SAMPLINGS = ("local", "weights", "flipout")


def check_sampling(caller: str, sampling: str) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"{caller}: sampling must be one of {SAMPLINGS}, got {sampling!r}")


class Drawn(dict):
    """The weights, by name, that a layer computes with inside a block; its copies and pickles have none."""

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


def draw_posteriors(posteriors: Sequence, seed, **options) -> tuple[list[torch.Tensor], torch.Tensor]:
    """:func:`ops.gaussian_weights` of a list of ``Posterior``."""
    scales, parameterizations = zip(*map(_operands, posteriors), strict=True)
    return ops.gaussian_weights([p.weight for p in posteriors], scales, parameterizations, seed, **options)


def _operands(posterior) -> tuple[torch.Tensor, str]:
    """(scale, parameterization) for the operator, whose "neuron" is along the weight's first dimension alone."""
    scale, parameterization = posterior.scale, posterior.parameterization
    if parameterization == "neuron":
        spread = posterior.spread(scale)
        if spread.shape != (len(scale), *[1] * (len(posterior.shape) - 1)) or len(scale) != posterior.shape[0]:
            return spread.expand(posterior.shape), "weight"
    return scale, parameterization


def sample_output(layer, input: torch.Tensor, seed: int | torch.Tensor | None, **geometry) -> torch.Tensor:
    """A draw of the output of an ``LRTLayer`` with one Gaussian tensor, as its ``sampling`` says."""
    if layer.sampling == "local":
        return layer.local(input, seed, **geometry)
    check_sampling(type(layer).__name__, layer.sampling)
    seed = as_seed(type(layer).__name__, seed, layer.scale.device)
    (posterior,) = layer.posteriors()
    if layer.sampling == "weights":
        (weight,), _ = draw_posteriors([posterior], seed)
        return layer.plain(input, weight, **geometry)
    return _flipout(layer, posterior, input, seed, **geometry)


def _flipout(layer, posterior, input: torch.Tensor, seed: torch.Tensor, **geometry) -> torch.Tensor:
    # As the noise of means of 0: a difference of drawn and mean weights would round.
    (noise,), _ = ops.gaussian_weights([None], [posterior.log_sigma2()], ["variance"], seed)
    channels = 1 - noise.dim()  # the channels' dimension, of a batch or a single sample
    turned = input * _signs(input, channels, seed, 1) if input.is_floating_point() else input
    deviation = layer.plain(turned, noise, with_bias=False, **geometry)
    return layer.plain(input, posterior.weight, **geometry) + deviation * _signs(deviation, channels, seed, 2)


def _signs(like: torch.Tensor, channels: int, seed: torch.Tensor, sample: int) -> torch.Tensor:
    """1 or -1 for each sample and channel, broadcastable to ``like``."""
    shape = [1] * like.dim()
    shape[channels] = like.shape[channels]
    if like.dim() > -channels:
        shape[0] = like.shape[0]
    normals = ops.philox_normal((shape[0] if like.dim() > -channels else 1, shape[channels]), seed, sample=sample)
    return torch.ones_like(normals).copysign(normals).to(like.dtype).view(shape)
