"""Curve in backward: activation checkpointing of every kind of network, failures, l2 after a step, what is freed."""

import gc
import weakref

import pytest
import torch
from common import F64
from torch import nn
from torch.utils.checkpoint import checkpoint

import losssurf_fast as lsf


class AsksForParameters(nn.Module):
    """As many networks find their dtype."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        assert [n for n, _ in self.named_parameters()] == ["layer.weight", "layer.bias"]
        return self.layer(x.to(next(self.parameters()).dtype)).tanh()


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


class Net(nn.Module):
    """Blocks in activation checkpoints, None: in none; ``wrap`` makes its outputs."""

    def __init__(self, reentrant=None, wrap=lambda x: x, block=plain):
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.head, self.reentrant, self.wrap = nn.Linear(4, 2), reentrant, wrap

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.wrap(self.head(x))


def curve_of(*args, **kwargs):
    torch.manual_seed(0)
    return lsf.Curve([Net(*args, **kwargs).to(F64) for _ in range(2)])


def batch():
    torch.manual_seed(1)
    return torch.randn(3, 4, dtype=F64, requires_grad=True)


def gradients(curve, loss):
    curve.zero_grad()
    loss.backward()
    assert curve._places.installed is None and not list(curve.module.parameters())
    return [p.grad.clone() for p in curve.bends[1].parameters()]


REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


@REENTRANT
def test_blocks_that_ask_for_their_parameters(reentrant):
    x = batch()
    loss = lambda c: c(x, t=0.3).square().sum() + (c(x, t=0.6) * c(x, t=0.8)).sum()
    expected, curve = (curve_of(r, block=AsksForParameters) for r in (None, reentrant))
    torch.testing.assert_close(gradients(curve, loss(curve)), gradients(expected, loss(expected)))
    with curve.at(0.2) as module:
        inside, names = module(x), [n for n, _ in module.named_parameters()]
        assert len(names) == 6
        curve.zero_grad()
        loss(curve).backward()
        assert [n for n, _ in module.named_parameters()] == names and torch.equal(module(x), inside)
    torch.testing.assert_close([p.grad for p in curve.bends[1].parameters()], gradients(expected, loss(expected)))


class Output:
    def __init__(self, logits):
        self.more, self.itself = {"logits": [logits]}, self


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


@REENTRANT
def test_outputs_in_an_object(reentrant):
    x = batch()
    found = lambda output: output.more["logits"][0]
    loss = lambda c: found(c(x, t=0.2)).sum() + found(c(x, t=0.7)).square().sum()
    expected, curve = curve_of(None, Output), curve_of(reentrant, Output)
    torch.testing.assert_close(gradients(curve, loss(curve)), gradients(expected, loss(expected)))


def test_outputs_that_are_not_found_do_not_mix_the_forwards():
    x = batch()
    loss = lambda c: c(x, t=0.2).logits.sum() + c(x, t=0.7).logits.square().sum()
    loss(curve_of(None, Slots)).backward()
    for reentrant in (False, True):
        with pytest.raises(RuntimeError, match="meta"):
            loss(curve_of(reentrant, Slots)).backward()


class Fails:
    """A hook that raises the first time."""

    def __init__(self):
        self.done = False

    def __call__(self, grad):
        if not self.done:
            self.done = True
            raise ZeroDivisionError


@REENTRANT
def test_backward_again_after_it_failed(reentrant):
    expected, curve, x = curve_of(), curve_of(reentrant), batch()
    inputs = x * 1
    inputs.register_hook(Fails())
    loss = curve(inputs, t=0.3).square().sum()
    names = [*curve.state_dict()]
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    assert [*curve.state_dict()] == names and not list(curve.module.parameters()) and curve._places.installed is None
    torch.testing.assert_close(gradients(curve, loss), gradients(expected, expected(x, t=0.3).square().sum()))


@pytest.mark.parametrize("around", [None, False, True])
def test_l2_after_backward_is_that_of_the_moved_bends(around):
    curve, x = curve_of(), batch()
    output = curve(x, t=0.5) if around is None else checkpoint(lambda x: curve(x, t=0.5), x, use_reentrant=around)
    output.square().sum().backward()
    before = curve.l2(0.5).item()
    with torch.no_grad():
        for p in curve.bends[1].parameters():
            p.sub_(p.grad)
    assert curve.l2().item() == curve.l2(0.5).item() != before
    curve.zero_grad()
    curve.l2().backward()  # of a graph of its own
    actual = [p.grad.clone() for p in curve.bends[1].parameters()]
    curve.zero_grad()
    curve.l2(0.5).backward()
    torch.testing.assert_close(actual, [p.grad for p in curve.bends[1].parameters()])


def test_weights_of_a_step_are_gone_before_the_next(monkeypatch):
    """One network more would be alive at the peak."""
    gc.disable()
    try:
        for backward in (True, False):
            curve, x = curve_of(), batch()
            output = curve(x, t=0.3)
            weight = weakref.ref(curve._places.installed["head.weight"])
            if backward:
                output.sum().backward()
            del output
            assert backward == (weight() is None)
            seen, make = [], curve._weights
            monkeypatch.setattr(curve, "_weights", lambda t: seen.append(weight()) or make(t))  # noqa: B023
            curve(x, t=0.4)
            assert seen == [None]
    finally:
        gc.enable()


def test_a_forward_with_gradients_in_a_block():
    curve, x = curve_of(), batch()
    with curve.at(0.1) as module:
        expected = module(x)
        curve(x, t=0.9)
        assert torch.equal(module(x), expected)


def test_weights_of_a_forward_that_failed_are_freed():
    curve = lsf.Curve([nn.Linear(3, 2), nn.Linear(3, 2)])
    with pytest.raises(RuntimeError):
        curve(torch.randn(4, 7), t=0.3)
    assert curve._places.installed is None and curve._last_weights is None
