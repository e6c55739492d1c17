import copy
import math

import pytest
import torch
from averaging import Net, assert_states, step
from common import BF16, F32
from torch import nn
from torch.optim import swa_utils

import losssurf_fast as lsf
from losssurf_fast.averaging import offload


def held_bytes(averaged):
    """What the parameters' values take up; asking for `module` would make them."""
    return sum(p.untyped_storage().nbytes() for p in averaged._modules["module"].parameters())


def test_holds_no_values_until_they_are_used():
    model = Net()
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8)
    for _ in range(2):
        assert held_bytes(averaged) < 4 * len([*model.parameters()]) + 4
        assert {v.dtype for k, v in averaged.state_dict().items() if "weight" in k} == {F32}
        assert held_bytes(averaged) == sum(4 * p.numel() for p in model.parameters())
        averaged.update_parameters(model)


@pytest.mark.parametrize("kwargs", [{}, {"average": "ema", "decay": 0.9}, {"avg_fn": swa_utils.get_ema_avg_fn(0.7)}])
def test_rounding_is_small_and_unbiased(kwargs):
    model = nn.Linear(256, 64)
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8, **kwargs)
    exact = lsf.AveragedModel(model, **kwargs)
    for _ in range(20):
        step(model, 0.02)
        averaged.update_parameters(model)
        exact.update_parameters(model)
    value, wanted = averaged.module.weight.detach(), exact.module.weight.detach()
    ulp = 2.0 ** (wanted.abs().amax(1, keepdim=True).log2().floor() - 6)
    error = (value - wanted) / ulp
    assert error.abs().max() < 20 and error.std() < 2
    assert error.mean().abs() < 5 * error.std() / math.sqrt(error.numel())
    assert ((value / ulp * 2) % 1 == 0).all()  # multiples of the row's unit, or of half of it


def test_a_vector_has_one_exponent():
    model = nn.BatchNorm1d(9)
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8)
    averaged.update_parameters(model)
    exponents = [exponent for _, exponent in averaged._compressed._parts.values()]
    assert len(exponents) == 2 and all(e.dim() == 0 for e in exponents)
    assert (averaged.module.weight == 1).all()


def test_looking_changes_nothing_and_loading_gives_the_same_values():
    model = Net()
    with torch.no_grad():
        model.first.weight[0] = torch.tensor([-1.9999, 0.046875, 0.1, 1.9999, 0])  # rounds to the lowest mantissa
        model.first.weight[1] = torch.tensor([1.9999, -0.046875, 0.1, -1.9999, 0])
    unseen = lsf.AveragedModel(model, average_dtype=torch.int8, use_buffers=True)
    seen = copy.deepcopy(unseen)
    for i in range(6):
        unseen.update_parameters(model)
        seen.update_parameters(model)
        before = copy.deepcopy(seen.state_dict())
        if i == 3:
            seen = lsf.AveragedModel(Net(), average_dtype=torch.int8, use_buffers=True)
            seen.module.cache.copy_(unseen.module.cache)  # not in the state_dict
            seen.load_state_dict(before)
        assert_states(seen.state_dict(), before, exact=True)
        if i > 0:
            step(model)
    assert_states(seen.state_dict(), unseen.state_dict(), exact=True)
    theirs = swa_utils.AveragedModel(model)
    theirs.load_state_dict(unseen.state_dict())
    unseen.load_state_dict(theirs.state_dict())
    assert_states(unseen.state_dict(), theirs.state_dict(), exact=True)


def test_values_that_were_written_are_taken():
    model = nn.Linear(3, 2)
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8, average="ema", decay=1.0, include_start=True)
    with torch.no_grad():
        averaged.module.weight.fill_(0.5)
    averaged.update_parameters(model)
    assert (averaged.module.weight == 0.5).all()


def test_values_keep_their_strides_and_mantissas_go_while_shown():
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8)
    for _ in range(2):
        averaged.update_parameters(model)
        assert averaged._compressed._parts.keys() == {"weight", "bias"}
        weight = averaged.module.weight
        assert weight.stride() == model.weight.stride() and not weight.is_contiguous()
        assert (weight - model.weight).abs().max() < 0.01
        assert not averaged._compressed._parts


def test_a_failed_update_changes_nothing():
    def average(a, w, n):
        if fail:
            raise ZeroDivisionError
        return w

    model, fail = nn.Linear(2, 1, bias=False), False
    averaged = lsf.AveragedModel(model, avg_fn=average, average_dtype=torch.int8)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.9999, 0.046875]]))  # to -2, whose exponent is one higher
    averaged.update_parameters(model)
    before, fail = averaged.module.weight.detach().clone(), True
    assert before[0, 0] == -2 and before[0, 1] == 0.046875
    for _ in range(8):
        with pytest.raises(ZeroDivisionError):
            averaged.update_parameters(model)
        assert torch.equal(averaged.module.weight, before) and averaged.n_averaged == 1
    fail = False
    averaged.update_parameters(model)
    assert held_bytes(averaged) == 4


def test_tied_complex_and_nan_weights():
    model = Net()
    model.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8)
    with torch.no_grad():
        model.first.weight[1, 2] = math.nan
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.wave, model.wave)
    assert averaged.module.tied.weight is averaged.module.last.weight
    weight = averaged.module.first.weight
    assert weight[1].isnan().all() and weight[[0, 2, 3, 4, 5, 6]].isfinite().all()


def test_bf16_model_forward_and_swap():
    model, x = Net().to(BF16).eval(), torch.randn(4, 5, dtype=BF16)
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8)
    averaged.update_parameters(model)
    with torch.inference_mode(), lsf.averaged_weights(model, averaged):
        assert torch.equal(model(x), averaged(x))
    assert not averaged.module.first.weight.is_inference()


def test_offloaded(monkeypatch):
    model = Net()
    averaged = lsf.AveragedModel(model, average_dtype=torch.int8, offload="cpu")
    expected = lsf.AveragedModel(model, average_dtype=torch.int8)
    monkeypatch.setattr(offload, "leaves_device", lambda values: True)
    for _ in range(4):
        step(model)
        averaged.update_parameters(model)
        expected.update_parameters(model)
    step(model)
    assert_states(averaged.state_dict(), expected.state_dict(), exact=True)
