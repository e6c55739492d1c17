"""What the tests of the loss surface share: a model whose surface is a formula, and one with everything in it."""

import torch
from torch import nn
from torch.nn import functional as F


class Quadratic(nn.Module):
    """Outputs 0.5 sum_i h_i (w_i - c_i)^2 for every sample; in float64."""

    def __init__(self, seed=0, curvature=None):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        fixed = torch.Generator().manual_seed(100)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=draw, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(5, generator=draw, dtype=torch.float64))
        for name, p in dict(self.named_parameters()).items():
            self.register_buffer(f"{name}_centre", torch.randn(p.shape, generator=fixed, dtype=torch.float64), False)
            h = (
                torch.rand(p.shape, generator=fixed, dtype=torch.float64)
                if curvature is None
                else torch.full_like(p, curvature)
            )
            self.register_buffer(f"{name}_curvature", h.detach(), False)

    def loss(self, weights=None):
        weights = weights or dict(self.named_parameters())
        terms = [
            (getattr(self, f"{n}_curvature") * (w - getattr(self, f"{n}_centre")) ** 2).sum()
            for n, w in weights.items()
        ]
        return 0.5 * sum(terms)

    def forward(self, x):
        return self.loss().expand(len(x))


def mean_loss(outputs, targets):
    return outputs.mean()


def quadratic_loader():
    return [(torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(2, 1), torch.zeros(2))]


def optimum():
    """A Quadratic of curvature 2 at its minimum."""
    model = Quadratic(curvature=2.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(getattr(model, f"{name}_centre"))
    return model


class Classifier(nn.Module):
    """BatchNorm, dropout, a tied layer, a frozen and a direct parameter, a buffer of one's own."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
            self.middle, self.again, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.again.weight = self.middle.weight
            self.scale = nn.Parameter(torch.rand(()) + 1)
            self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
            self.register_buffer("shift", torch.randn(6))
            self.register_buffer("seen", torch.tensor(7))

    def forward(self, x):
        hidden = self.drop(F.relu(self.norm(self.first(x + self.shift))))
        return self.last(self.again(F.relu(self.middle(hidden)))) * self.scale + self.frozen


def classifier_loaders(seed=0):
    draw = torch.Generator().manual_seed(seed)
    make = lambda n: [(torch.randn(b, 6, generator=draw), torch.randint(3, (b,), generator=draw)) for b in n]
    return {"train": make((16, 16, 7)), "test": make((10, 5))}


def state(model):
    """Bits, addresses, versions' order, modes and gradients: all that must be as before."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        {n: t.detach().clone().reshape(-1).view(torch.uint8).tolist() for n, t in named},
        {n: t.data_ptr() for n, t in named},
        {n: m.training for n, m in model.named_modules()},
        {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
    )
