"""The networks of the experiments, by the name that ``--model`` takes."""

import dataclasses
from collections.abc import Callable
from functools import partial

from torch import nn

from experiments.models.preresnet import PreResNet
from experiments.models.vgg import VGG16


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a network is made: ``build(channels, num_classes, width)``, for images of ``size`` (None: of any size)."""

    build: Callable[[int, int, int], nn.Module]
    size: int | None = None


MODELS = {
    "preresnet20": Architecture(partial(PreResNet, 20)),
    "preresnet110": Architecture(partial(PreResNet, 110)),
    "preresnet164": Architecture(partial(PreResNet, 164)),
    "vgg16": Architecture(VGG16, size=32),
}
