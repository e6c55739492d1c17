import math

import pytest
import torch
from averaging import Net, step
from common import BF16
from torch import nn
from torch.optim import swa_utils

import losssurf_fast as lsf


def averaged_pair(dtype=None, make=lsf.AveragedModel):
    model = Net().to(dtype)
    average = make(model)
    for _ in range(3):
        step(model)
        average.update_parameters(model)
    step(model)
    return model.eval(), average.eval()


def bits(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone().view(-1).view(torch.uint8) for name, t in tensors}


def assert_same_bits(model, before):
    assert all(torch.equal(now, before[name]) for name, now in bits(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("make", [lsf.AveragedModel, swa_utils.AveragedModel])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_swaps_and_restores(dtype, make, wrap):
    model, average = averaged_pair(dtype, make)
    with torch.no_grad():
        model.frozen.copy_(torch.tensor([-0.0, math.nan, math.inf]))
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    versions, objects = [p._version for p in model.parameters()], [*model.parameters()]
    x = torch.randn(4, 5, dtype=dtype)
    wrapped = wrap(model)
    with lsf.averaged_weights(wrapped, average) as inside:
        assert inside is wrapped
        assert torch.equal(wrapped(x), average(x)) and torch.equal(model.cache.float(), average.module.cache.float())
        assert model.mask.equal(average.module.mask)
    assert_same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(now >= then + 2 for now, then in zip([p._version for p in model.parameters()], versions, strict=True))
    assert model.first.weight.grad.eq(1).all()


def test_restores_after_an_exception_and_when_nested():
    model, average = averaged_pair()
    other = lsf.AveragedModel(Net(), use_buffers=True)
    before = bits(model)
    with pytest.raises(ZeroDivisionError), lsf.averaged_weights(model, average):
        outer = bits(model)
        with lsf.averaged_weights(model, other):
            assert torch.equal(model.first.weight, other.module.first.weight)
            step(model)  # what happens to the averages inside is undone too
        assert_same_bits(model, outer)
        raise ZeroDivisionError
    assert_same_bits(model, before)


def test_inside_inference_mode():
    model, average = averaged_pair()
    before, x = bits(model), torch.randn(4, 5)
    with torch.inference_mode(), lsf.averaged_weights(model, average):
        assert torch.equal(model(x), average(x))
    with lsf.averaged_weights(model, average), torch.inference_mode():
        assert torch.equal(model(x), average(x))
    assert_same_bits(model, before)
    model(x).sum().backward()


@torch.inference_mode()
def test_a_model_made_in_inference_mode():
    model, average = averaged_pair()
    before = bits(model)
    with lsf.averaged_weights(model, average):
        assert torch.equal(model.first.weight, average.module.first.weight)
    assert_same_bits(model, before)


def test_training_sees_the_swap():
    model, average = averaged_pair()
    loss = model(torch.randn(4, 5, requires_grad=True)).sum()
    with lsf.averaged_weights(model, average):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whatever_has_averages():
    class Mean:
        def __init__(self, tensors):
            self.tensors = tensors

        def averages(self):
            return self.tensors

    model = Net()
    before = bits(model)
    parameters = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with lsf.averaged_weights(model, Mean(parameters)):
        assert all((p == 1).all() for p in model.parameters())
        assert torch.equal(model.cache.view(torch.uint8), before["cache"])  # buffers are left where none are given
    refused = {
        "it has mask, norm.running_mean, norm.running_var and 1 more besides": {"cache": torch.zeros(2)},
        "it lacks other": {"other": torch.zeros(2)},
        r"frozen must have shape \(2,\), got \(3,\)": {"frozen": torch.zeros(2)},
    }
    for message, changed in refused.items():
        with (
            pytest.raises(ValueError, match=f"averaged_weights: .*{message}"),
            lsf.averaged_weights(model, Mean(parameters | changed)),
        ):
            pass
    with (
        pytest.raises(ValueError, match="it has frozen besides"),
        lsf.averaged_weights(model, Mean({n: p for n, p in parameters.items() if n != "frozen"})),
    ):
        pass
    assert_same_bits(model, before)


def test_an_offloaded_update_is_finished_first(monkeypatch):
    monkeypatch.setattr("losssurf_fast.averaging.offload.leaves_device", lambda values: True)
    model = Net()
    average = lsf.AveragedModel(model, offload="cpu")
    step(model)
    average.update_parameters(model)
    expected = bits(model)
    step(model)
    with lsf.averaged_weights(model, average):
        assert_same_bits(model, expected)


def test_buffers_that_the_average_lacks_are_restored_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    swag = lsf.SWAG(model)
    swag.collect_model(model)
    before = bits(model)
    with lsf.averaged_weights(model, swag):
        lsf.update_bn([torch.randn(6, 3)], model)
        assert model[1].num_batches_tracked == 1
    assert_same_bits(model, before)


def test_swag_in_the_model_and_an_exception():
    model = Net()
    swag = lsf.SWAG(model)
    for _ in range(3):
        step(model)
        swag.collect_model(model)
    step(model)
    before = bits(model)
    with pytest.raises(ZeroDivisionError), lsf.averaged_weights(model, swag):
        assert all(torch.equal(p, swag.averages()[name]) for name, p in model.named_parameters())
        lsf.update_bn([torch.randn(6, 5)], model)
        raise ZeroDivisionError
    assert_same_bits(model, before)


def test_restores_into_tensors_that_were_replaced():
    model, average = averaged_pair()
    before = bits(model)
    with lsf.averaged_weights(model, average):
        model.load_state_dict({name: t + t for name, t in model.state_dict().items()}, assign=True)
        model.cache = torch.zeros(2)
        assert model.tied.weight is not model.last.weight
    assert torch.equal(model.tied.weight, model.last.weight)
    model.tied.weight = model.last.weight
    assert_same_bits(model, before)
    with lsf.averaged_weights(model, average):
        model.cache, model.mask = torch.zeros(5), None
    assert model.cache.eq(0).all() and model.mask is None
    assert all(torch.equal(now, before[name]) for name, now in bits(model).items() if name != "cache")


@pytest.mark.parametrize(
    "ours, theirs", [("float32", "complex64"), ("complex64", "float32"), ("float32", "int64"), ("uint8", "bool")]
)
def test_other_kinds_of_dtypes_are_refused_by_everything_that_pairs(ours, theirs):
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    for m, dtype in ((model, ours), (other, theirs)):
        m.register_buffer("extra", torch.ones(2, dtype=getattr(torch, dtype)))
    average, swag, fge = lsf.AveragedModel(model), lsf.SWAG(model), lsf.FGE(model)
    average.update_parameters(model), swag.collect_model(model), fge.collect_model()
    kept = [bits(m) for m in (average, swag.module, other)]
    state = {name: t.clone() for name, t in swag.state_dict().items()}
    calls = [
        lambda: average.update_parameters(other),
        lambda: swag.collect_model(other),
        lambda: fge.collect_model(other),
    ]
    calls += [lambda: lsf.averaged_weights(other, average).__enter__()]
    calls += [lambda: swag.load_state_dict(state | {"base.extra": other.extra})]
    for call in calls:
        with pytest.raises(TypeError, match=f"extra must be like torch.{ours}, got torch.{theirs}"):
            call()
    for m, before in zip((average, swag.module, other), kept, strict=True):
        assert_same_bits(m, before)
    assert all(torch.equal(t, state[name]) for name, t in swag.state_dict().items())


def test_bad_arguments():
    with (
        pytest.raises(TypeError, match=r"averaged_weights: model must be a torch.nn.Module, got int"),
        lsf.averaged_weights(3, 4),
    ):
        pass
    with (
        pytest.raises(TypeError, match="averaged_weights: average must be an average of a model, got Linear"),
        lsf.averaged_weights(nn.Linear(1, 1), nn.Linear(1, 1)),
    ):
        pass


@pytest.mark.parametrize("make", [lsf.SWAG, lsf.AveragedModel, lsf.FGE])
def test_expanded_buffers_are_written_and_restored(make):
    """They hold each value once, and torch refuses to copy into them; a BatchNorm's statistics come after them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].register_buffer("positions", torch.arange(4.0).expand(3, 4), persistent=False)
    average, x, before = make(model), torch.randn(6, 3), {n: b.clone() for n, b in model.named_buffers()}
    getattr(average, "collect_model", getattr(average, "update_parameters", None))(model)
    if isinstance(average, lsf.FGE):
        average.predict(x, bn_loader=[x])
    else:
        with lsf.averaged_weights(model, average):
            lsf.update_bn([x], model)
            model[0].positions[0, 0] = 7.0
            assert not model[1].running_mean.equal(before["1.running_mean"])
    assert all(b.equal(before[n]) for n, b in model.named_buffers())
    assert model[0].positions.stride(0) == 0
