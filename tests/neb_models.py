"""What the tests of bands share: an energy over the plane with a curved valley, as a model, and short runs."""

import torch
from torch import nn

import losssurf_fast as lsf

F64 = torch.float64


class Valley(nn.Module):
    """(x^2 - 1)^2 + 5 (y - 1.5 (1 - x^2))^2: minima 0 at (-1, 0) and (1, 0), the saddle 1 between them at (0, 1.5).

    On the straight line between the minima it rises to 12.25.
    """

    saddle, line = 1.0, 12.25

    def __init__(self, x, y, dtype=torch.float64):
        super().__init__()
        self.x, self.y = (nn.Parameter(torch.tensor(float(v), dtype=dtype)) for v in (x, y))

    def forward(self, inputs):
        height = self.y - 1.5 * (1 - self.x.square())
        return ((self.x.square() - 1).square() + 5 * height.square()) * inputs.mean()


def energy(outputs, targets):
    return outputs


LOADER = [(torch.ones(1, dtype=torch.float64), torch.zeros(1))]


def minima():
    return Valley(-1, 0), Valley(1, 0)


def bits(model):
    """Everything a tool must leave as it was."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [p.grad for p in model.parameters()]


def assert_untouched(model, before):
    state, modes, grads = bits(model)
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[name], t) for name, t in before[0].items())
    assert modes == before[1] and all(a is b for a, b in zip(grads, before[2], strict=True))


SHORT = [{"steps": 3, "lr": 0.01, "count": 2, "subsample": 2}, {"insert": "highest", "count": 1}]


def run(start, end, cycles=SHORT, loader=LOADER, loss_fn=energy, model=None, **options):
    model = Valley(0.3, 0.4) if model is None else model
    curve = lsf.auto_neb(model, start, end, loader, loss_fn=loss_fn, cycles=cycles, progress=False, **options)
    return curve, curve.report
