"""What the tests of curves in training share: a network in activation checkpoints, a curve, gradients by name."""

import torch
from common import F64
from torch import nn
from torch.utils.checkpoint import checkpoint

import losssurf_fast as lsf


class Blocks(nn.Module):
    """Layers in activation checkpoints, all of them or all but the last; None: in none."""

    def __init__(self, reentrant=None, head=True):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head, self.reentrant = nn.Linear(4, 2) if head else None, reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x if self.head is None else self.head(x)


def curve_of(factory, seed=0, double=True, **kwargs):
    torch.manual_seed(seed)
    models = [factory().to(F64 if double else torch.float32) for _ in range(2)]
    curve = lsf.Curve(models, **kwargs)
    for p in curve.bends[1].parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return curve


def gradients(curve, loss, *others):
    curve.zero_grad()
    for x in others:
        x.grad = None
    loss.backward()
    return {n: p.grad.clone() for n, p in curve.named_parameters() if p.grad is not None}, [x.grad for x in others]
