import copy

import pytest
import torch
from averaging import Net, assert_states, step
from common import BF16
from torch.optim import swa_utils

import losssurf_fast as lsf
from losssurf_fast.averaging import offload


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"avg_fn": swa_utils.get_ema_avg_fn(0.7)}, {"use_buffers": True}])
def test_offload(staged, kwargs, monkeypatch):
    model = Net().to(BF16)
    averaged, expected = lsf.AveragedModel(model, offload="cpu", **kwargs), lsf.AveragedModel(model, **kwargs)
    monkeypatch.setattr(offload, "leaves_device", lambda values: staged)
    uses = [
        lambda: averaged.module.first.weight,
        lambda: averaged.state_dict(),
        lambda: averaged(torch.randn(4, 5, dtype=BF16)),
        lambda: list(averaged.parameters()),
        lambda: list(averaged.children()),
        lambda: dict(averaged.named_children()),
        lambda: averaged.apply(lambda module: None),
        lambda: averaged.averages(),
        lambda: averaged.to("cpu"),
        lambda: copy.deepcopy(averaged),
        lambda: averaged.synchronize(),
    ]
    model.eval(), averaged.eval()
    for use in uses:
        step(model)
        averaged.update_parameters(model)
        expected.update_parameters(model)
        assert (averaged._pending is not None) == staged
        step(model)  # the weights may change before the average is made
        use()
        assert averaged._pending is None
        assert_states(averaged.state_dict(), expected.state_dict(), exact=True)
    averaged.update_parameters(model)
    expected.update_parameters(model)
    averaged.update_parameters(model)
    expected.update_parameters(model)
    assert_states(averaged.state_dict(), expected.state_dict(), exact=True)
    averaged.update_parameters(model)
    averaged.load_state_dict(expected.state_dict())
    assert_states(averaged.state_dict(), expected.state_dict(), exact=True)


@pytest.mark.parametrize("staged", [False, True])
def test_an_update_that_fails_is_not_counted(staged, monkeypatch):
    def average(a, value, n):
        if broken:
            raise ZeroDivisionError
        return a + (value - a) / (n + 1)

    model, broken = Net(), False
    averaged = lsf.AveragedModel(model, offload="cpu", avg_fn=average)
    monkeypatch.setattr(offload, "leaves_device", lambda values: staged)
    averaged.update_parameters(model)
    before = copy.deepcopy(averaged.state_dict())
    step(model)
    broken = True
    with pytest.raises(ZeroDivisionError):  # where it is staged, not before the average is used
        averaged.update_parameters(model)
        averaged.synchronize()
    assert_states(averaged.state_dict(), before, exact=True)
    broken = False
    averaged.update_parameters(model)
    expected = lsf.AveragedModel(model)
    expected.load_state_dict(before)
    expected.update_parameters(model)
    assert_states(averaged.state_dict(), expected.state_dict())


@pytest.mark.gpu
def test_offload_on_a_gpu_takes_the_weights_of_its_moment_and_does_not_wait():
    model = Net().cuda()
    averaged, expected = lsf.AveragedModel(model, offload="cpu"), lsf.AveragedModel(model)
    assert all(p.is_pinned() for p in averaged.module.parameters() if p.numel())
    for i in range(4):
        torch.cuda._sleep(50_000_000)  # the copies must come after the step before them, and before the one after
        step(model)
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first makes the staging buffers
        averaged.update_parameters(model)
        expected.update_parameters(model)
        torch.cuda.set_sync_debug_mode("default")
        step(model)
        assert averaged._pending is not None
    state = {name: value.cpu() for name, value in expected.state_dict().items()}
    torch.testing.assert_close(dict(averaged.state_dict()), state)
    x = torch.randn(4, 5, device="cuda")
    with torch.no_grad(), lsf.averaged_weights(model.eval(), averaged):
        torch.testing.assert_close(model(x), expected.eval()(x))
