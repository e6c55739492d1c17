"""Prediction schemes: deterministic (mean weights), stochastic (one draw), ensemble (mean of softmax over draws)."""

import contextlib

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from losssurf_fast.ensembling import OnlineEnsemble
from losssurf_fast.nn.lrt import LRTLayer, lrt_layers
from losssurf_fast.nn.stochastic import stochastic_layers
from losssurf_fast.nn.variance_cache import VarianceCache
from losssurf_fast.outputs import class_logits
from losssurf_fast.undoing import afterwards

SCHEMES = ("deterministic", "stochastic", "ensemble")


@contextlib.contextmanager
def prediction(model: nn.Module, scheme: str):
    """Within the context, stochastic layers follow ``scheme``, whatever ``train()`` or ``eval()`` say.

    Other layers (BatchNorm, Dropout) are untouched. Contexts nest; the previous scheme comes back on leaving, also by
    an exception.

    Args:
        model: a module with stochastic layers.
        scheme: "deterministic" or "stochastic".

    Raises:
        ValueError: another scheme, or "stochastic" for a model that draws no noise.
    """
    if scheme == "ensemble":
        raise ValueError(
            "prediction: an ensemble is many forward passes; call lsf.predict(model, x, scheme='ensemble')"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"prediction: scheme must be 'deterministic' or 'stochastic', got {scheme!r}")
    layers = stochastic_layers(model, "prediction")
    if scheme == "stochastic" and not layers:
        raise ValueError(f"prediction: {type(model).__name__} has no stochastic layers; convert it with lsf.to_lrt")
    before = [layer.prediction_scheme for layer in layers]

    def switch(schemes: list[str | None]) -> None:
        for layer, chosen in zip(layers, schemes, strict=True):
            layer.prediction_scheme = chosen

    with afterwards(lambda: switch(before)):
        switch([scheme] * len(layers))
        yield model


@contextlib.contextmanager
def cached_variances(model: nn.Module):
    """Within the context, linear layers make the variances of their weights once instead of in every forward::

        with lsf.cached_variances(model):
            probs = lsf.predict(model, x, num_samples=100)

    For weights that do not change: it costs one more tensor of each weight's size, in the activations' dtype (float32
    for float16). Kept are the variances of parameters that take no gradient: under ``torch.no_grad()``, as in
    ``lsf.predict``, or frozen by ``requires_grad_(False)``; every step of a ``torch.optim.Optimizer`` drops what is
    kept, and so does a forward that may be a training step's. They are also made anew where a parameter was replaced,
    moved, or written to with autograd's knowledge, as by ``load_state_dict``, and on another CUDA stream; other writes
    in place (to ``.data``) go unseen. Covers ``LRTLinear`` and ``LRTMultiheadAttention``. Nothing is kept inside
    ``torch.compile``, ``torch.jit.trace``, ``torch.func`` transforms and the capture of a CUDA graph, nor of
    parametrized weights or those of a ``functional_call``. Contexts nest and may overlap; copies of the model keep
    nothing.

    Raises:
        TypeError, ValueError: not a module, or one without LRT layers or with sharded parameters, whose memory a
            gather overwrites uncounted.
    """
    layers = [layer for _, layer in lrt_layers(model, "cached_variances")]
    for layer in layers:
        if any(hasattr(posterior.scale, "device_mesh") for posterior in layer.posteriors()):
            raise ValueError(f"cached_variances: {type(model).__name__} must not be sharded; its weights are gathered")
    opened: list[tuple[LRTLayer, VarianceCache]] = []
    hooks = []

    def forget(*_) -> None:  # fused optimizers write without autograd's knowledge
        for _, cache in opened:
            cache.clear()

    def close() -> None:
        for hook in hooks:
            hook.remove()
        while opened:
            layer, cache = opened.pop()
            cache.contexts -= 1
            if cache.contexts == 0:
                cache.clear()
                if layer.__dict__.get("variances") is cache:
                    del layer.variances

    with afterwards(close):
        # After a step, for what its closure kept; and before it, as its own hooks run earlier than these, and one that
        # fails has none.
        hooks.append(register_optimizer_step_pre_hook(forget))
        hooks.append(register_optimizer_step_post_hook(forget))
        for layer in layers:
            cache = layer.variances
            if cache is None:
                cache = layer.variances = VarianceCache()
            cache.contexts += 1
            opened.append((layer, cache))
        yield model


