"""The demo's data: scikit-learn's bundled digits, or MNIST by way of torchvision."""

import dataclasses
import importlib

import torch


@dataclasses.dataclass
class Data:
    """Training and test images as rows, standardised by the training images' mean and deviation."""

    name: str
    train_x: torch.Tensor  # [N, side * side]
    train_y: torch.Tensor  # [N]
    test_x: torch.Tensor
    test_y: torch.Tensor
    side: int

    classes = 10

    def chance(self) -> float:
        """Accuracy of always answering the test set's most frequent class."""
        return self.test_y.bincount().max().item() / len(self.test_y)


def load(name: str, root: str | None, caller: str = "demo") -> Data:
    """The data called "digits" or "mnist"; ``caller`` is the command that messages name.

    Raises:
        SystemExit: a package is missing, or the data are not in ``root`` and cannot be downloaded.
    """
    return {"digits": _digits, "mnist": _mnist}[name](root, caller)


def _digits(root: str | None, caller: str) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(f"{caller}: needs scikit-learn for its digits; pip install scikit-learn") from None
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # one split, whatever --seed says
    images, labels = images[order], labels[order]
    split = 1347
    return _standardised("digits", images[:split], labels[:split], images[split:], labels[split:], side=8)


def _mnist(root: str | None, caller: str) -> Data:
    parts = [part for d in torchvision_sets("MNIST", root, caller) for part in (d.data.float().flatten(1), d.targets)]
    return _standardised("mnist", *parts, side=28)


def torchvision_sets(name: str, root: str | None, caller: str) -> tuple:
    """Training and test set of the class ``torchvision.datasets.<name>``, from ``root`` or downloaded to it.

    Raises:
        SystemExit: torchvision is missing, or the data are not in ``root`` and cannot be downloaded.
    """
    flag = name.lower()
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError:
        raise SystemExit(
            f"{caller}: --data {flag} needs torchvision;\npip install torchvision, or use --data digits"
        ) from None
    if root is None:
        raise SystemExit(f"{caller}: --data {flag} needs --root DIR,\nwhere {name} lies or is downloaded to")
    try:
        return tuple(getattr(datasets, name)(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{caller}: {name} is not in {root} and could not be downloaded:\n{error}") from error


def _standardised(name, train_x, train_y, test_x, test_y, side) -> Data:
    mean, std = train_x.mean(), train_x.std()
    return Data(name, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y, side)
