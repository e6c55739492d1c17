"""A curve's parameters: one tree for each bend, with the names of the model's own parameters."""

import copy
from collections.abc import Mapping

import torch
from torch import nn


def parameter_tree(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module that is nothing but parameters, under their dotted names."""
    root = nn.Module()
    for name, parameter in parameters.items():
        owner, leaf = root, name
        while "." in leaf:
            child, leaf = leaf.split(".", 1)
            if child not in owner._modules:
                owner.add_module(child, nn.Module())
            owner = owner._modules[child]
        owner.register_parameter(leaf, parameter)
    return root


class Places:
    """Where a model reads its parameters: each has one or, if tied, several attributes of its modules.

    Construction takes the Parameters out of the model; :meth:`install` puts plain tensors in their place, which stay
    until the next call. So whatever reads an attribute later, as activation checkpointing does in backward, finds
    what forward found.
    """

    def __init__(self, model: nn.Module):
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                name = names.setdefault(id(parameter), f"{prefix}.{leaf}" if prefix else leaf)
                self._places.setdefault(name, []).append((module, leaf))
        for places in self._places.values():
            for module, leaf in places:
                del module._parameters[leaf]

    def install(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            for module, leaf in self._places[name]:
                setattr(module, leaf, weight)  # an LSTM keeps a list of them, too

    def remove(self) -> None:
        for places in self._places.values():
            for module, leaf in places:
                module.__dict__.pop(leaf, None)

    def model_with(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """A copy of ``model``, the one of construction, with ``weights`` as its Parameters."""
        self.remove()
        copies: dict[int, nn.Module] = {}
        result = copy.deepcopy(model, copies)
        for name, weight in weights.items():
            parameter = nn.Parameter(weight.detach().clone())
            for module, leaf in self._places[name]:
                setattr(copies[id(module)], leaf, parameter)
        return result
