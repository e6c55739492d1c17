"""Checkpoints of github.com/da-molchanov/variance-networks (Neklyudov et al., "Variance networks", ICLR 2019).

Its PyTorch layers hold, for y = x w^T + b + sqrt(x^2 (sigma^2)^T) eps::

    LinearVDO                    W [O, I]              log_alpha, broadcastable to W       bias [1, O]
    ConvVDO                      weight [O, C, k, k]   log_alpha, broadcastable to weight  bias [1, O, 1, 1]
    LinearVariance, ConvVariance sigma, of the weight's shape, whose sign means nothing    bias likewise

Layers whose noise is not Gaussian (``LinearVarianceBe``, ``ConvVarianceUnif``...) hold W alone.
"""

import os
from collections.abc import Mapping

import torch
from torch import nn

from losssurf_fast.averaging.tensors import plain_name, unwrap
from losssurf_fast.files import load_state
from losssurf_fast.nn.lrt import LRTLayer

_CALLER = "load_variance_networks"


@torch.no_grad()
def load_variance_networks(model: nn.Module, checkpoint: Mapping[str, torch.Tensor] | str | os.PathLike) -> nn.Module:
    """Load a checkpoint of the variance-networks repository into a converted model of its architecture.

    ::

        model = lsf.to_lrt(LeNet5(), "variance", include="dense1")     # the layers that have sigma in the checkpoint
        lsf.load_variance_networks(model, "lenet5-VN.cpt")

    Layers with ``sigma`` go into "variance" layers (log_sigma2 = 2 log|sigma|), those with ``log_alpha`` into "layer",
    "neuron" or "weight" ones, whichever the model has; a coarser alpha is repeated where the model's is finer. Other
    tensors (plain layers, BatchNorm) are paired by name; a prefix ``module.`` is ignored.

    Args:
        model: the architecture of the checkpoint, with its names, after ``lsf.to_lrt``; also in a wrapper.
        checkpoint: a state_dict, or the path of a file that holds one, which is read without running code from it.

    Returns:
        ``model``, which is changed only if everything fits.

    Raises:
        OSError, TypeError: there is no such file, or the arguments are neither.
        ValueError: the file is damaged, a tensor holds other than finite real numbers, or names or shapes do not fit;
            the message lists them all and which layers of the model have to be converted how.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = load_state(_CALLER, checkpoint)
    _check(checkpoint)
    inner = unwrap(model)
    found = _without_prefix({plain_name(name): t for name, t in checkpoint.items()}, inner)
    values, mismatched = {}, []
    targets = {**dict(inner.named_parameters(remove_duplicate=False)), **dict(inner.named_buffers())}
    targets = {name: t for name, t in targets.items() if name in inner.state_dict()}
    unexpected, missing = dict(found), []
    layers = {name: m for name, m in inner.named_modules() if isinstance(m, LRTLayer)}
    for name, target in targets.items():
        source, value = _source(name, found, layers)
        if value is None:
            missing += [source] if not name.endswith("num_batches_tracked") else []  # torch before 0.4.1 has none
            continue
        unexpected.pop(source)
        fitted = _fit(name, value, target, layers)
        if fitted is None:
            mismatched.append(f"{source} {tuple(value.shape)} for {name} {tuple(target.shape)}")
        else:
            values[name] = fitted
    if missing or unexpected or mismatched:
        raise ValueError(_complaint(missing, list(unexpected), mismatched, found))
    for name, value in values.items():
        targets[name].copy_(value)
    torch.clear_autocast_cache()
    return model


def _check(checkpoint) -> None:
    """All that could stop a copy half-way, before the first."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"{_CALLER}: checkpoint must be a state_dict or the path of one, got {type(checkpoint).__name__}"
        )
    for name, t in checkpoint.items():
        if not isinstance(name, str) or not isinstance(t, torch.Tensor):
            raise TypeError(
                f"{_CALLER}: checkpoint must map names to tensors, got a {type(t).__name__} under {name!r}; if it "
                "holds the state_dict beside other things, pass that alone"
            )
        if t.is_meta or t.layout != torch.strided or t.is_complex() or t.is_quantized:
            raise ValueError(f"{_CALLER}: {name} must be a dense real tensor with values, got {t.dtype} {t.layout}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{_CALLER}: {name} must have finite numbers")


