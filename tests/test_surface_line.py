"""The line through two networks."""

import math

import numpy as np
import pytest
import torch
from surface_models import Classifier, Quadratic, classifier_loaders, mean_loss, quadratic_loader

import losssurf_fast as lsf


def quadratic_line(**kwargs):
    a, b, live = Quadratic(1), Quadratic(2), Quadratic(3)
    return a, b, live, lsf.line(live, a, b, quadratic_loader(), loss_fn=mean_loss, progress=False, **kwargs)


def between(a, b, s):
    return {n: (1 - s) * p + s * dict(b.named_parameters())[n] for n, p in a.named_parameters()}


def test_line_of_a_quadratic_is_its_formula():
    a, b, live, line = quadratic_line(points=9)
    length = math.sqrt(
        sum((p - q).detach().square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True))
    )
    assert math.isclose(line.length, length, rel_tol=1e-13)
    np.testing.assert_allclose(line.distances, np.linspace(0, length, 9), rtol=1e-13)
    for d, found in zip(line.distances, line.values["loss"], strict=True):
        assert math.isclose(found, live.loss(between(a, b, d / length)).item(), rel_tol=1e-12)
    assert line.barrier() == 0  # convex


def test_line_goes_on_beyond_its_ends_which_stay_points_of_it():
    a, b, live, line = quadratic_line(points=13, margin=(0.3, 1.0))
    assert len(line.distances) == 13 and (np.diff(line.distances) > 0).all()
    np.testing.assert_allclose(line.distances[[0, -1]], (-0.3 * line.length, 2 * line.length))
    for model, at in ((a, 0.0), (b, line.length)):
        (place,) = np.flatnonzero(line.distances == at)
        assert math.isclose(line.values["loss"][place], model.loss().item(), rel_tol=1e-14)
    assert math.isclose(line.values["loss"][-1], live.loss(between(a, b, 2.0)).item(), rel_tol=1e-12)


def test_line_at_its_ends_has_exactly_the_networks_weights():
    a, b = Classifier(1), Classifier(2)
    loaders = classifier_loaders()
    line = lsf.line(Classifier(3), a, b, loaders, points=3, recalibrate=False, progress=False)
    live = Classifier(3)
    for model, k in ((a, 0), (b, -1)):
        with torch.no_grad():
            for name, p in live.named_parameters():
                p.copy_(dict(model.named_parameters())[name])
        found = lsf.line(Classifier(3), live, a if model is b else b, loaders, points=2, recalibrate=False)
        assert {n: v[k] for n, v in line.values.items()} == {n: v[0] for n, v in found.values.items()}


def test_barrier_is_the_rise_above_the_higher_end():
    a, b, live, line = quadratic_line(points=5)
    line.values["loss"] = np.array([1.0, 1.5, 4.0, 3.0, 3.0])
    assert line.barrier() == 4.0 - 3.0
    line.values["loss"][1] = math.nan
    assert math.isnan(line.barrier("loss"))


def test_barrier_leaves_out_what_lies_beyond_the_ends():
    *_, line = quadratic_line(points=11, margin=0.5)
    line.values["loss"] = np.where((line.distances < 0) | (line.distances > line.length), 100.0, 1.0)
    assert line.barrier() == 0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"points": 1}, ValueError, "points must be at least 2, got 1"),
        ({"points": 2.0}, TypeError, "points must be an int, got 2.0"),
        ({"points": True}, TypeError, "points must be an int, got bool"),
        ({"points": 3, "margin": 1.0}, ValueError, "points must be more than 3 for the margin 1.0"),
        ({"margin": -0.1}, ValueError, "margin must not be negative, got -0.1"),
        ({"margin": math.nan}, ValueError, "margin must be finite"),
        ({"margin": (0.1, 0.1, 0.1)}, TypeError, "margin must be a number or 2 of them"),
        ({"labels": ("a",)}, ValueError, "labels must be 2 different names"),
    ],
)
def test_line_refuses(arguments, error, message):
    with pytest.raises(error, match=f"line: {message}"):
        quadratic_line(**arguments)


def test_line_refuses_one_network_twice():
    a = Quadratic(1)
    with pytest.raises(ValueError, match="line: w_a and w_b must be different networks, their distance is 0"):
        lsf.line(Quadratic(), a, a.state_dict(), quadratic_loader(), loss_fn=mean_loss)
