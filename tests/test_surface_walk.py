"""The model comes back bit for bit; every point is measured with its own statistics and the same batches."""

import copy
import math

import numpy as np
import pytest
import torch
from surface_models import Classifier, Quadratic, classifier_loaders, mean_loss, quadratic_loader, state
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import losssurf_fast as lsf


def plane():
    return lsf.Plane.through(Classifier(1), Classifier(2), Classifier(3))


def strange_classifier():
    """Bits that arithmetic would not keep, gradients, and a mixture of modes."""
    model = Classifier(4)
    with torch.no_grad():
        model.frozen.copy_(torch.tensor([-0.0, math.nan, math.inf]))
        model.shift[0] = -0.0
    model.last.weight.grad = torch.ones_like(model.last.weight)
    model.norm.eval()
    return model


TOOLS = {
    "plane": lambda model, loader, **kw: plane().evaluate(model, loader, points=2, progress=False, **kw),
    "line": lambda model, loader, **kw: lsf.line(model, Classifier(1), Classifier(2), loader, points=3, **kw),
    "rays": lambda model, loader, **kw: lsf.rays(
        model, Classifier(1), loader, max_distance=1.0, num_rays=2, points=2, **kw
    ),
}
every_tool = pytest.mark.parametrize("tool", TOOLS)


@every_tool
def test_model_is_bit_equal_afterwards(tool):
    model = strange_classifier()
    before, generator = state(model), torch.get_rng_state()
    TOOLS[tool](model, classifier_loaders())
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


class Broken(Exception):
    pass


def failing_after(calls, error):
    def loss_fn(outputs, targets):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise error
        return F.cross_entropy(outputs, targets)

    return loss_fn


@every_tool
@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("calls", [0, 7])
def test_model_is_bit_equal_after_what_a_loss_raises(tool, error, calls):
    model = strange_classifier()
    before = state(model)
    with pytest.raises(type(error)):
        TOOLS[tool](model, classifier_loaders(), loss_fn=failing_after(calls, error))
    assert state(model) == before


def one_sample(x, y):
    return [(x[:1], y[:1])]


