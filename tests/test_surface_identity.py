"""A file is taken up by the run that began it, and by no other."""

import copy
import functools

import pytest
import torch
from surface_models import classifier_loaders
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast.surface.identity import name_of_function


def network(seed=0, between=nn.ReLU, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), between(), nn.Linear(8, 3)).to(dtype)


def measure(path, model=None, loss_fn=F.cross_entropy, dtype=torch.float32, **kwargs):
    data = [(x.to(dtype), y) for x, y in classifier_loaders()["test"]]
    kwargs = {"points": 2, "loss_fn": loss_fn, "path": path, "progress": False} | kwargs
    return lsf.line(model or network(), network(1), network(2), data, **kwargs)


def times(k):
    return lambda outputs, targets: k * F.cross_entropy(outputs, targets)


class Weighted:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, outputs, targets):
        return self.factor * F.cross_entropy(outputs, targets)

    def method(self, outputs, targets):
        return self(outputs, targets)


class WithTable(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        with torch.no_grad():
            self.inner.weight.fill_(seed), self.inner.bias.fill_(0)

    def forward(self, outputs, targets):
        return F.cross_entropy(self.inner(outputs), targets)


def with_default(k):
    def loss(outputs, targets, k=k):
        return k * F.cross_entropy(outputs, targets)

    return loss


PAIRS = {
    "modules": [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5)],
    "modules' tensors": [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1, k])) for k in (1, 2)],
    "modules' children": [WithTable(1), WithTable(2)],
    "children's settings": [nn.Sequential(nn.Dropout(p)).forward for p in (0.1, 0.2)],
    "partials": [functools.partial(F.cross_entropy, label_smoothing=s) for s in (0.1, 0.5)],
    "lambdas": [lambda o, y: 2 * F.cross_entropy(o, y), lambda o, y: 3 * F.cross_entropy(o, y)],
    "lambdas' names": [lambda o, y: F.cross_entropy(o, y), lambda o, y: F.nll_loss(o, y)],
    "closures": [times(2), times(3)],
    "closures on tensors": [times(torch.tensor(2.0)), times(torch.tensor(3.0))],
    "defaults": [with_default(2), with_default(3)],
    "objects": [Weighted(2), Weighted(3)],
    "methods": [Weighted(2).method, Weighted(3).method],
    "functions in closures": [times(times(2)), times(times(3))],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_functions_are_told_apart(pair):
    first, second = PAIRS[pair]
    assert name_of_function(first) == name_of_function(first) == name_of_function(copy.deepcopy(first))
    assert name_of_function(first) != name_of_function(second)


def test_a_function_that_calls_itself_has_a_name():
    def loss(outputs, targets):
        return loss if outputs is None else F.cross_entropy(outputs, targets)

    assert name_of_function(loss).startswith("test_a_function_that_calls_itself_has_a_name")


def test_a_modules_mode_is_no_part_of_its_name():
    module = WithTable(1)
    assert name_of_function(module) == name_of_function(copy.deepcopy(module).eval())


@pytest.mark.parametrize("pair", ["modules", "partials", "lambdas", "closures"])
def test_another_loss_does_not_take_up_the_file(pair, tmp_path):
    first, second = PAIRS[pair]
    path = tmp_path / "line.npz"
    found = measure(path, loss_fn=first)
    assert measure(path, loss_fn=first).values["loss"].tolist() == found.values["loss"].tolist()
    with pytest.raises(ValueError, match="line.npz holds another run, which differs in loss_fn;"):
        measure(path, loss_fn=second)
    with pytest.raises(ValueError, match="differs in metrics;"):
        measure(path, loss_fn=first, metrics={"more": second})


@pytest.mark.parametrize("change", [{"between": nn.Tanh}, {"dtype": torch.float64}])
def test_another_model_does_not_take_up_the_file(change, tmp_path):
    path = tmp_path / "line.npz"
    measure(path)
    with pytest.raises(ValueError, match="differs in the model;"):
        measure(path, network(**change), dtype=change.get("dtype", torch.float32))


def test_autocast_makes_another_run(tmp_path):
    path = tmp_path / "line.npz"
    measure(path)
    with pytest.raises(ValueError, match="differs in autocast;"), torch.autocast("cpu", torch.bfloat16):
        measure(path)
