"""The networks of the experiments, by the name that ``--model`` takes."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from experiments.models.lenet5 import LeNet5
from experiments.models.preresnet import PreResNet
from experiments.models.vgg import VGG16
from experiments.models.vgg_like import VGGLike


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a network is made: ``build(channels, num_classes, width)``, for images of ``size`` (None: of any size)."""

    build: Callable[[int, int, int], nn.Module]
    size: int | None = None


MODELS = {
    "lenet5": Architecture(partial(LeNet5, 28), size=28),
    "lenet5-8x8": Architecture(partial(LeNet5, 8), size=8),
    "preresnet8": Architecture(partial(PreResNet, 8)),
    "preresnet20": Architecture(partial(PreResNet, 20)),
    "preresnet110": Architecture(partial(PreResNet, 110)),
    "preresnet164": Architecture(partial(PreResNet, 164)),
    "vgg16": Architecture(VGG16, size=32),
    "vgglike": Architecture(VGGLike),
}


def recipe(recipes: Mapping[str, Any], model: str, caller: str) -> Any:
    """The entry of ``recipes`` whose key the name of ``--model`` begins with.

    Raises:
        SystemExit: there is none.
    """
    for name, found in recipes.items():
        if model.startswith(name):
            return found
    known = [name for name in sorted(MODELS) if name.startswith(tuple(recipes))]
    raise SystemExit(f"{caller}: --model must be one of {', '.join(known)}, got {model}")
