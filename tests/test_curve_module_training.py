"""Curve in training: higher gradients, copies, casts, autocast, averages, what stays alive."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from common import F64
from curve_networks import Blocks, curve_of, gradients
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

import losssurf_fast as lsf


def test_second_order_gradients():
    curve = curve_of(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    x = torch.randn(3, 2, dtype=F64)
    inner = list(curve.bends[1].parameters())

    def gradient_norm(*values):
        state = {f"bends.1.{n}": v for (n, _), v in zip(curve.bends[1].named_parameters(), values, strict=True)}
        loss = functional_call(curve, state, (x,), {"t": torch.tensor(0.3, dtype=F64)}).square().sum()
        return sum(g.square().sum() for g in torch.autograd.grad(loss, values, create_graph=True))

    values = [p.detach().clone().requires_grad_() for p in inner]
    assert torch.autograd.gradcheck(gradient_norm, values)


def test_torch_func():
    curve = curve_of(lambda: nn.Linear(4, 2))
    x = torch.randn(3, 4, dtype=F64)
    state = {n: p.detach() for n, p in curve.named_parameters()}
    loss = lambda state: functional_call(curve, state, (x,), {"t": torch.tensor(0.3, dtype=F64)}).square().sum()
    found = grad(loss)(state)
    expected, _ = gradients(curve, curve(x, t=torch.tensor(0.3, dtype=F64)).square().sum())
    for n, g in expected.items():
        torch.testing.assert_close(found[n], g)
    curve(x)  # nothing of the transform is left
    copy.deepcopy(curve)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.last = nn.LSTM(4, 5, batch_first=True), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.kept = None

    def forward(self, x):
        self.kept = None
        return self.last(self.norm(self.rnn(x)[0].flatten(0, 1)))


@pytest.mark.parametrize("forward", ["none", "train", "no_grad"])
def test_copies_and_files(forward):
    curve = curve_of(Recurrent, double=False)
    x = torch.randn(2, 3, 4)
    if forward == "train":
        curve(x).sum().backward(retain_graph=True)
        curve(x, t=torch.tensor(0.5, requires_grad=True) * 0.5)
    elif forward == "no_grad":
        with torch.no_grad():
            curve(x)
    file = io.BytesIO()
    torch.save(curve, file)
    assert len(file.getvalue()) < 40_000  # K weights, no installed ones
    file.seek(0)
    copies = copy.deepcopy(curve), pickle.loads(pickle.dumps(curve)), torch.load(file, weights_only=False)
    curve.eval()
    for other in copies:
        other.eval()
        assert torch.equal(other(x, t=0.3), curve(x, t=0.3))
        assert (other.last_t is None) == (curve.last_t is None)
        with torch.no_grad():
            other.bends[0].last.bias.add_(1)
            other.module.norm.running_mean.add_(1)
        assert not torch.equal(other(x, t=0.3), curve(x, t=0.3))
        other.train()(x, t=0.3).sum().backward()
        assert all(p.grad is None for p in curve.parameters()) or forward == "train"


def test_casts_and_moves():
    curve = curve_of(Recurrent, double=False)
    x = torch.randn(2, 3, 4)
    curve(x).sum().backward()
    for dtype in (torch.bfloat16, F64, torch.float32):
        curve.to(dtype)
        assert {p.dtype for p in curve.parameters()} == {dtype} and curve.module.norm.running_mean.dtype == dtype
        output = curve(x.to(dtype), t=0.5)
        assert output.dtype == dtype
        output.sum().backward()
        assert curve.bends[1].last.bias.grad.dtype == dtype
        assert curve.module_at(0.2).rnn.weight_ih_l0.dtype == dtype
    empty = copy.deepcopy(curve).to_empty(device="cpu")
    empty.load_state_dict(curve.state_dict())
    curve.eval(), empty.eval()
    assert torch.equal(empty(x, t=0.4), curve(x, t=0.4))
    meta = copy.deepcopy(curve).to("meta")
    assert meta(x.to("meta")).is_meta


def test_modes_and_zero_grad():
    models = [Recurrent().eval(), Recurrent().eval()]
    curve = lsf.Curve(models)
    assert not curve.training and not curve.module.norm.training
    assert curve.train().module.norm.training and not curve.eval().module.rnn.training
    curve.train()(torch.randn(2, 3, 4)).sum().backward()
    curve.zero_grad()
    assert all(p.grad is None for p in curve.parameters())
    assert not any(m.training for model in models for m in model.modules())


def test_training_with_the_usual_tools():
    """Optimizer, clipping, scaler, autocast, weight decay by name: the loss falls and the ends stay."""
    torch.manual_seed(0)
    net = lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 2))
    curve = lsf.Curve([net(), net()], num_bends=4)
    before = copy.deepcopy(curve.state_dict())
    x = torch.randn(256, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    trainable = [p for p in curve.parameters() if p.requires_grad]
    decayed = {id(p) for n, p in curve.named_parameters() if n.endswith("weight")}
    groups = [[p for p in trainable if (id(p) in decayed) == d] for d in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], lr=0.02
    )
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=64.0), []
    for _ in range(120):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(curve(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(curve.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])
    for name, value in before.items():
        end = name.startswith(("bends.0.", "bends.3.", "_extra_state"))
        assert torch.equal(value, curve.state_dict()[name]) == end, name


def test_averages_and_batch_statistics_of_a_curve():
    net = lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    curve = curve_of(net)
    x = torch.randn(32, 4, dtype=F64)
    average = lsf.AveragedModel(curve)
    wanted = []
    for _ in range(2):
        with torch.no_grad():
            curve.bends[1].get_parameter("0.weight").normal_()
        curve(x).sum().backward()
        average.update_parameters(curve)
        wanted.append(curve.bends[1].get_parameter("0.weight").detach().clone())
    torch.testing.assert_close(average.module.bends[1].get_parameter("0.weight"), (wanted[0] + wanted[1]) / 2)
    lsf.update_bn([x[:16], x[16:]], curve, forward_kwargs={"t": 0.4})
    model = curve.module_at(0.4)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    lsf.update_bn([x], average, forward_kwargs={"t": 0.4})
    with lsf.averaged_weights(curve, average):
        torch.testing.assert_close(curve.eval()(x, t=0.4), average.eval()(x, t=0.4))
    assert torch.equal(curve.bends[1].get_parameter("0.weight"), wanted[1])


def test_nothing_stays_alive():
    """No cycles: the graph of a forward goes with its output, the curve with its last name."""
    gc.disable()
    try:
        curve = curve_of(lambda: Blocks(False))
        x = torch.randn(3, 4, dtype=F64)
        for backward in (True, False):
            output = curve(x, t=0.3)
            weight = weakref.ref(curve._places.installed["head.weight"])
            kept = weakref.ref(output)
            if backward:
                output.sum().backward()
            del output
            assert kept() is None
            curve.release()
            assert weight() is None and curve._places.installed is None
        first = curve(x, t=0.3)
        weight = weakref.ref(curve._places.installed["head.weight"])
        del first
        curve(x, t=0.4)
        assert weight() is None  # the next forward frees them
        with torch.no_grad():
            curve(x, t=0.4)
        module, parameter = weakref.ref(curve.module), weakref.ref(curve.bends[1].head.weight)
    finally:
        gc.enable()
    del curve
    gc.collect()
    assert module() is None and parameter() is None


class KeepsItsOutput(nn.Linear):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def test_a_network_that_keeps_its_output():
    curve = curve_of(lambda: KeepsItsOutput(4, 2))
    output = weakref.ref(curve(torch.randn(3, 4, dtype=F64)))
    assert output() is not None
    model = curve.module_at(0.5)  # torch cannot copy what a forward computed
    assert not model.kept.requires_grad
    module = weakref.ref(curve.module)
    del curve
    gc.collect()
    assert output() is None and module() is None
    ends = [KeepsItsOutput(4, 2), KeepsItsOutput(4, 2)]
    for end in ends:
        end(torch.randn(3, 4))
    lsf.Curve(ends)


def test_at_can_be_nested_and_restores():
    curve = curve_of(lambda: nn.Linear(4, 2))
    x = torch.randn(3, 4, dtype=F64)
    loss = curve(x, t=0.3).sum()
    installed = curve._places.installed
    with curve.at(0.1) as outer:
        first = outer(x)
        with curve.at(0.9) as inner:
            assert not torch.equal(inner(x), first)
        assert len(list(outer.parameters())) == 2 and not torch.equal(curve(x, t=0.9), first)
        curve.module_at(0.7)
        assert len(list(outer.parameters())) == 2
    loss = curve(x, t=0.3).sum()
    installed = curve._places.installed
    with curve.at(0.1) as outer, torch.no_grad():
        curve(x, t=0.9)
        assert torch.equal(outer(x), first) and not first.requires_grad
    with pytest.raises(ZeroDivisionError), curve.at(0.5):
        raise ZeroDivisionError
    assert curve._places.installed is installed and not list(curve.module.parameters())
    loss.backward()
    copy.deepcopy(curve)


def test_data_parallel_is_refused():
    curve = curve_of(lambda: nn.Linear(4, 2))
    with pytest.raises(NotImplementedError, match="Curve: nn.DataParallel is not supported"):
        curve._replicate_for_data_parallel()
