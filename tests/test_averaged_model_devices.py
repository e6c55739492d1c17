"""Models on several devices, as far as a machine with one can tell: tensors that say they are elsewhere."""

import pytest
import torch
from averaging import Net, assert_states, step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import swa_utils

import losssurf_fast as lsf
from losssurf_fast.averaging.pairing import by_device


def test_by_device():
    devices = ["cuda:1", "cpu", "cuda:0", "cpu"]
    with FakeTensorMode():
        averages = [torch.empty(i, device=d) for i, d in enumerate(devices)]
        values = [torch.empty(i, device="cuda:1") for i in range(len(devices))]  # one later layer has moved, or all
        groups = by_device(averages, values)
        assert [[len(a) for a in ours] for ours, _ in groups] == [[0], [1, 3], [2]]
        for ours, theirs in groups:
            assert len({t.device for t in (*ours, *theirs)}) == 1
            assert [len(v) for v in theirs] == [len(a) for a in ours]
        there = averages[:1] * 2
        ((ours, theirs),) = by_device(there, there)
        assert ours is there and theirs is there  # the common case costs no copy
        assert by_device([], []) == []


@pytest.mark.parametrize("kwargs", [{}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)}])
def test_update_of_a_model_on_several_devices(kwargs, monkeypatch):
    model, lists, average = Net(), [], lsf.AveragedModel._average
    averaged, expected = lsf.AveragedModel(model, **kwargs), swa_utils.AveragedModel(model, **kwargs)
    monkeypatch.setattr(lsf.AveragedModel, "_average", lambda *args: (lists.append(len(args[1])), average(*args)))
    for devices in (1, 2, 3):  # layers move between updates
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "get_device", lambda t, devices=devices: t.dim() % devices)
            step(model)
            averaged.update_parameters(model)
        expected.update_parameters(model)
    assert lists == [8, 4, 4, 1, 4, 3]
    assert_states(averaged.state_dict(), expected.state_dict())
