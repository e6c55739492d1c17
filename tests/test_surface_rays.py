"""Rays, and the width of an optimum as a number."""

import math

import numpy as np
import pytest
import torch
from surface_models import Quadratic, mean_loss, optimum, quadratic_loader

import losssurf_fast as lsf
from losssurf_fast.surface.rays import Rays, unit_directions


def run(model, weights, **kwargs):
    kwargs = {"max_distance": 2.0, "num_rays": 3, "points": 5, "loss_fn": mean_loss, "progress": False} | kwargs
    return lsf.rays(model, weights, quadratic_loader(), **kwargs)


def test_rays_of_a_quadratic_are_its_formula():
    model = Quadratic(1)
    rays = run(model, model, seed=8)
    assert rays.values["loss"].shape == (3, 5) and rays.done.all()
    np.testing.assert_allclose(rays.distances, [0, 0.5, 1, 1.5, 2])
    w = {n: p.detach() for n, p in model.named_parameters()}
    directions = unit_directions(w, 3, 8, None, False)
    for r in range(3):
        for k, d in enumerate(rays.distances):
            expected = model.loss({n: t + d * directions(r)[n] for n, t in w.items()}).item()
            assert math.isclose(rays.values["loss"][r, k], expected, rel_tol=1e-12)


def test_width_of_a_quadratic_is_the_closed_form():
    model = optimum()  # loss d^2 in every direction
    rays = run(model, model, points=401, num_rays=2, delta=0.49)
    np.testing.assert_allclose(rays.widths(), 0.7, rtol=1e-9)
    assert math.isclose(rays.width(), 0.7, rel_tol=1e-9) and math.isclose(rays.mean_width(), 0.7, rel_tol=1e-9)
    np.testing.assert_allclose(rays.widths(delta=0.25), 0.5, rtol=1e-9)
    coarse = run(model, model)  # between points, linear: d^2 is 1 at 1 and 2.25 at 1.5
    np.testing.assert_allclose(coarse.widths(delta=2.0), 1 + 0.5 * (2.0 - 1) / (2.25 - 1), rtol=1e-9)


def test_a_wider_optimum_has_the_greater_width():
    narrow, wide = optimum(), optimum()
    for buffer in (wide.matrix_curvature, wide.vector_curvature):
        buffer.mul_(0.25)
    ratio = run(wide, wide, points=101).width() / run(narrow, narrow, points=101).width()
    assert math.isclose(ratio, 2, rel_tol=1e-3)


def rays_of(values, delta=1.0):
    rays = Rays(np.arange(4.0), len(values), delta)
    rays.values = {"loss": np.array(values, dtype=float)}
    return rays


def test_widths_at_the_edges():
    inf, nan = math.inf, math.nan
    rays = rays_of(
        [
            [0, 2, 0, 9],  # the first crossing counts
            [0, 0, 0, 1],  # on a point
            [0, 0.5, 0.9, 0.99],  # not reached
            [0, 0.5, nan, 9],  # unknown
            [0, 2, nan, nan],  # reached before
            [0, 0.5, inf, inf],  # a loss that overflows has risen
            [5, 4, 6, 9],  # from its own start
            [nan, 1, 2, 3],
        ]
    )
    np.testing.assert_array_equal(rays.widths(), [0.5, 3, inf, nan, 0.5, 1, 2, nan])


def test_median_width_survives_rays_that_do_not_reach_delta_and_the_mean_does_not():
    rays = rays_of([[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert rays.width() == 2 and rays.mean_width() == math.inf
    assert rays_of([[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0]]).width() == math.inf


def test_two_networks_have_the_same_rays_and_the_network_is_measured_once():
    calls = []

    class Counting(Quadratic):
        def forward(self, x):
            calls.append({n: p.detach().clone() for n, p in self.named_parameters()})
            return super().forward(x)

    model, found = Counting(), []
    for seed in (1, 2):
        calls.clear()
        start = dict(Quadratic(seed).named_parameters())
        run(model, Quadratic(seed), points=3, num_rays=2)
        assert len(calls) == (1 + 2 * 2) * len(quadratic_loader())
        found.append([{n: (t - start[n]).detach() for n, t in call.items()} for call in calls])
    for a, b in zip(*found, strict=True):
        assert all(torch.allclose(t, b[n], atol=1e-12) for n, t in a.items())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"max_distance": 0.0}, ValueError, "max_distance must be positive and finite, got 0.0"),
        ({"max_distance": math.inf}, ValueError, "max_distance must be positive and finite, got inf"),
        ({"max_distance": "1"}, TypeError, "max_distance must be a number, got str"),
        ({"delta": -1}, ValueError, "delta must be positive"),
        ({"num_rays": 0}, ValueError, "num_rays must be at least 1, got 0"),
        ({"num_rays": 2.0}, TypeError, "num_rays must be an int, got float"),
        ({"points": 1}, ValueError, "points must be at least 2, got 1"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ({"normalization": "l2"}, ValueError, "normalization must be one of"),
    ],
)
def test_rays_refuse(arguments, error, message):
    with pytest.raises(error, match=f"(rays|philox_normal): {message}"):
        run(Quadratic(), Quadratic(), **arguments)


def test_widths_refuse():
    with pytest.raises(ValueError, match=r"Rays\.widths: metric must be one of loss, got 'error'"):
        rays_of([[0, 1, 2, 3]]).widths("error")
    with pytest.raises(ValueError, match=r"Rays\.widths: delta must be positive"):
        rays_of([[0, 1, 2, 3]]).widths(delta=0.0)
