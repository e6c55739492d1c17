"""Batches of the experiments and the data sets that they come from."""

import argparse
import pickle
import sys

import pytest
import torch
from test_experiments import averaged_training, run
from torch import nn

from experiments import data as experiment_data


def test_batches_come_once_in_an_order_of_their_own():
    x, y = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    shares = [experiment_data.Batches(x, y, 4, shuffle=True, rank=rank, world=2) for rank in range(2)]
    orders = []
    for epoch in range(2):
        for share in shares:
            share.set_epoch(5, epoch)
        batches = list(zip(*shares, strict=True))
        assert len(batches) == len(shares[0]) == 2  # 2 of 10 samples are left out
        assert all(len(labels) == 2 for pair in batches for _, labels in pair)
        orders.append(torch.cat([labels for pair in batches for _, labels in pair]).tolist())
        assert len(set(orders[-1])) == 8
    assert orders[0] != orders[1]
    for share in shares:
        share.set_epoch(5, 0)
    assert torch.cat([labels for pair in zip(*shares, strict=True) for _, labels in pair]).tolist() == orders[0]
    plain = experiment_data.Batches(x, y, 4)
    assert torch.cat([labels for _, labels in plain]).tolist() == list(range(10))
    assert [len(labels) for _, labels in experiment_data.Batches(x, y, 9, rank=1, world=2)] == [4]  # none of the last


@pytest.mark.parametrize(
    ("batch_size", "world", "message"),
    [(11, 1, "--batch-size must be from 1 to 10, got 11"), (3, 2, "must be divisible by the 2 ranks, got 3")],
)
def test_batch_sizes_that_do_not_go(batch_size, world, message):
    with pytest.raises(SystemExit, match=message):
        experiment_data.Batches(torch.ones(10, 1, 1, 1), torch.ones(10), batch_size, shuffle=True, world=world)


def test_augmentation_shifts_and_mirrors():
    x = torch.rand(3, 2, 6, 5)
    shifts = torch.tensor([[4, 0, 5], [4, 4, 8]])
    out = experiment_data.shifted(x, shifts, torch.tensor([False, False, True]))
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1, :, 4:], x[1, :, :2])
    assert not out[1, :, :4].any()
    assert torch.equal(out[2, :, :5, 4], x[2, :, 1:, 4])  # moved by 4 to the left, then mirrored
    assert not out[2, :, :, :4].any()
    batches = experiment_data.Batches(x, torch.arange(3), 3, shuffle=True, augment=True)
    batches.set_epoch(0, 0)
    first, again = next(iter(batches)), next(iter(batches))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], x[first[1]])


def test_digits_are_enlarged():
    small, large = experiment_data.load("digits", None), experiment_data.load("digits", None, size=32)
    assert small.train_x.shape == (1347, 1, 8, 8)
    assert large.test_x.shape == (450, 1, 32, 32)
    torch.testing.assert_close(
        nn.functional.avg_pool2d(large.train_x, 4).mean(), small.train_x.mean(), atol=1e-2, rtol=0
    )


class FakeTorchvision:
    """Stands for torchvision.datasets: tiny CIFAR and MNIST."""

    def _images(self, train, shape):
        images = torch.randint(256, (40 if train else 20, *shape), dtype=torch.uint8)
        return argparse.Namespace(data=images, targets=torch.arange(len(images)) % 10)

    def MNIST(self, root, train, download):
        return self._images(train, (28, 28))

    def CIFAR10(self, root, train, download):
        found = self._images(train, (32, 32, 3))
        return argparse.Namespace(data=found.data.numpy(), targets=found.targets.tolist())

    CIFAR100 = CIFAR10


def test_cifar(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", argparse.Namespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", FakeTorchvision())
    data = experiment_data.load("cifar10", "root", size=32)
    assert data.train_x.shape == (40, 3, 32, 32)
    assert (data.num_classes, data.augmented, data.test_y.dtype) == (10, True, torch.int64)
    torch.testing.assert_close(data.train_x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train_x.std((0, 2, 3)), torch.ones(3))
    assert experiment_data.load("cifar100", "root").num_classes == 100
    with pytest.raises(SystemExit, match="cifar-100-python/train must hold CIFAR-100's coarse labels: .*No such file"):
        experiment_data.load("cifar100-coarse", str(tmp_path))
    (tmp_path / "cifar-100-python").mkdir()
    for name, labels in (("train", [7] * 40), ("test", [19] * 20)):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps({"coarse_labels": labels}))
    coarse = experiment_data.load("cifar100-coarse", str(tmp_path))
    assert (coarse.num_classes, coarse.test_y.tolist()) == (20, [19] * 20)


@pytest.mark.parametrize(
    "content",
    [b"", pickle.dumps({"coarse_labels": [7] * 40})[:-9], pickle.dumps(7), b"(lp0\nS'\\xZZ'\n.", b"not pickled"],
)
def test_damaged_coarse_labels(content, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", argparse.Namespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", FakeTorchvision())
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(SystemExit, match="trial: .*train must hold CIFAR-100's coarse labels"):
        experiment_data.load("cifar100-coarse", str(tmp_path), caller="trial")


def test_images_of_the_wrong_size(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", argparse.Namespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", FakeTorchvision())
    with pytest.raises(SystemExit, match="the network takes images of 32 x 32 pixels, those of --data mnist have 28"):
        run(averaged_training, tmp_path, "--data", "mnist", "--root", "root")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_without_torchvision_or_root(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", argparse.Namespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", FakeTorchvision())
    with pytest.raises(SystemExit, match=f"trial: --data {name} needs --root DIR"):
        run(averaged_training, tmp_path, "--data", name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="pip install torchvision, or use --data digits"):
        run(averaged_training, tmp_path, "--data", name, "--root", "root")
