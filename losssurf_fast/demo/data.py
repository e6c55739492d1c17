"""The demo's data: scikit-learn's bundled digits, or MNIST by way of torchvision."""

import dataclasses

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


def load(name: str, root: str | None) -> Data:
    return {"digits": _digits, "mnist": _mnist}[name](root)


def _digits(root: str | None) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("demo: needs scikit-learn for its digits; pip install scikit-learn") from None
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # one split, whatever --seed says
    images, labels = images[order], labels[order]
    split = 1347
    return _standardised("digits", images[:split], labels[:split], images[split:], labels[split:], side=8)


def _mnist(root: str | None) -> Data:
    try:
        from torchvision.datasets import MNIST
    except ImportError:
        raise SystemExit(
            "demo: --data mnist needs torchvision;\npip install torchvision, or use --data digits"
        ) from None
    if root is None:
        raise SystemExit("demo: --data mnist needs --root DIR,\nwhere MNIST lies or is downloaded to")
    try:
        train, test = MNIST(root, train=True, download=True), MNIST(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"demo: MNIST is not in {root} and could not be downloaded:\n{error}") from error
    parts = [part for d in (train, test) for part in (d.data.float().flatten(1), d.targets)]
    return _standardised("mnist", *parts, side=28)


def _standardised(name, train_x, train_y, test_x, test_y, side) -> Data:
    mean, std = train_x.mean(), train_x.std()
    return Data(name, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y, side)