@every_tool
@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda kw: kw | {"loss_fn": lambda out, y: F.cross_entropy(out, y, reduction="none")},
            ValueError,
            "loss must",
        ),
        (lambda kw: kw | {"loss_fn": lambda out, y: 0.5}, TypeError, "loss must be a tensor"),
        (lambda kw: kw | {"loss_fn": "mse"}, TypeError, "loss_fn must be a function of .*, got str"),
        (lambda kw: kw | {"metrics": {"top5": 5}}, TypeError, "top5 must be a function of .*, got int"),
        (
            lambda kw: kw | {"loader": {"train": kw["loader"]["train"], "test": []}},
            ValueError,
            "loader must yield at least one sample",
        ),
        (
            lambda kw: kw | {"loader": {}, "recalibrate": False},
            ValueError,
            "loader must hold at least one loader",
        ),
        (
            lambda kw: kw | {"loader": {"train": iter(kw["loader"]["train"])}},
            ValueError,
            "train.* is read once for every point",
        ),
        (lambda kw: kw | {"loader": {"train": None}}, TypeError, "train.* must be a loader of batches, got NoneType"),
        (lambda kw: kw | {"loader": kw["loader"]["train"]}, ValueError, "BatchNorm .*bn_loader= .*recalibrate=False"),
        (lambda kw: kw | {"bn_loader": []}, ValueError, ": BatchNorm statistics: loader must yield at least one b"),
        (lambda kw: kw | {"bn_loader": kw["loader"]["test"], "recalibrate": False}, ValueError, "exclude each other"),
        (lambda kw: kw | {"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        (lambda kw: kw | {"model": nn.Linear(6, 3)}, ValueError, "must have the tensors of the .*; it lacks"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(tool, change, error, message):
    model = strange_classifier()
    arguments = change({"model": model, "loader": classifier_loaders()})
    before = state(model)
    with pytest.raises(error, match=message):
        TOOLS[tool](**arguments)
    assert state(model) == before


def test_an_empty_loader_without_a_length_is_refused_and_the_model_untouched():
    class Nothing:
        def __iter__(self):
            return iter(())

    model = strange_classifier()
    before = state(model)
    with pytest.raises(ValueError, match="loader must yield at least one sample, got none"):
        TOOLS["plane"](model, Nothing(), recalibrate=False)
    assert state(model) == before


def at_a_point(plane, x, y, loaders, recalibrate):
    model = Classifier(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(plane.weights(x, y)[name])
    if recalibrate:
        lsf.update_bn(loaders["train"], model)
    model.eval()
    found = {}
    with torch.no_grad():
        for name, batches in loaders.items():
            x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
            outputs = model(x)
            found[f"{name}_loss"] = F.cross_entropy(outputs, y).item()
            found[f"{name}_error"] = (outputs.argmax(1) != y).double().mean().item()
            found[f"{name}_brier"] = (outputs.softmax(1) - F.one_hot(y, 3)).square().sum(1).mean().item()
    return found


@pytest.mark.parametrize("recalibrate", [True, False])
def test_every_point_has_its_own_statistics_and_all_metrics(recalibrate):
    where, loaders = plane(), classifier_loaders()
    brier = lambda out, y: (out.softmax(1) - F.one_hot(y, 3)).square().sum(1).mean()
    surface = where.evaluate(
        Classifier(4), loaders, points=(3, 2), metrics={"brier": brier}, recalibrate=recalibrate, progress=False
    )
    for i, x in enumerate(surface.xs):
        for j, y in enumerate(surface.ys):
            expected = at_a_point(where, x, y, loaders, recalibrate)
            assert surface.values.keys() == expected.keys()
            for name, value in expected.items():
                assert math.isclose(surface.values[name][i, j], value, rel_tol=1e-5), name


def test_bn_loader_is_the_one_that_is_given():
    loaders, other = classifier_loaders(), classifier_loaders(seed=1)["train"]
    run = lambda loader, **kw: plane().evaluate(Classifier(4), loader, points=2, progress=False, **kw).values
    named, single = run(loaders), run(loaders["test"], bn_loader=loaders["train"])
    np.testing.assert_array_equal(named["test_loss"], single["loss"])
    assert not np.array_equal(run(loaders["test"], bn_loader=other)["loss"], single["loss"])
    assert not np.array_equal(run(loaders, bn_loader=other)["test_loss"], named["test_loss"])


def test_points_see_the_same_batches_of_a_loader_that_shuffles():
    data = TensorDataset(torch.randn(32, 6), torch.randint(3, (32,)))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    firsts = []

    def loss_fn(outputs, targets):
        firsts.append(targets.tolist())
        return F.cross_entropy(outputs, targets)

    run = lambda: plane().evaluate(Classifier(4), {"train": loader}, points=2, loss_fn=loss_fn, progress=False)
    first = run().values
    assert len(firsts) == 16 and firsts[:4] == firsts[4:8] == firsts[8:12] and firsts[0] != firsts[1]
    torch.manual_seed(99)
    second = run().values
    assert all(np.array_equal(values, second[name]) for name, values in first.items())


def test_points_do_not_see_buffers_that_others_left():
    class Counting(Quadratic):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * 0 + self.calls

    networks = [Quadratic(seed) for seed in (1, 2, 3)]
    model = Counting()
    surface = lsf.Plane.through(*networks).evaluate(model, quadratic_loader(), points=2, loss_fn=mean_loss)
    assert (surface.values["loss"] == surface.values["loss"][0, 0]).all()
    assert model.calls == 0


@every_tool
def test_the_networks_may_be_the_live_model_itself(tool):
    live = [Classifier(1), Classifier(2), Classifier(3)]
    for model in live:  # buffers are the live model's business
        model.shift.copy_(Classifier(4).shift)
    loaders = classifier_loaders()
    runs = {
        "plane": lambda a, b, c, model: lsf.Plane.through(a, b, c).evaluate(model, loaders, points=3),
        "line": lambda a, b, c, model: lsf.line(model, a, b, loaders, points=4),
        "rays": lambda a, b, c, model: lsf.rays(model, a, loaders, max_distance=1.0, num_rays=2, points=3),
    }
    expected = runs[tool](*live, Classifier(4)).values
    for k in range(2):
        found = runs[tool](*live, live[k]).values
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    states = [dict(model.named_parameters()) for model in live]
    found = runs[tool](*states, live[0]).values
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


def test_wrapped_and_compiled_models():
    loaders = classifier_loaders()
    expected = plane().evaluate(Classifier(4), loaders, points=2).values["test_loss"]
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        found = plane().evaluate(wrap(Classifier(4)), loaders, points=2).values["test_loss"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_points_where_the_loss_is_not_finite_are_kept_as_they_are():
    loss_fn = lambda out, y: out.mean() * math.nan
    networks = [Quadratic(seed) for seed in (1, 2, 3)]
    surface = lsf.Plane.through(*networks).evaluate(Quadratic(), quadratic_loader(), points=2, loss_fn=loss_fn)
    assert np.isnan(surface.values["loss"]).all() and surface.done.all()


@every_tool
def test_a_frozen_model_and_inference_mode(tool):
    model = Classifier(4).requires_grad_(False)
    before = state(model)
    with torch.inference_mode():
        TOOLS[tool](model, classifier_loaders())
    assert state(model) == before
    assert copy.deepcopy(model)(torch.randn(4, 6)).shape == (4, 3)