def predict(
    model: nn.Module,
    x: torch.Tensor,
    scheme: str = "ensemble",
    num_samples: int = 100,
    *,
    seed: int | None = None,
    draws_per_call: int = 1,
) -> torch.Tensor:
    """Class probabilities ``[..., classes]`` in float32 (float64 for float64 logits), without gradients.

    "deterministic" is the softmax of the logits at the mean weights, "stochastic" that of one draw, "ensemble" the
    mean of the softmax over ``num_samples`` draws (:class:`losssurf_fast.OnlineEnsemble`). During the call the
    whole model is in ``eval()``; every module's mode is restored.

    Args:
        model: returns logits, classes last, or what has them as attribute or key "logits".
        x: passed to the model as its only argument.
        num_samples: draws of the ensemble; the other schemes ignore it.
        seed: fixes the noise and leaves torch's generators as they were. None draws from the default generator.
        draws_per_call: how many draws one forward pass computes, by stacking as many copies of x along its first
            dimension. Faster for small batches; only for models whose first dimension is a batch of independent rows,
            and whose layers draw for each row: the "sampling" of LRT layers must be "local".

    Raises:
        TypeError, ValueError: bad arguments, no stochastic layers to draw from, or an output that is no logits.
    """
    return predicted(model, x, scheme, num_samples, seed, draws_per_call).probs


@torch.no_grad()
def predicted(
    model: nn.Module, x: torch.Tensor, scheme: str, num_samples: int, seed: int | None, draws_per_call: int = 1
) -> OnlineEnsemble:
    """The ensemble behind :func:`predict`, whose log-probabilities are finite where probabilities are rounded to 0."""
    draws = check_draws("predict", scheme, num_samples, seed)
    if isinstance(draws_per_call, bool) or not isinstance(draws_per_call, int) or draws_per_call < 1:
        raise ValueError(f"predict: draws_per_call must be a positive int, got {draws_per_call!r}")
    if draws_per_call > 1 and not isinstance(x, torch.Tensor):
        raise TypeError(f"predict: draws_per_call={draws_per_call} needs a tensor x, got {type(x).__name__}")
    if draws_per_call > 1:
        _refuse_shared_draws(model, draws_per_call)
    ensemble = OnlineEnsemble(entropies=False)
    with drawing("predict", model, scheme, seed, x):
        for start in range(0, draws, draws_per_call):
            ensemble.update(_logits(model, x, min(draws_per_call, draws - start)), stacked=True)
    return ensemble


def _refuse_shared_draws(model: nn.Module, draws_per_call: int) -> None:
    """Copies of a batch share what a layer draws once for the whole batch."""
    for layer in stochastic_layers(model, "predict"):
        sampling = getattr(layer, "sampling", "local")
        if sampling != "local":
            raise ValueError(
                f"predict: draws_per_call={draws_per_call} needs layers whose sampling is 'local', got {sampling!r}"
            )


def _logits(model: nn.Module, x, copies: int) -> torch.Tensor:
    """Those of so many draws, ``[copies, ...]``."""
    logits = class_logits("predict", model(x if copies == 1 else x.repeat(copies, *[1] * (x.dim() - 1))))
    if copies == 1:
        return logits.unsqueeze(0)
    if logits.dim() < 2 or logits.shape[0] != copies * x.shape[0]:
        raise ValueError(
            f"predict: draws_per_call={copies} needs logits [batch, ..., classes], got {tuple(logits.shape)} for a "
            f"batch of {copies} * {x.shape[0]}; use draws_per_call=1"
        )
    return logits.unflatten(0, (copies, x.shape[0]))


def check_draws(caller: str, scheme: str, num_samples: int, seed: int | None) -> int:
    """How many forward passes a prediction by ``scheme`` takes.

    Raises:
        TypeError, ValueError: an argument is not as for :func:`predict`.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"{caller}: scheme must be one of {SCHEMES}, got {scheme!r}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"{caller}: num_samples must be a positive int, got {num_samples!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"{caller}: seed must be an int or None, got {type(seed).__name__}")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"{caller}: seed must fit in 64 bits, got {seed}")
    return num_samples if scheme == "ensemble" else 1


@contextlib.contextmanager
def drawing(caller: str, model: nn.Module, scheme: str, seed: int | None, x=None):
    """Every forward pass of ``model`` is one of those that a prediction by ``scheme`` takes."""
    layer_scheme = "deterministic" if scheme == "deterministic" else "stochastic"
    with evaluation_mode(caller, model), prediction(model, layer_scheme), seeded(seed, model, x):
        yield


@contextlib.contextmanager
def evaluation_mode(caller: str, model: nn.Module):
    """``model.eval()``, with every module's own mode restored."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    training = [module for module in model.modules() if module.training]

    def switch_back() -> None:
        for module in training:
            module.training = True

    with afterwards(switch_back):
        model.eval()
        yield


@contextlib.contextmanager
def seeded(seed: int | None, model: nn.Module, x=None):
    """Seeds the generators of the CPU and of the GPUs that hold ``model`` or ``x``; restores them on leaving."""
    if seed is None:
        yield
        return
    tensors = [*model.parameters(), *model.buffers(), *([x] if isinstance(x, torch.Tensor) else [])]
    gpus = sorted({t.device.index for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
