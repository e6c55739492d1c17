"""Checkpoints of dnn-mode-connectivity, the code of Garipov et al. (2018): layers hold ``weight_0``, ``weight_1`` ...

Its ``CurveNet`` has ``net.<layer>.<parameter>_<bend>``, the buffers ``net.<layer>.<buffer>`` and ``coeff_layer.*``. Its
curve networks are written anew beside their base networks, with other names for some layers.
"""

import os
import re
from collections.abc import Mapping

import torch
from torch import nn

from losssurf_fast.averaging import tensors
from losssurf_fast.curve.curve import Curve
from losssurf_fast.ops.curve import curve_coefficients

_NAME = "from_mode_connectivity"
_STATES = ("model_state", "state_dict")  # where its train.py and others keep the state_dict of a checkpoint
_BEND = re.compile(r"(.+)_(\d+)")
# layer of its curve networks -> that of their base networks, for its VGG, PreResNet, WideResNet and ConvFC
RENAMED = {
    r"^fc1$": "classifier.1",
    r"^fc2$": "classifier.4",
    r"^fc3$": "classifier.6",
    r"^(.+\.downsample)$": r"\1.0",
    r"^(.+\.shortcut)$": r"\1.0",
    r"^conv([123])$": lambda m: f"conv_part.{3 * int(m[1]) - 3}",
    r"^fc([456])$": lambda m: f"fc_part.{2 * int(m[1]) - 8}",
}


def from_mode_connectivity(
    checkpoint: Mapping, model: nn.Module, *, kind: str | None = None, names: Mapping[str, str] | None = None, **kwargs
) -> Curve:
    """The :class:`Curve` of a checkpoint of dnn-mode-connectivity.

    Args:
        checkpoint: a ``CurveNet``'s state_dict, or a dict with it under "model_state" or "state_dict".
        model: the base network, such as its ``architecture.base(...)``; it is copied, with the checkpoint's buffers.
        kind: "bezier" or "polychain"; None reads it off the checkpoint.
        names: layers of its curve network -> those of ``model``, where they differ; its own four architectures are
            known.
        kwargs: ``fix_start``, ``fix_end`` and ``t_per_rank`` of :class:`Curve`, which checkpoints do not tell.

    Raises:
        TypeError: an argument is not as above.
        ValueError: the checkpoint is none of a curve, bends are missing, or names or shapes are not those of ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a module, got {type(model).__name__}")
    state = _state_of(checkpoint)
    module = tensors.unwrap(model)
    parameters, buffers = ({n for n, _ in found} for found in (module.named_parameters(), module.named_buffers()))
    points: dict[int, dict[str, torch.Tensor]] = {}
    shared: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key.startswith("net."):
            layer, dot, leaf = key.removeprefix("net.").rpartition(".")
            buffer, bend = _name(layer, dot + leaf, buffers, names or {}), _BEND.fullmatch(leaf)
            if buffer in buffers or bend is None:
                shared[buffer] = value
            else:
                points.setdefault(int(bend[2]), {})[_name(layer, dot + bend[1], parameters, names or {})] = value
    if len(points) < 2 or sorted(points) != [*range(len(points))]:
        raise ValueError(f"{_NAME}: checkpoint must have net.<layer>.weight_0, _1 ..., got bends {sorted(points)}")
    kind = kind or ("bezier" if "coeff_layer.binom" in state else "polychain")
    bends = [{**points[j], **shared} for j in range(len(points))]
    try:
        return Curve(bends, kind=kind, num_bends=len(bends), model=model, **kwargs)
    except ValueError as error:
        raise ValueError(f"{_NAME}: the checkpoint does not fit model: {error}") from None


def to_mode_connectivity(curve: Curve, names: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """A state_dict that a ``CurveNet`` of dnn-mode-connectivity loads; tensors are the curve's own, not copies.

    Args:
        names: layers of the curve's network -> those of the ``CurveNet``, where they differ.

    Raises:
        TypeError: ``curve`` is no :class:`Curve`.
    """
    if not isinstance(curve, Curve):
        raise TypeError(f"to_mode_connectivity: curve must be a Curve, got {type(curve).__name__}")

    def key(name: str, suffix: str = "") -> str:
        layer, dot, leaf = name.rpartition(".")
        return f"net.{(names or {}).get(layer, layer)}{dot}{leaf}{suffix}"

    last = curve.num_bends - 1
    places = torch.arange(curve.num_bends, dtype=torch.float32)
    state = {"coeff_layer.range": places}
    if curve.kind == "bezier":  # at 1/2 every term of the binomial has the factor 2^-last
        state["coeff_layer.binom"] = (curve_coefficients(0.5, curve.num_bends) * 2.0**last).round()
        state["coeff_layer.rev_range"] = places.flip(0)
    for j, bend in enumerate(curve.bends):
        state |= {key(name, f"_{j}"): p.detach() for name, p in bend.named_parameters()}
    return state | {key(name): b.detach() for name, b in curve.module.named_buffers()}


def _state_of(checkpoint) -> dict[str, torch.Tensor]:
    if not isinstance(checkpoint, Mapping):
        hint = "; torch.load it first" if isinstance(checkpoint, str | os.PathLike) else ""
        raise TypeError(f"{_NAME}: checkpoint must be a state_dict, got {type(checkpoint).__name__}{hint}")
    for key in _STATES:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    found = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    while found and all(k.startswith("module.") for k in found):  # DataParallel
        found = {k.removeprefix("module."): v for k, v in found.items()}
    return found


def _name(layer: str, leaf: str, known: set[str], names: Mapping[str, str]) -> str:
    """What the base network calls ``layer + leaf``; that itself if it has no such tensor."""
    renamed = [re.sub(pattern, base, layer) for pattern, base in RENAMED.items() if re.search(pattern, layer)]
    candidates = [f"{candidate}{leaf}" for candidate in (names.get(layer, layer), *renamed)]
    return next((name for name in candidates if name in known), candidates[0])
