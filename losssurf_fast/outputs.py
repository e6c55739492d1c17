"""What a model's outputs are to the functions that measure them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def logits_of(outputs: Any) -> Any:
    """The attribute or key "logits" of outputs that are no tensor and have it, such as those of transformers' models.

    Anything else is as it was.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, torch.Tensor) else outputs


def class_logits(caller: str, outputs: Any) -> torch.Tensor:
    """:func:`logits_of` outputs, which have to be a tensor.

    Raises:
        TypeError: they are none.
    """
    logits = logits_of(outputs)
    if not isinstance(logits, torch.Tensor):
        got = type(logits).__name__
        raise TypeError(f"{caller}: the model must return a tensor of logits, or one as .logits, got {got}")
    return logits


def is_cross_entropy(function: Callable) -> bool:
    """Whether it is torch's, with or without options: then its outputs are logits with the classes second."""
    while isinstance(function, functools.partial):
        function = function.func
    return function is F.cross_entropy or isinstance(function, nn.CrossEntropyLoss)


def call_metric(function: Callable[[Any, Any], torch.Tensor], outputs: Any, targets: Any) -> torch.Tensor:
    """``function(outputs, targets)``; cross entropy gets :func:`logits_of` them."""
    return function(logits_of(outputs) if is_cross_entropy(function) else outputs, targets)
