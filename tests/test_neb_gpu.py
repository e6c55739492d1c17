"""A band on a GPU is that of the CPU."""

import copy

import pytest
import torch
from neb_models import LOADER, Valley, energy, minima
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf

pytestmark = pytest.mark.gpu

CYCLES = [{"steps": 20, "lr": 0.005, "count": 2, "subsample": 2}, {"insert": "highest", "count": 1}]


def test_an_energy():
    options = {"loss_fn": energy, "cycles": CYCLES, "progress": False}
    wanted = lsf.auto_neb(Valley(0, 0), *minima(), LOADER, **options)
    found = lsf.auto_neb(Valley(0, 0).cuda(), *minima(), LOADER, device="cuda", **options)
    torch.testing.assert_close({n: t.cpu() for n, t in found.state_dict().items()}, wanted.state_dict())
    assert found.report.points["loss"] == pytest.approx(wanted.report.points["loss"])


def test_steps_wait_for_nothing():
    """Networks with BatchNorm; only measuring a band waits for the device."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(3)]
    loader = [(torch.randn(32, 8).cuda(), torch.arange(32).cuda() % 3)]
    steps = []

    def loss_fn(outputs, targets):
        if outputs.requires_grad:
            steps.append(1)
            torch.cuda.set_sync_debug_mode("error" if 2 < len(steps) < 30 else "default")
        return F.cross_entropy(outputs, targets)

    cycles = [{"steps": 20, "lr": 0.01, "count": 3, "subsample": 1}]
    try:
        curve = lsf.auto_neb(
            copy.deepcopy(networks[0]).cuda(), *networks[:2], loader, loss_fn=loss_fn, cycles=cycles, progress=False
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert curve.num_bends == 5 and len(steps) == 60 and curve.report.saddle < 10
