"""Images in memory: scikit-learn's digits, and MNIST and CIFAR by way of torchvision.

CIFAR-100 is read with its 100 labels (``cifar100``) or with their 20 superclasses (``cifar100-coarse``), which is what
the talk's table of variance networks must have used: its network of random guesses is right in 5.0 % = 1/20.
"""

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from losssurf_fast.demo import data as demo

NAMES = ("digits", "mnist", "cifar10", "cifar100", "cifar100-coarse")
PADDING = 4  # pixels by which augmentation shifts at most


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and test images, standardised by the training images' mean and deviation per channel.

    Attributes:
        train_x, test_x: ``[N, channels, size, size]``, float32.
        train_y, test_y: ``[N]``, int64.
        augmented: whether training shifts and mirrors the images.
    """

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    num_classes: int
    augmented: bool

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def size(self) -> int:
        return self.train_x.shape[-1]

    def map(self, images, labels=lambda y: y) -> "Data":
        """These data with ``images`` and ``labels`` applied to the tensors of both sets."""
        return dataclasses.replace(
            self, train_x=images(self.train_x), test_x=images(self.test_x), train_y=labels(self.train_y),
            test_y=labels(self.test_y),
        )  # fmt: skip


def load(name: str, root: str | None, *, size: int | None = None, caller: str = "experiments") -> Data:
    """The data called ``name``, for networks that take images of ``size`` (None: of any).

    The digits are 8 x 8 and are enlarged to ``size`` bilinearly; other images are taken as they are.

    Raises:
        SystemExit: a package or the data are missing, or the images have another size.
    """
    data = _flat(name, root, caller) if name in ("digits", "mnist") else _cifar(name, root, caller)
    if size is None or size == data.size:
        return data
    if name == "digits":
        return data.map(lambda x: F.interpolate(x, (size, size), mode="bilinear", align_corners=False))
    wanted, got = f"{size} x {size}", f"{data.size} x {data.size}"
    raise SystemExit(
        f"{caller}: the network takes images of {wanted} pixels, those of --data {name} have {got};\n"
        "choose another --model or other --data"
    )


def _flat(name: str, root: str | None, caller: str) -> Data:
    found = demo.load(name, root, caller)
    square = lambda x: x.view(-1, 1, found.side, found.side)
    train, test = (square(found.train_x), found.train_y), (square(found.test_x), found.test_y)
    return Data(name, *train, *test, found.classes, augmented=False)


def _cifar(name: str, root: str | None, caller: str) -> Data:
    coarse = name == "cifar100-coarse"
    sets = demo.torchvision_sets("CIFAR10" if name == "cifar10" else "CIFAR100", root, caller)
    parts = []
    for images, train in zip(sets, (True, False), strict=True):
        labels = _coarse_labels(root, train, caller) if coarse else images.targets
        parts += [torch.as_tensor(images.data).permute(0, 3, 1, 2).float(), torch.as_tensor(labels)]
    mean, std = parts[0].mean((0, 2, 3), keepdim=True), parts[0].std((0, 2, 3), keepdim=True)
    classes = 20 if coarse else 10 if name == "cifar10" else 100
    return Data(name, *parts, classes, augmented=True).map(lambda x: (x - mean) / std)


def _coarse_labels(root: str, train: bool, caller: str) -> torch.Tensor:
    """Those of the superclasses, which torchvision checks the file of but does not read."""
    path = Path(root) / "cifar-100-python" / ("train" if train else "test")
    try:
        with open(path, "rb") as file:
            return torch.as_tensor(pickle.load(file, encoding="latin1")["coarse_labels"])
    except Exception as error:  # what pickle raises for damaged files differs with the damage
        raise SystemExit(f"{caller}: {path} must hold CIFAR-100's coarse labels: {error}") from error


class Batches:
    """A loader over tensors that lie on the device: ``(images, labels)``, each rank its share of every batch.

    Shuffled, each epoch has an order of its own that ``set_epoch`` fixes, the same for every number of ranks, and drops
    what is no whole batch; augmented images are shifted by up to 4 pixels, zeros moving in, and mirrored half the time.

    Args:
        x, y: all images and labels.
        batch_size: of all ranks together, which divide it.
        shuffle: for training; otherwise every sample comes, in order.
        augment: shift and mirror the images.
        rank, world: which share.
    """

    def __init__(self, x, y, batch_size: int, *, shuffle=False, augment=False, rank: int = 0, world: int = 1):
        if shuffle and not world <= batch_size <= len(x):
            raise SystemExit(f"experiments: --batch-size must be from {world} to {len(x)}, got {batch_size}")
        if shuffle and batch_size % world:
            raise SystemExit(f"experiments: --batch-size must be divisible by the {world} ranks, got {batch_size}")
        self.x, self.y, self.batch_size, self.shuffle, self.augment = x, y, batch_size, shuffle, augment
        self.rank, self.world = rank, world
        self.set_epoch(0, 0)

    def set_epoch(self, seed: int, epoch: int) -> None:
        self._seed = seed * 1_000_003 + epoch

    def __len__(self) -> int:
        return len(self.x) // self.batch_size if self.shuffle else -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self._seed % 2**63)
        order = torch.randperm(len(self.x), generator=generator) if self.shuffle else torch.arange(len(self.x))
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            shifts = torch.randint(2 * PADDING + 1, (2, len(rows)), generator=generator) if self.augment else None
            mirrored = torch.rand(len(rows), generator=generator) < 0.5 if self.augment else None
            mine = slice(self.rank, None, self.world)
            if len(rows[mine]) == 0:
                continue
            here = rows[mine].to(self.x.device)
            images = self.x[here]
            if self.augment:
                images = shifted(images, shifts[:, mine], mirrored[mine])
            yield images, self.y[here]


def shifted(x: torch.Tensor, shifts: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Crops ``[N, C, H, W]`` of images padded by zeros, at ``shifts`` ``[2, N]``, flipped where ``mirrored``."""
    count, _, height, width = x.shape
    shifts, mirrored = shifts.to(x.device), mirrored.to(x.device)
    along = lambda size, shift: torch.arange(size, device=x.device) + shift[:, None]
    rows, columns = along(height, shifts[0]), along(width, shifts[1])
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(x, (PADDING,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
