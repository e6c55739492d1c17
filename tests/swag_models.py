"""Models and walks for the tests of SWAG."""

import torch
from torch import nn


class Net(nn.Module):
    """A parameter of its own before its children's, a tied weight, a BatchNorm and odd shapes."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 3))
        self.first = nn.Linear(3, 5)
        self.bn = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.out(self.head(self.bn(self.first(x + self.token)))) * self.scale


@torch.no_grad()
def walk(model, steps, *swags, size=0.1):
    """Collect ``steps`` models of a random walk; returns their parameters by name, each [steps, *shape]."""
    seen = []
    for _ in range(steps):
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))
        for swag in swags:
            swag.collect_model(model)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return {n: torch.stack([s[n] for s in seen]) for n in seen[0]}


def state_of(swag):
    return {k: v.clone() for k, v in swag.state_dict().items()}


def assert_same_state(swag, before):
    assert all(torch.equal(v, before[k]) for k, v in swag.state_dict().items())
