"""Surfaces on a GPU: those of the CPU, whichever of the two holds the networks."""

import numpy as np
import pytest
import torch
from surface_models import Classifier, classifier_loaders, state

import losssurf_fast as lsf
from losssurf_fast.surface.rays import unit_directions

pytestmark = pytest.mark.gpu


def plane(device):
    return lsf.Plane.through(*(Classifier(seed).to(device) for seed in (1, 2, 3)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_surface_is_that_of_the_cpu(device):
    expected = plane("cpu").evaluate(Classifier(4), classifier_loaders(), points=3, progress=False)
    model = Classifier(4).cuda()
    before = state(model)
    found = plane(device).evaluate(model, classifier_loaders(), points=3, device="cuda", progress=False)
    np.testing.assert_allclose(found.xs, expected.xs, rtol=1e-6)
    for name in ("train_loss", "test_loss"):
        np.testing.assert_allclose(found.values[name], expected.values[name], rtol=1e-4)
    assert state(model) == before


def test_plane_of_networks_on_the_gpu_stays_there():
    found = plane("cuda")
    assert all(w.is_cuda for w in found.weights(0.3, 0.4).values())
    np.testing.assert_allclose([*found.marks.values()], [*plane("cpu").marks.values()], rtol=1e-6, atol=1e-6)


def test_a_run_begun_on_the_cpu_goes_on_on_the_gpu(tmp_path):
    path = tmp_path / "plane.npz"
    plane("cpu").evaluate(Classifier(4), classifier_loaders(), points=3, path=path, progress=False)
    found = plane("cuda").evaluate(
        Classifier(4).cuda(), classifier_loaders(), points=3, path=path, device="cuda", progress=False
    )
    np.testing.assert_array_equal(found.values["test_loss"], lsf.Surface.load(path).values["test_loss"])


@pytest.mark.parametrize("normalization", [None, "filter"])
def test_rays_have_the_directions_of_the_cpu(normalization):
    w = {n: p.detach() for n, p in Classifier(1).named_parameters()}
    here = unit_directions(w, 3, 5, normalization, False)(2)
    there = unit_directions({n: t.cuda() for n, t in w.items()}, 3, 5, normalization, False)(2)
    for name, direction in here.items():
        torch.testing.assert_close(there[name].cpu(), direction, rtol=1e-5, atol=1e-7)
