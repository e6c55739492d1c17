"""What the tools that read data take from a loader."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

TARGETS = ("labels", "targets", "target", "label")
SINGLE = "data"  # the name of a loader that was given none


def refuse_single_pass(caller: str, argument: str, loader: Iterable, each: str) -> None:
    """``loader`` can be read once for every ``each``, which a generator, empty at its second reading, can not.

    Raises:
        TypeError, ValueError: it is none, or an iterator.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"{caller}: {argument} must be a loader of batches, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise ValueError(
            f"{caller}: {argument} is read once for every {each}, got a {type(loader).__name__} for one pass"
        )


def by_name(loader: Iterable | Mapping[str, Iterable]) -> dict[str, Iterable]:
    """Loaders by name; one alone is called "data"."""
    return dict(loader) if isinstance(loader, Mapping) else {SINGLE: loader}


def split_batch(caller: str, batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of such a pair, or of a dict with the targets under one of ``TARGETS``.

    Raises:
        TypeError, ValueError: it is neither, or a dict with no such key or with several.
    """
    if isinstance(batch, Mapping):
        found = [key for key in TARGETS if key in batch]
        if len(found) != 1:
            raise ValueError(f"{caller}: a dict from loader must have one of the keys {TARGETS}, got {list(batch)}")
        return without_targets(batch), batch[found[0]]
    if not isinstance(batch, tuple | list):
        raise TypeError(f"{caller}: loader must yield (inputs, targets) or dicts, got {type(batch).__name__}")
    if len(batch) != 2:
        raise ValueError(f"{caller}: loader must yield (inputs, targets) or dicts, got {len(batch)} items")
    return batch[0], batch[1]


def without_targets(batch: Any) -> Any:
    """A dict without its targets; any other batch as it is."""
    return {k: v for k, v in batch.items() if k not in TARGETS} if isinstance(batch, Mapping) else batch


def num_samples(caller: str, targets: Any) -> int:
    """The first size of ``targets``, or of the first tensor in them; a tensor without sizes is one sample's.

    Raises:
        TypeError: there is no tensor in them.
    """
    for leaf in tree_leaves(targets):
        if isinstance(leaf, torch.Tensor):
            return leaf.shape[0] if leaf.dim() else 1
    raise TypeError(f"{caller}: targets must be a tensor or hold one, got {type(targets).__name__}")


class Inputs:
    """A loader whose dicts come without targets: what the model is called with when its loss is measured."""

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __iter__(self) -> Iterator:
        return map(without_targets, self.loader)

    def __len__(self) -> int:
        return len(self.loader)
