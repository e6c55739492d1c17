"""Random directions: filter normalization, and rays that a seed replays."""

import math

import numpy as np
import pytest
import torch
from surface_models import Classifier, Quadratic, mean_loss, quadratic_loader
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.surface.directions import random_direction
from losssurf_fast.surface.rays import unit_directions
from losssurf_fast.surface.weights import gram, norm


def network():
    return {
        n: p.detach()
        for n, p in nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2)).named_parameters()
    }


def test_filter_normalization_is_that_of_a_loop_over_filters():
    w = network()
    raw, found = (random_direction("test", w, 3, 1, kind) for kind in (None, "filter"))
    for name, weight in w.items():
        for filter_of_w, filter_of_d, now in zip(weight, raw[name], found[name], strict=True):
            if weight.dim() < 2:
                assert now == 0
            else:
                expected = filter_of_d * (filter_of_w.norm() / filter_of_d.norm())
                torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-7)


def test_layer_normalization_is_that_of_whole_tensors():
    w = network()
    raw, found = (random_direction("test", w, 3, 1, kind) for kind in (None, "layer"))
    for name, weight in w.items():
        expected = raw[name] * (weight.norm() / raw[name].norm()) if weight.dim() > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)


def test_filters_of_zeros_stay_zero():
    w = {"a": torch.randn(3, 4)}
    w["a"][1] = 0
    assert not random_direction("test", w, 0, 0, "filter")["a"][1].any()


def test_directions_are_the_noise_of_the_contract():
    w = network()
    for number in (0, 5):
        found = random_direction("test", w, 7, number, None)
        for row, (name, weight) in enumerate(w.items()):
            expected = lsf.ops.philox_normal(weight.numel(), 7, row_offset=row, sample=number)
            assert torch.equal(found[name].flatten(), expected)


def test_directions_do_not_depend_on_where_the_weights_are_but_on_seed_and_number():
    direction = lambda w, seed, number: torch.cat(
        [d.flatten() for d in random_direction("test", w, seed, number, None).values()]
    )
    a, b = network(), network()
    assert torch.equal(direction(a, 1, 2), direction(b, 1, 2))
    assert not torch.equal(direction(a, 1, 2), direction(a, 1, 3)) and not torch.equal(
        direction(a, 1, 2), direction(a, 2, 2)
    )


@pytest.mark.parametrize("normalization", [None, "filter", "layer"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_ray_directions_have_unit_length(normalization, orthogonal):
    directions = unit_directions(network(), 6, 0, normalization, orthogonal)
    held = [directions(r) for r in range(6)]
    products = gram(held)
    torch.testing.assert_close(products.diagonal(), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    apart = products - products.diagonal().diag()
    assert (apart.abs().max() < 1e-6) == orthogonal


def test_more_orthogonal_rays_than_weights_are_refused():
    model = nn.Linear(2, 1, bias=False).double()
    call = lambda n: lsf.rays(model, model, quadratic_loader(), max_distance=1.0, num_rays=n, orthogonal=True,
                              loss_fn=lambda out, y: out.sum() * 0)  # fmt: skip
    with pytest.raises(ValueError, match="rays: num_rays must be at most the number of weights if orthogonal, got 3"):
        call(3)


def test_random_plane_has_unit_coordinates_and_a_box_of_the_weights_size():
    w = network()
    plane = lsf.Plane.random(w, seed=4, label="net")
    assert plane.marks == {"net": (0.0, 0.0)}
    size = math.sqrt(sum(t.double().square().sum() for t in w.values() if t.dim() > 1))
    (left, right), (bottom, top) = plane.box
    assert left == -right and bottom == -top
    assert math.isclose(right, size, rel_tol=1e-6) and 0.5 * size < top <= size * (1 + 1e-6)
    for x, y in ((1.0, 0.0), (0.0, 1.0), (0.6, -0.8)):
        moved = {n: t - w[n] for n, t in plane.weights(x, y).items()}
        assert math.isclose(norm(moved), 1, rel_tol=1e-5)
        assert all(not moved[n].any() for n, t in w.items() if t.dim() < 2)
    again, other = lsf.Plane.random(w, seed=4), lsf.Plane.random(w, seed=5)
    assert all(torch.equal(t, again.weights(1, 1)[n]) for n, t in plane.weights(1, 1).items())
    assert any(not torch.equal(t, other.weights(1, 1)[n]) for n, t in plane.weights(1, 1).items())
    free = lsf.Plane.random(w, normalization=None, extent=0.5)
    np.testing.assert_allclose(free.box, [(-0.5 * norm(w), 0.5 * norm(w))] * 2)


def test_random_plane_of_a_quadratic_is_its_formula():
    model = Quadratic(1)
    plane = lsf.Plane.random(model, normalization=None, extent=0.1)
    surface = plane.evaluate(model, quadratic_loader(), points=(3, 4), loss_fn=mean_loss)
    for i, x in enumerate(surface.xs):
        for j, y in enumerate(surface.ys):
            assert math.isclose(surface.values["loss"][i, j], model.loss(plane.weights(x, y)).item(), rel_tol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lsf.Plane.random(Classifier(), normalization="weight"), "normalization must be one of .*'weight'"),
        (lambda: lsf.Plane.random({"b": torch.ones(9)}), "normalization='filter' leaves no direction"),
        (lambda: lsf.Plane.random({"a": torch.zeros(9, 2)}, normalization="layer"), "normalization='layer' leaves no"),
        (lambda: lsf.Plane.random({"a": torch.ones(1)}, normalization=None), "must have two coordinates to vary"),
    ],
)
def test_random_planes_refuse(make, message):
    with pytest.raises(ValueError, match=rf"Plane\.random: .*{message}"):
        make()
