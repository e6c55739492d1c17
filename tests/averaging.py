"""What the tests of averages share: a model with every kind of tensor, and what training does to it."""

import torch
from torch import nn


class Net(nn.Module):
    """Tied, frozen, complex and direct parameters, batch norm, integer and non-persistent buffers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5, bias=False)
        self.last.weight = nn.Parameter(torch.randn(5, 7))
        self.tied = nn.Linear(7, 5, bias=False)
        self.tied.weight = self.last.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.randn(2), persistent=False)

    def forward(self, x):
        return self.tied(self.norm(self.first(x))) * self.scale


def step(model, size=0.1):
    """A training step's effect: every parameter moves, running statistics and buffers too."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=size)
        for b in nn.Module.buffers(model):
            b.copy_(~b if b.dtype == torch.bool else b + 1)


def assert_states(actual, expected, exact=False):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
