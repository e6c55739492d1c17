import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import SequentialLR
from torch.optim.swa_utils import SWALR

import losssurf_fast as lsf


def optimizer(*rates, **options):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], **options)


def run(schedule, steps):
    """The rates of the first group and where weights are collected, step by step."""
    rates, collected = [], []
    for step in range(steps):
        schedule.optimizer.step()
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr()[0] == rates[-1]
        if schedule.collect_now:
            collected.append(step)
        schedule.step()
    return rates, collected


def test_swa_constant_lr():
    rates, collected = run(lsf.SWAConstantLR(optimizer(1.0), swa_lr=0.2, swa_start=10, collect_every=3), 18)
    assert rates == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4] + [0.2] * 9)
    assert collected == [9, 12, 15]


def test_swa_cyclic_lr():
    rates, collected = run(lsf.SWACyclicLR(optimizer(1.0), cycle=4, lr_1=0.5, lr_2=0.1), 9)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.4, 0.3, 0.2, 0.1, 0.4])
    assert collected == [3, 7]
    assert run(lsf.SWACyclicLR(optimizer(1.0), cycle=1, lr_1=0.5, lr_2=0.1), 3) == ([0.1] * 3, [0, 1, 2])


def test_fge_triangle_lr():
    rates, collected = run(lsf.FGETriangleLR(optimizer(1.0), cycle=4, lr_1=0.05, lr_2=1e-4), 9)
    middle = (0.05 + 1e-4) / 2
    assert rates == pytest.approx([0.05, middle, 1e-4, middle, 0.05, middle, 1e-4, middle, 0.05])
    assert rates[2] == 1e-4
    assert rates[4] == 0.05  # t = 0, 1/2, 1: lr_1, lr_2, lr_1
    assert collected == [2, 6]


SCHEDULES = {
    "constant": lambda o: lsf.SWAConstantLR(o, swa_lr=[0.2, 0.3], swa_start=10),
    "cyclic": lambda o: lsf.SWACyclicLR(o, 4, lr_1=[0.5, 5.0], lr_2=0.1),
    "triangle": lambda o: lsf.FGETriangleLR(o, 6, lr_1=[0.5, 5.0], lr_2=[0.1, 0.01]),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_groups_tensor_rates_and_resume(make):
    tensor_rates = optimizer(torch.tensor(1.0), torch.tensor(2.0), foreach=False)
    whole, capturable = make(optimizer(1.0, 2.0)), make(tensor_rates)
    for _ in range(21):
        resumed = make(optimizer(1.0, 2.0))
        resumed.load_state_dict(whole.state_dict())
        resumed.optimizer.load_state_dict(whole.optimizer.state_dict())
        assert resumed.get_last_lr() == whole.get_last_lr() == [g["lr"] for g in resumed.optimizer.param_groups]
        assert resumed.collect_now == whole.collect_now
        torch.testing.assert_close([r.item() for r in capturable.get_last_lr()], whole.get_last_lr())
        for schedule in (whole, capturable, resumed):
            schedule.optimizer.step()
            schedule.step()
        assert resumed.get_last_lr() == whole.get_last_lr()
    first, second = whole.get_last_lr()
    assert first != second


def test_after_a_warm_up():
    """In SequentialLR a schedule begins at its own step 0."""
    sgd = optimizer(1.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(sgd, 0.5, total_iters=2)
    cyclic = lsf.SWACyclicLR(sgd, 2, lr_1=0.4, lr_2=0.2)
    sequence = SequentialLR(sgd, [warm_up, cyclic], milestones=[2])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step(0), which torch itself deprecates
        for _ in range(6):
            sgd.step()
            rates.append(sgd.param_groups[0]["lr"])
            sequence.step()
    assert rates[2:] == pytest.approx([0.3, 0.2, 0.3, 0.2])


@pytest.mark.parametrize("name", ["SWALR", *SCHEDULES])
def test_a_loop_that_averages(name):
    """torch's SWALR and each of ours, the averaged weights against their mean."""
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=1.0)
    schedule = SWALR(sgd, swa_lr=[0.05, 0.1], anneal_epochs=3) if name == "SWALR" else SCHEDULES[name](sgd)
    average, kept = lsf.AveragedModel(model), []
    for step in range(14):
        sgd.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        sgd.step()
        if step >= 9 if name == "SWALR" else schedule.collect_now:
            average.update_parameters(model)
            kept.append(model.weight.detach().clone())
        schedule.step()
    assert len(kept) >= 2
    assert average.n_averaged == len(kept)
    torch.testing.assert_close(average.module.weight.detach(), torch.stack(kept).mean(0))
    if name == "SWALR":
        assert schedule.get_last_lr() == [0.05, 0.1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 0.1, 10), TypeError, "SWAConstantLR: optimizer must be a torch.optim.Optimizer, got NoneType"),
        ((0.0, 10), ValueError, "SWAConstantLR: swa_lr must be positive and finite, got 0.0"),
        ((float("nan"), 10), ValueError, "SWAConstantLR: swa_lr must be positive and finite, got nan"),
        (("fast", 10), TypeError, "SWAConstantLR: swa_lr must be a number, got str"),
        (([0.1], 10), ValueError, "SWAConstantLR: swa_lr must be one number or 2, one for each group, got 1"),
        ((0.1, 0), ValueError, "SWAConstantLR: swa_start must be a positive int, got 0"),
        ((0.1, 2.5), ValueError, "SWAConstantLR: swa_start must be a positive int, got 2.5"),
    ],
)
def test_swa_constant_lr_bad_arguments(arguments, error, message):
    sgd = optimizer(1.0, 2.0)
    arguments = arguments if arguments[0] is None else (sgd, *arguments)
    with pytest.raises(error, match=message):
        lsf.SWAConstantLR(*arguments)
    assert [set(g) & {"initial_lr"} for g in sgd.param_groups] == [set(), set()]
    with pytest.raises(ValueError, match="SWAConstantLR: collect_every must be a positive int, got -1"):
        lsf.SWAConstantLR(sgd, 0.1, 10, collect_every=-1)


