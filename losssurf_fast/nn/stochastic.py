"""What ``prediction``, ``predict`` and ``kl_divergence`` know of a layer that draws noise."""

from torch import nn


class StochasticLayer(nn.Module):
    """Base of layers that draw noise; derive from it to let ``lsf.prediction`` rule a layer of your own.

    Such a layer asks :attr:`draws_noise` in its forward. ``lsf.prediction`` and ``lsf.predict`` set
    :attr:`prediction_scheme`; where it is None the layer follows ``train()`` and ``eval()``.
    """

    prediction_scheme: str | None = None

    @property
    def draws_noise(self) -> bool:
        if self.prediction_scheme is None:
            return self.training
        return self.prediction_scheme == "stochastic"


def stochastic_layers(model: nn.Module, caller: str) -> list[StochasticLayer]:
    """The layers of :func:`named_stochastic_layers` without their names."""
    return [layer for _, layer in named_stochastic_layers(model, caller)]


def named_stochastic_layers(model: nn.Module, caller: str) -> list[tuple[str, StochasticLayer]]:
    """The stochastic layers of ``model``, each once, and their names.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a layer's parent reads its weight past its forward, so that its noise would be lost in silence.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, StochasticLayer):
            layers.append((name, module))
        elif isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, StochasticLayer):
            raise RuntimeError(
                f"{caller}: {_join(name, 'out_proj')} is a stochastic layer, but nn.MultiheadAttention reads its "
                "weight without calling it, so it would draw no noise; put a plain nn.Linear there, or convert the "
                "attention with to_lrt"
            )
        elif fast_path_skips_noise(module):
            raise RuntimeError(
                f"{caller}: the fast path of nn.TransformerEncoderLayer {name!r} reads the weights of its stochastic "
                "layers without calling them; convert it with to_lrt, which turns that path off"
            )
    return layers


def fast_path_skips_noise(module: nn.Module) -> bool:
    """Whether this is an encoder layer whose fast path, still on, would pass over stochastic layers."""
    if not isinstance(module, nn.TransformerEncoderLayer) or not module.activation_relu_or_gelu:
        return False
    return any(isinstance(child, StochasticLayer) for child in (module.linear1, module.linear2, module.self_attn))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