def _without_prefix(found: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    known = {name.split(".")[0] for name in model.state_dict()}
    while found and "module" not in known and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): t for name, t in found.items()}
    return found


def _source(name: str, found: dict[str, torch.Tensor], layers: dict[str, LRTLayer]) -> tuple[str, torch.Tensor | None]:
    """The checkpoint's name for the model's ``name``, and what it holds under it."""
    prefix, _, leaf = name.rpartition(".")
    layer = layers.get(prefix)
    stem = f"{prefix}." if prefix else ""
    names = [name]
    if layer is not None and leaf == "weight":
        names = [f"{stem}W", name]
    elif layer is not None and leaf == "log_sigma2":
        names = [f"{stem}sigma"]
    source = next((n for n in names if n in found), names[-1])
    return source, found.get(source)


def _fit(name: str, value: torch.Tensor, target: torch.Tensor, layers: dict[str, LRTLayer]) -> torch.Tensor | None:
    """The checkpoint's tensor as the model holds it; None where it has another shape."""
    prefix, _, leaf = name.rpartition(".")
    layer = layers.get(prefix)
    if layer is None:
        return value if value.shape == target.shape else _bias(leaf, value, target)
    if leaf == "log_alpha":
        return _log_alpha(layer, value, target)
    if leaf == "log_sigma2" and layer.parameterization == "variance" and value.shape == target.shape:
        smallest = torch.finfo(target.dtype).tiny ** 0.5
        return 2 * value.to(target.dtype).abs().clamp(min=smallest).log()
    if leaf == "log_sigma2":
        return None
    return value if value.shape == target.shape else _bias(leaf, value, target)


def _bias(leaf: str, value: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """A bias [1, O] or [1, O, 1, 1] as [O]."""
    fits = leaf == "bias" and value.shape[:2] == (1, *target.shape) and value.numel() == target.numel()
    return value.reshape(target.shape) if fits else None


def _log_alpha(layer: LRTLayer, value: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    weight = layer.posteriors()[0].shape
    whole = {"layer": (1,), "neuron": (len(target), *[1] * (len(weight) - 1))}.get(layer.parameterization, weight)
    if layer.parameterization == "layer":
        return value.reshape(1) if value.numel() == 1 else None
    try:
        return value.expand(whole).reshape(target.shape)
    except RuntimeError:
        return None


def _complaint(missing: list[str], unexpected: list[str], mismatched: list[str], found: Mapping) -> str:
    lines = [f"{_CALLER}: the checkpoint is of another model"]
    for title, names in (
        ("missing in it", missing),
        ("in it, but not in the model", unexpected),
        ("of another shape", mismatched),
    ):
        if names:
            lines.append(f"  {title}: {', '.join(names)}")
    alphas = [name for name in found if name.rpartition(".")[2] == "log_alpha"]
    layers = lambda names: ", ".join(repr(name.rpartition(".")[0]) for name in names)
    if alphas:
        finest = "layer" if all(found[name].numel() == 1 for name in alphas) else "weight"
        lines.append(f"  convert with lsf.to_lrt(model, {finest!r}, include=[{layers(alphas)}])")
    sigmas = [name for name in found if name.rpartition(".")[2] == "sigma"]
    if sigmas:
        lines.append(f"  convert with lsf.to_lrt(model, 'variance', include=[{layers(sigmas)}])")
    noisy = {name.rpartition(".")[0] for name in (*alphas, *sigmas)}
    other = [n for n in found if n.rpartition(".")[2] == "W" and n.rpartition(".")[0] not in noisy]
    if other:
        lines.append(f"  {layers(other)} had Bernoulli or uniform noise, for which there is no layer")
    if not (alphas or sigmas or other):
        lines.append("  it has no noise (log_alpha, sigma): load it with model.load_state_dict, then convert")
    return "\n".join(lines)
