import gc
import weakref

import pytest
import torch
from averaging import Net, assert_states, step
from common import BF16
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import swa_utils

import losssurf_fast as lsf
from losssurf_fast.averaging.pairing import by_device


def test_replaced_parameters_and_other_models_are_found():
    model = Net()
    averaged = lsf.AveragedModel(model, average="ema", decay=0.0, include_start=True)  # takes each model whole
    averaged.update_parameters(model)
    model.first.weight = nn.Parameter(torch.randn(7, 5))
    model.norm = nn.BatchNorm1d(7)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.first.weight, model.first.weight)
    other = Net()
    averaged.update_parameters(other)
    assert torch.equal(averaged.module.first.weight, other.first.weight)
    averaged.module.first.weight = nn.Parameter(torch.zeros(7, 5))
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.first.weight, model.first.weight)


def test_the_model_is_not_kept_alive():
    model = Net()
    averaged = lsf.AveragedModel(model)
    averaged.update_parameters(model)
    gone = weakref.ref(model.first.weight)
    del model
    assert gone() is None
    averaged.update_parameters(Net())
    assert averaged.n_averaged == 2


@pytest.mark.parametrize("kwargs", [{}, {"average_dtype": torch.int8}])
def test_the_averages_die_with_their_model(kwargs):
    model = Net()
    averaged = lsf.AveragedModel(model, **kwargs)
    averaged.update_parameters(model)
    gone = weakref.ref(averaged.module.first.weight)
    gc.disable()
    try:
        del averaged
        assert gone() is None
    finally:
        gc.enable()


def test_one_layer_is_moved_or_replaced_between_updates():
    def move(layer):  # what moving to another device does to parameters and to buffers
        for p in layer.parameters():
            p.data = p.data.clone()
        layer.running_mean = layer.running_mean.clone()

    changes = [
        lambda m: move(m.norm),
        lambda m: m.first.to(BF16),
        lambda m: setattr(m, "norm", nn.BatchNorm1d(7)),
        lambda m: setattr(m.norm, "bias", nn.Parameter(torch.randn(7))),
        lambda m: m.norm.register_buffer("running_var", torch.rand(7)),
    ]
    model = Net()
    averaged = lsf.AveragedModel(model, average="ema", decay=0.0)  # takes each model whole
    averaged.update_parameters(model)
    for change in changes:
        step(model)
        change(model)
        averaged.update_parameters(model)
        held, taken = averaged.averages(), {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert_states(held, {name: t.to(held[name].dtype) for name, t in taken.items()}, exact=True)
    model.norm.extra = nn.Linear(2, 2)  # under a layer that had no children
    with pytest.raises(ValueError, match="it has norm.extra.weight, norm.extra.bias besides"):
        averaged.update_parameters(model)


def test_by_device():
    devices = ["cuda:1", "cpu", "cuda:0", "cpu"]
    with FakeTensorMode():  # no machine is needed that has them
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
