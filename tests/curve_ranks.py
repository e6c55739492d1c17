"""What the tests of curves on several ranks share: a network, its curve, and the comparison with one process."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import losssurf_fast as lsf


class Net(nn.Module):
    """Rows that two ranks share unevenly (5), or not at all (1), tied and frozen weights, buffers.

    With a scalar and a parameter of no rows, which FSDP2 does not take.
    """

    def __init__(self, for_fsdp=False):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.middle, self.last = nn.Linear(5, 1), nn.Linear(1, 5)
        self.tied = nn.Linear(5, 1)
        self.tied.weight = self.middle.weight
        self.empty = nn.Parameter(torch.randn(1 if for_fsdp else 0, 3))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(1) if for_fsdp else torch.randn(()))

    def forward(self, x):
        x = self.last(self.middle(self.norm(self.first(x)).tanh())) * self.scale + self.frozen
        return self.tied(x) + self.empty.sum()


def network(for_fsdp=False, **kwargs):
    torch.manual_seed(3)
    models = [Net(for_fsdp).double() for _ in range(2)]
    curve = lsf.Curve(models, **kwargs).eval()
    with torch.no_grad():
        for p in curve.bends[1].parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return curve


def batch():
    torch.manual_seed(11)
    return torch.randn(6, 4, dtype=torch.float64)


def here(x, rank):
    return x.chunk(2)[rank]


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_gradients(actual, expected):
    named = dict(expected.named_parameters())
    assert [*dict(actual.named_parameters())] == [*named]
    for name, p in actual.named_parameters():
        assert (p.grad is None) == (named[name].grad is None), name
        if p.grad is not None:
            assert type(p.grad) is type(p.data) and whole(p.grad).shape == named[name].shape
            torch.testing.assert_close(whole(p.grad), named[name].grad, msg=lambda m, name=name: f"{name}: {m}")


def all_ranks(t):
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.detach())
    return found
