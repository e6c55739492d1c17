"""A curve's parameters: one tree for each bend, with the names of the model's own parameters."""

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from losssurf_fast.averaging.tensors import plain_name
from losssurf_fast.undoing import afterwards


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


def combined(parameter: torch.Tensor) -> bool:
    """Whether a curve combines it; parameters of integers are constants."""
    return parameter.is_floating_point() or parameter.is_complex()


def computed_in(model: nn.Module) -> dict[int, torch.Tensor]:
    """Copies, for deepcopy's memo, of what torch would not copy: tensors that a forward computed and a module keeps."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return {id(t): t.detach().clone() for t in kept if not t.is_leaf}


class Bends:
    """The parameters of trees as K lists of tensors, read anew each time: FSDP2, ``to`` and loading replace them.

    Walking the trees of 167 parameters takes longer than their owners' dicts, which stay.
    """

    def __init__(self, trees: nn.ModuleList):
        self.names = [name for name, _ in trees[0].named_parameters()]
        self._owners = [self._owners_of(tree) for tree in trees]

    def _owners_of(self, tree: nn.Module) -> list[tuple[nn.Module, str]]:
        places = [name.rpartition(".") for name in self.names]
        return [(tree.get_submodule(owner), leaf) for owner, _, leaf in places]

    def lists(self) -> list[list[torch.Tensor]]:
        return [[module._parameters[leaf] for module, leaf in owners] for owners in self._owners]

    def first(self) -> torch.Tensor:
        module, leaf = self._owners[0][0]
        return module._parameters[leaf]


class Places:
    """Where a model reads its parameters: each has one or, if tied, several attributes of its modules.

    Construction takes the Parameters out of the model; :meth:`install` puts plain tensors in their place, which stay
    until the next call. So whatever reads an attribute later, as activation checkpointing does in backward, finds
    what forward found. Where nothing is installed there are tensors on the meta device, which have the shapes alone.

    Raises:
        NotImplementedError: the model keeps a Parameter elsewhere, too, and would go on reading it.
    """

    def __init__(self, model: nn.Module):
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._nothing: dict[str, torch.Tensor] = {}
        self._block: dict[str, torch.Tensor] | None = None
        taken = self._take_out(model)
        self.install(None)
        for name, parameter in taken.items():
            if parameter() is not None:
                raise NotImplementedError(
                    f"Curve: the network holds {name} past its modules' own parameters; the weights of the curve would "
                    "not reach it there"
                )

    def _take_out(self, model: nn.Module) -> dict[str, weakref.ref]:
        names: dict[int, str] = {}
        taken = {}
        for prefix, module in model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None or not combined(parameter):
                    continue
                name = names.setdefault(id(parameter), plain_name(f"{prefix}.{leaf}" if prefix else leaf))
                self._places.setdefault(name, []).append((module, leaf))
                self._nothing[name] = torch.empty_like(parameter, device="meta", requires_grad=False)
                taken[name] = weakref.ref(parameter)
                del module._parameters[leaf]
        return taken

    def install(self, weights: dict[str, torch.Tensor] | None, registered: bool = False) -> None:
        """Let the model read ``weights``; None leaves it without.

        ``registered`` shows them as its parameters: its forward may ask ``next(self.parameters()).dtype``.
        """
        for name, weight in (self._nothing if weights is None else weights).items():
            for module, leaf in self._places[name]:
                module._parameters.pop(leaf, None)
                if type(module).__setattr__ is nn.Module.__setattr__:
                    module.__dict__[leaf] = weight  # as that would, but for its search for what to replace
                else:
                    setattr(module, leaf, weight)  # an LSTM keeps a list of them, too
                if registered:
                    module._parameters[leaf] = weight
        self.installed, self.registered = weights, registered

    def hide(self) -> None:
        """Leave what is installed, no longer as parameters."""
        for places in self._places.values():
            for module, leaf in places:
                module._parameters.pop(leaf, None)
        self.registered = False

    @property
    def in_block(self) -> bool:
        return self._block is not None

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """For a whole walk along a curve: after the block the model reads and shows what it did before."""
        before, block = (self.installed, self.registered), self._block

        def back() -> None:
            self._block = block
            self.install(*before)

        with afterwards(back):
            yield

    @contextlib.contextmanager
    def installed_for(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """Install for a block, after which the model has what it had before."""
        with self.untouched():
            self._block = weights
            self.install(weights, registered=True)
            yield

    def free(self) -> None:
        """Let go of what was installed for no block: the innermost block's weights are back, outside of one none."""
        if self.installed is not self._block:
            self.install(self._block, self.in_block)

    def forget(self, weights: dict[str, torch.Tensor]) -> None:
        """:meth:`free` if these are what is installed."""
        if self.installed is weights:
            self.free()

    def clear(self) -> None:
        """Let go of all, those of blocks among it."""
        self._block = None
        self.install(None)

    def model_with(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
        """A copy of ``model``, the one of construction, with these Parameters."""
        before = self.installed, self.registered
        self.install(None)
        copies = computed_in(model)
        result = copy.deepcopy(model, copies)
        self.install(*before)
        for name, parameter in parameters.items():
            for module, leaf in self._places[name]:
                setattr(copies[id(module)], leaf, parameter)
        return result
