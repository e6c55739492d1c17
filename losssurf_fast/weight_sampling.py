"""Draws of a whole model's weights, where one draw must serve a whole batch, and how its layers sample otherwise."""

import contextlib
import logging

import torch
from torch import nn

from losssurf_fast.averaging.tensors import plain_name, unwrap
from losssurf_fast.nn.lrt import LRTLayer, lrt_layers
from losssurf_fast.nn.lrt_linear import LRTLinear
from losssurf_fast.nn.weight_space import Drawn, check_sampling, draw_posteriors
from losssurf_fast.objective import check_prior, model_posteriors
from losssurf_fast.ops.lrt_operand import FLOAT8_MULTIPLE, as_variance_dtype, float8_fits
from losssurf_fast.ops.noise import as_seed, check_stream
from losssurf_fast.undoing import afterwards

logger = logging.getLogger("losssurf_fast")


class WeightSample:
    """One draw of a model's Gaussian weights; inside ``with draw:`` the model computes with it.

    Attributes:
        weights: the drawn tensors by name, as ``state_dict`` of a plain model calls them; those that layers share once.
            They are differentiable in the model's parameters, which are left alone.
        kl: KL divergence of the weights' posterior from the prior, a differentiable scalar.
        seed: 0-d int64 tensor, which draws the same again.

    The block may be entered again, inside itself or later, and be left by an exception; what was in force before it
    is so after it. A layer has no other noise in it, whatever ``train()``, ``eval()``, ``lsf.prediction`` and
    ``sampling`` say; a copy or a pickle of the model that is made in it has none of the draw.
    """

    def __init__(self, weights: dict[str, torch.Tensor], kl, seed, layers: list[tuple[LRTLayer, Drawn]]) -> None:
        self.weights, self.kl, self.seed = weights, kl, seed
        self._layers = layers
        self._blocks: list[contextlib.ExitStack] = []

    def __enter__(self) -> "WeightSample":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._installed())
            self._blocks.append(stack.pop_all())
        return self

    def __exit__(self, *exception) -> None:
        self._blocks.pop().__exit__(*exception)

    @contextlib.contextmanager
    def _installed(self):
        before = [layer.drawn for layer, _ in self._layers]

        def switch(drawn: list[Drawn | None]) -> None:
            for (layer, _), weights in zip(self._layers, drawn, strict=True):
                layer.drawn = weights

        with afterwards(lambda: switch(before)):
            switch([drawn for _, drawn in self._layers])
            yield

    def __repr__(self) -> str:
        return f"WeightSample({len(self.weights)} tensors, seed={self.seed.item()})"