@pytest.mark.parametrize("kind", [lsf.SWACyclicLR, lsf.FGETriangleLR])
def test_cyclic_bad_arguments(kind):
    sgd, name = optimizer(1.0), kind.__name__
    for arguments, message in (
        ((0, 0.1, 0.01), "cycle must be a positive int, got 0"),
        ((True, 0.1, 0.01), "cycle must be a positive int, got True"),
        ((4, -0.1, 0.01), "lr_1 must be positive and finite, got -0.1"),
        ((4, 0.1, 0), "lr_2 must be positive and finite, got 0"),
        ((4, 0.1, 0.2), "lr_2 must be at most lr_1, got lr_1=0.1 and lr_2=0.2"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            kind(sgd, *arguments)
    assert sgd.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="FGETriangleLR: cycle must be even, got 3"):
        lsf.FGETriangleLR(sgd, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"last_epoch": "x"}, ValueError, "last_epoch must be an int of at least 0, got 'x'"),
        ({"swa_start": 0}, ValueError, "swa_start must be a positive int, got 0"),
        ({"collect_every": None}, ValueError, "collect_every must be a positive int, got None"),
        ({"swa_lrs": [0.1]}, ValueError, "swa_lr must be one number or 2"),
        ({"base_lrs": [1.0]}, ValueError, "base_lrs must be a list of 2 rates"),
        ({"base_lrs": [1.0, "x"]}, TypeError, "base_lrs must be numbers, got str"),
    ],
)
def test_swa_constant_lr_refuses_states(change, error, message):
    schedule = lsf.SWAConstantLR(optimizer(1.0, 2.0), 0.1, 10)
    before = schedule.state_dict().copy()
    with pytest.raises(error, match=f"SWAConstantLR.load_state_dict: {message}"):
        schedule.load_state_dict(before | {"last_epoch": 4, "swa_start": 3} | change)
    with pytest.raises(ValueError, match="state_dict lacks base_lrs"):
        schedule.load_state_dict({key: value for key, value in before.items() if key != "base_lrs"})
    with pytest.raises(TypeError, match="must be a mapping, got list"):
        schedule.load_state_dict([])
    assert schedule.state_dict() == before
