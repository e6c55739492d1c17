"""Curve with activation checkpoints in the network or around it, and several forwards before a backward."""

import dataclasses
import pickle

import pytest
import torch
from common import F64
from curve_networks import Blocks, curve_of, gradients
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", [True, False])
def test_checkpoints_inside_the_network(reentrant, head):
    plain, inside = (curve_of(lambda r=r: Blocks(r, head)) for r in (None, reentrant))
    x, y = (torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    t = torch.tensor(0.6, dtype=F64, requires_grad=True)
    losses = {
        "one": lambda c: c(x, t=t).square().sum(),
        "two": lambda c: c(x, t=t).square().sum() + 2 * c(y, t=0.8).square().sum(),
        "interleaved": lambda c: (c(x, t=0.1) * c(x, t=0.4)).sum() + c(y, t=t).exp().sum(),
        "with l2": lambda c: c(x, t=t).square().sum() + c.l2(),
        "evaluated meanwhile": lambda c: evaluated(c, c(x, t=t).square().sum(), x),
        "outside, too": lambda c: checkpoint(c, x, t=t, use_reentrant=False).square().sum() + c(y, t=0.2).sum(),
    }
    for name, loss in losses.items():
        expected, others = gradients(plain, loss(plain), x, y, t)
        actual, ours = gradients(inside, loss(inside), x, y, t)
        assert expected.keys() == actual.keys() and expected
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(ours, others)
        assert inside._places.installed is None  # nothing is held after backward


def evaluated(curve, loss, x):
    """Other weights installed between forward and backward."""
    with torch.no_grad():
        curve(x, t=0.9)
    with curve.at(0.3) as module:
        module(x)
    curve.module_at(0.5)
    pickle.dumps(curve)
    return loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_curve_draws_the_same_t(reentrant):
    curve = curve_of(Blocks)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    torch.manual_seed(5)
    expected, others = gradients(curve, curve(x).square().sum(), x)
    torch.manual_seed(5)
    loss = checkpoint(curve, x, use_reentrant=reentrant).square().sum()
    torch.manual_seed(6)
    actual, ours = gradients(curve, loss, x)
    torch.testing.assert_close((actual, ours), (expected, others))


def test_backward_twice_through_a_checkpoint():
    plain, inside = curve_of(Blocks), curve_of(lambda: Blocks(False))
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    results = []
    for curve in (plain, inside):
        output = curve(x, t=0.3)
        curve(x, t=0.7)
        curve.zero_grad()
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        results.append([p.grad for p in curve.bends[1].parameters()])
    torch.testing.assert_close(*results)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    more: dict


class InDataclass(Blocks):
    def forward(self, x):
        return Output(super().forward(x), {"hidden": [x]})


def test_outputs_in_a_dataclass():
    plain, inside = curve_of(InDataclass), curve_of(lambda: InDataclass(False))
    x = torch.randn(3, 4, dtype=F64)
    loss = lambda c: c(x, t=0.2).logits.sum() + c(x, t=0.7).logits.square().sum()
    torch.testing.assert_close(gradients(inside, loss(inside)), gradients(plain, loss(plain)))