def sample_weights(
    model: nn.Module,
    seed: int | torch.Tensor | None = None,
    *,
    prior: str | None = "normal",
    prior_std: float = 1.0,
    exact: bool = True,
    sample: int = 0,
) -> WeightSample:
    """Draw every Gaussian weight of ``model`` at once, with the KL divergence from their prior, in one pass::

        with lsf.sample_weights(model) as draw:
            loss = F.cross_entropy(model(x), y) + draw.kl / num_data
        loss.backward()

    All samples of a batch, and all batches inside the block, see the same weights. Activation checkpointing computes
    layers again in backward, which must then be inside the block too, and with ``use_reentrant=False``: outside it they
    would draw noise of their own, and the reentrant kind would return wrong gradients without a word.

    Blundell et al., "Weight uncertainty in neural networks", ICML 2015; ``ops/gaussian_weights.py`` has the formulas.

    Args:
        model: a module with LRT layers, in any wrapper (compile, DistributedDataParallel).
        seed: an int, a 0-d int64 tensor or None to draw one from the default generator. In distributed training a
            seed that all ranks share gives them the same weights; by default each rank draws its own.
        prior: "normal" (N(0, prior_std^2)), "log_uniform", "ard" as in :func:`lsf.kl_divergence`, or None, with which
            ``kl`` is 0.
        exact: False takes the three-constant approximation of the log-uniform KL.
        sample: which of 2^32 independent draws of this seed.

    The noise of tensor i is row i, in the order of ``model.named_modules()``; layers that share their weights draw them
    once. The model must be on one device.

    Raises:
        TypeError, ValueError: not a module, unknown prior, a bad number or seed, or a model without such layers or with
            one whose parameters are on the meta device or that has a ``max_norm``.
    """
    caller = "sample_weights"
    if prior is not None:
        check_prior(caller, prior, prior_std)
    check_stream(caller, 0, 0, sample, 0)
    model = unwrap(model)
    posteriors = model_posteriors(model, caller)
    for name, layer in lrt_layers(model, caller):
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError(
                f"{caller}: {name or type(layer).__name__} must have max_norm None, got {layer.max_norm}: it shrinks "
                "the rows that a forward looks up, which a draw of all weights does not know"
            )
    devices = {str(p.scale.device): None for p in posteriors}
    if len(devices) > 1:
        raise ValueError(f"{caller}: {type(model).__name__} must be on one device, got {', '.join(devices)}")
    seed = as_seed(caller, seed, posteriors[0].scale.device)
    family = "none" if prior is None else prior
    if prior == "log_uniform" and not exact:
        family = "log_uniform_approximate"
    width = prior_std if prior == "normal" else 1.0
    drawn, kl = draw_posteriors(posteriors, seed, prior=family, prior_std=width, sample=sample)
    by_tie = {p.tie: weight for p, weight in zip(posteriors, drawn, strict=True)}
    weights, layers = {}, []
    for name, layer in lrt_layers(model, caller):
        own = Drawn((p.name, by_tie[p.tie]) for p in layer.posteriors())
        layers.append((layer, own))
        for leaf, weight in own.items():
            if not any(weight is other for other in weights.values()):
                weights[plain_name(f"{name}.{leaf}" if name else leaf)] = weight
    return WeightSample(weights, kl, seed, layers)


def set_sampling(model: nn.Module, sampling: str) -> nn.Module:
    """Let the LRT layers of ``model`` sample in one way, and return it; ``nn/weight_space.py`` has the formulas.

    Args:
        model: a module with LRT layers, as ``lsf.to_lrt`` makes it.
        sampling: "local" (of outputs, the default), "weights" (one draw of a layer's weights for the whole batch) or
            "flipout" (that with random signs for each sample, the first dimension of a layer's input). Each layer still
            follows ``train()``, ``eval()`` and ``lsf.prediction``, and draws anew in each forward;
            :func:`lsf.sample_weights` makes one draw of all layers that outlives a forward.

    Raises:
        TypeError, ValueError: not a module, unknown sampling, or a model without such layers.
    """
    check_sampling("set_sampling", sampling)
    for _, layer in lrt_layers(model, "set_sampling"):
        layer.sampling = sampling
    return model


def set_variance_dtype(model: nn.Module, dtype: torch.dtype | str | None) -> nn.Module:
    """Let the linear LRT layers of ``model`` multiply their variances in ``dtype``, and return the model.

    Args:
        model: a module with LRT layers, as ``lsf.to_lrt`` makes it.
        dtype: "float8_e4m3fn" (or torch's) for the :class:`lsf.nn.LRTLinear` layers whose sizes are multiples of 16,
            as their ``variance_dtype`` says; the other LRT layers stay as they are and are logged as a warning. None
            for the activations' dtype everywhere.

    Raises:
        TypeError, ValueError: not a module, another dtype, or a model with no layer that can have it.
    """
    caller = "set_variance_dtype"
    dtype = as_variance_dtype(caller, dtype)
    chosen, left = [], []
    for name, layer in lrt_layers(model, caller):
        name = name or type(layer).__name__
        if not isinstance(layer, LRTLinear):
            left.append(f"{name}: {type(layer).__name__} has no variance_dtype")
        elif dtype is None or float8_fits(sizes := (layer.out_features, layer.in_features)):
            chosen.append(layer)
        else:
            left.append(f"{name}: its sizes {sizes} are not multiples of {FLOAT8_MULTIPLE}")
    if not chosen and dtype is not None:
        raise ValueError(f"{caller}: {type(model).__name__} has no layer that can have it; {'; '.join(left)}")
    for layer in chosen:
        layer.variance_dtype = dtype
    if left and dtype is not None:
        logger.warning("set_variance_dtype: these stay as they are:\n  %s", "\n  ".join(left))
    return model
