"""Geometry of planes, and surfaces that a formula knows."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from surface_models import Classifier, Quadratic, classifier_loaders, mean_loss, quadratic_loader
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.surface.weights import combine


def flat(weights):
    weights = weights if isinstance(weights, dict) else dict(weights.named_parameters())
    return torch.cat([w.detach().double().flatten() for w in weights.values()])


def three():
    return [Quadratic(seed) for seed in (1, 2, 3)]


def test_plane_through_is_gram_schmidt():
    models = three()
    plane = lsf.Plane.through(*models, labels=("a", "b", "c"))
    w0, w1, w2 = map(flat, models)
    u, v = w1 - w0, w2 - w0
    x_hat = u / u.norm()
    height = v - x_hat.dot(v) * x_hat
    assert [*plane.marks] == ["a", "b", "c"] and plane.marks["a"] == (0.0, 0.0)
    np.testing.assert_allclose(plane.marks["b"], (u.norm(), 0), rtol=1e-13)
    np.testing.assert_allclose(plane.marks["c"], (x_hat.dot(v), height.norm()), rtol=1e-13)
    for x, y in ((0.0, 0.0), (1.3, -0.4), (-2.0, 5.0)):
        expected = w0 + x * x_hat + y * height / height.norm()
        torch.testing.assert_close(flat(plane.weights(x, y)), expected, rtol=1e-13, atol=1e-13)


def test_plane_project_inverts_weights_and_measures_what_sticks_out():
    models = three()
    plane = lsf.Plane.through(*models)
    np.testing.assert_allclose(plane.project(plane.weights(0.7, -1.9)), (0.7, -1.9, 0), atol=1e-12)
    other = Quadratic(4)
    x, y, off = plane.project(other)
    assert off > 0.1
    distance = lambda a: (flat(other) - flat(plane.weights(*a))).norm().item()
    assert math.isclose(distance((x, y)), off, rel_tol=1e-12)
    for step in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert distance((x + step[0], y + step[1])) > off


def test_plane_does_not_follow_the_models_it_was_made_from():
    models = three()
    plane = lsf.Plane.through(*models)
    before = flat(plane.weights(0.3, 0.4))
    with torch.no_grad():
        for model in models:
            model.matrix.add_(1)
    assert torch.equal(flat(plane.weights(0.3, 0.4)), before)
    first, second = ({n: torch.randn_like(p) for n, p in models[0].named_parameters()} for _ in range(2))
    plane = lsf.Plane.along(models[0], first, second)
    before = flat(plane.weights(0.3, 0.4))
    first["matrix"].zero_(), second["vector"].zero_()
    assert torch.equal(flat(plane.weights(0.3, 0.4)), before)


def test_surface_of_a_quadratic_is_its_formula():
    models, live = three(), Quadratic(9)
    plane = lsf.Plane.through(*models)
    surface = plane.evaluate(live, quadratic_loader(), points=(6, 9), margin=(0.1, 0.2, 0.3, 0.4), loss_fn=mean_loss)
    assert surface.shape == (6, 9) and surface.values["loss"].shape == (6, 9) and surface.done.all()
    (x0, x1), (y0, y1) = plane.box
    np.testing.assert_allclose(surface.xs[[0, -1]], (x0 - 0.1 * (x1 - x0), x1 + 0.2 * (x1 - x0)))
    np.testing.assert_allclose(surface.ys[[0, -1]], (y0 - 0.3 * (y1 - y0), y1 + 0.4 * (y1 - y0)))
    for i, x in enumerate(surface.xs):
        for j, y in enumerate(surface.ys):
            assert math.isclose(surface.values["loss"][i, j], live.loss(plane.weights(x, y)).item(), rel_tol=1e-13)


def test_surface_at_the_corners_is_the_loss_of_the_networks():
    models, live = three(), Quadratic(9)
    models[2].load_state_dict({n: p + 0 * p for n, p in models[0].state_dict().items()})
    with torch.no_grad():  # w3 straight above w1, so that all three are corners of the box
        models[2].matrix[0, 0] += 1
        models[1].matrix[0, 0] = models[0].matrix[0, 0]
    surface = lsf.Plane.through(*models).evaluate(live, quadratic_loader(), points=2, margin=0, loss_fn=mean_loss)
    corners = [surface.values["loss"][place] for place in ((0, 0), (1, 0), (0, 1))]
    np.testing.assert_allclose(corners, [m.loss().item() for m in models], rtol=1e-12)


def test_every_source_of_weights_gives_the_same_plane():
    models = [Classifier(seed) for seed in (1, 2, 3)]
    expected = lsf.Plane.through(*models).marks
    states = [m.state_dict() for m in models]
    averages = [lsf.AveragedModel(m) for m in models]
    torch_averages = [torch.optim.swa_utils.AveragedModel(m) for m in models]
    swags = [lsf.SWAG(m, max_num_models=2) for m in models]
    for swag, m in zip(swags, models, strict=True):
        swag.collect_model(m)
    sources = {
        "state_dict with model": lsf.Plane.through(*states, model=models[0]),
        "one model tells": lsf.Plane.through(states[0], models[1], states[2]),
        "AveragedModel": lsf.Plane.through(*averages),
        "torch's": lsf.Plane.through(*torch_averages),
        "its state_dict": lsf.Plane.through(*(a.state_dict() for a in torch_averages), model=models[0]),
        "SWAG": lsf.Plane.through(*swags),
        "parameters": lsf.Plane.through(*(dict(m.named_parameters()) for m in models)),
        "compiled": lsf.Plane.through(*(torch.compile(m, backend="eager") for m in models)),
        "parallel": lsf.Plane.through(*(nn.DataParallel(m) for m in models)),
    }
    for name, plane in sources.items():
        np.testing.assert_allclose([*plane.marks.values()], [*expected.values()], rtol=1e-6, err_msg=name)


def test_buffers_and_tied_names_are_no_coordinates():
    models = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(3)]
    for k, m in enumerate(models):
        m[2].weight = m[0].weight
        m[1].running_mean.fill_(100.0 * k)
        m[1].num_batches_tracked.fill_(10000 * k)
    u, v = (flat(m) - flat(models[0]) for m in models[1:])
    plane = lsf.Plane.through(*(m.state_dict() for m in models))
    assert math.isclose(plane.marks["w2"][0], u.norm(), rel_tol=1e-6)
    assert math.isclose(math.hypot(*plane.marks["w3"]), v.norm(), rel_tol=1e-6)
    assert math.isclose(plane.project(models[1].state_dict())[0], u.norm(), rel_tol=1e-6)


def test_a_buffer_taken_for_a_weight_is_found_out():
    states = [Classifier(seed).state_dict() for seed in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"Plane\.evaluate: the weights must be parameters .* hold shift; give model="):
        lsf.Plane.through(*states).evaluate(Classifier(), classifier_loaders())


def test_half_precision_networks_span_a_plane_in_fp32():
    models = [Classifier(seed).bfloat16() for seed in (1, 2, 3)]
    plane = lsf.Plane.through(*models)
    assert all(w.dtype == torch.float32 for w in plane.weights(0, 0).values())
    u = flat(models[1]) - flat(models[0])
    assert math.isclose(plane.marks["w2"][0], u.norm(), rel_tol=1e-6)
    loaders = {n: [(x.bfloat16(), y) for x, y in batches] for n, batches in classifier_loaders().items()}
    surface = plane.evaluate(Classifier().bfloat16(), loaders, points=2)
    assert np.isfinite(surface.values["train_loss"]).all()


def test_trajectories_of_curves_and_lists():
    ends = [Classifier(1), Classifier(2)]
    curve = lsf.Curve(ends, kind="bezier", num_bends=3)
    with torch.no_grad():
        for p in curve.bends[1].parameters():
            p.add_(torch.randn_like(p))
    plane = lsf.Plane.through(ends[0], ends[1], dict(curve.bends[1].named_parameters()))
    seen = plane.trajectory(curve, num_points=5)
    assert seen.path.shape == (5, 3) and seen.knots.shape == (3, 3)
    assert (seen.path[:, 2] < 1e-5 * plane.marks["w2"][0]).all()  # in the plane
    np.testing.assert_allclose(seen.knots[:, :2], [plane.marks[n] for n in ("w1", "w3", "w2")], atol=1e-5)
    c = np.array([[(1 - t) ** 2, 2 * t * (1 - t), t * t] for t in np.linspace(0, 1, 5)])
    np.testing.assert_allclose(seen.path[:, :2], c @ seen.knots[:, :2], atol=1e-5)
    walked = plane.trajectory([ends[0], Classifier(5), curve.weights(0.5)])
    assert walked.knots.shape == (0, 3) and walked.path[1, 2] > 0.1
    np.testing.assert_allclose(walked.path[2], seen.path[2], atol=1e-5)


def test_plane_pca_is_that_of_the_matrix_of_networks():
    models = [Quadratic(seed) for seed in range(5)]
    plane = lsf.Plane.pca(models)
    matrix = torch.stack([flat(m) for m in models])
    _, s, axes = torch.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    expected = (matrix - matrix.mean(0)) @ axes[:2].t()
    found = plane.trajectories["trajectory"].path
    signs = np.sign((found[:, :2] * expected.numpy()).sum(0))
    np.testing.assert_allclose(found[:, :2] * signs, expected, atol=1e-12)
    np.testing.assert_allclose((found[:, 2] ** 2).sum(), (s[2:] ** 2).sum(), rtol=1e-10)
    assert plane.box[0] == (found[:, 0].min(), found[:, 0].max())
    np.testing.assert_allclose(plane.explained_variance, (s**2 / (s**2).sum())[:2], rtol=1e-10)


def test_plane_along_given_directions():
    model = Quadratic(1)

    def along(k):
        direction = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        direction["vector"][k] = 2.0
        return direction

    plane = lsf.Plane.along(model, along(0), along(3), extent=3.0)
    assert plane.box == ((-6.0, 6.0), (-6.0, 6.0))
    moved = plane.weights(1.5, -0.5)
    expected = model.vector.detach().clone()
    expected[0] += 1.5
    expected[3] -= 0.5
    torch.testing.assert_close(moved["vector"], expected)
    assert torch.equal(moved["matrix"], model.matrix)


def nan_at(model, name):
    values = OrderedDict(model.state_dict())
    values[name] = values[name].clone().fill_(math.nan)
    return values


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda a, b, c: (a, b, "net.pt"), TypeError, "w3 must be a model, an average of one, or a mapping.*got str"),
        (lambda a, b, c: (a, b, {"state_dict": c.state_dict()}), TypeError, "w3 must map names to tensors, got a Ord"),
        (lambda a, b, c: (a, a, c), ValueError, "lie on one line"),
        (lambda a, b, c: (a, b, b), ValueError, "lie on one line"),
        (lambda a, b, c: (a, b, combine([dict(a.named_parameters()), dict(b.named_parameters())], [0.3, 0.7])),
         ValueError, "lie on one line"),
        (lambda a, b, c: (a, nan_at(b, "vector"), c), ValueError, "w2: .*finite, got NaN or inf in vector"),
        (lambda a, b, c: (a, b, {"matrix": c.matrix}), ValueError, "w3 must have .*; it lacks vector"),
        (lambda a, b, c: (a, b, c.state_dict() | {"extra": c.vector}), ValueError, "w3 must .*; it has extra besides"),
        (lambda a, b, c: (a, b, c.state_dict() | {"vector": torch.ones(6)}), ValueError, r"vector .*\(5,\).*\(6,\)"),
        (lambda a, b, c: ({}, b, c), ValueError, "w1 must have"),
        (lambda a, b, c: ({}, {}, {}), ValueError, "w1 must hold floating parameters"),
        (lambda a, b, c: (a, b, c.state_dict() | {"vector": torch.ones(5, device="meta")}), ValueError, "hold values"),
        (lambda a, b, c: (a, b, lsf.Curve([a, b])), TypeError, r"w3 must be one point; of a Curve give its weights\(t"),
        (lambda a, b, c: ({"z": torch.ones(2, dtype=torch.cfloat)},) * 3, NotImplementedError, "z is complex"),
    ],
)  # fmt: skip
def test_plane_through_refuses(change, error, message):
    with pytest.raises(error, match=rf"Plane\.through: .*{message}"):
        lsf.Plane.through(*change(*three()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plane_through_refuses_points_that_rounding_alone_keeps_off_a_line(dtype):
    a, b = Classifier(1).to(dtype), Classifier(2).to(dtype)
    middle = {n: torch.lerp(p.detach(), dict(b.named_parameters())[n].detach(), 0.3) for n, p in a.named_parameters()}
    with pytest.raises(ValueError, match="lie on one line"):
        lsf.Plane.through(a, b, middle)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda m: lsf.Plane.through(*m, labels=("a", "a", "b")), ValueError, "labels must be 3 different names"),
        (lambda m: lsf.Plane.along(m[0], m[1], m[1]), ValueError, r"Plane\.along: first and second .* parallel"),
        (lambda m: lsf.Plane.pca(m[:2]), ValueError, r"Plane\.pca: trajectory must hold at least 3 networks, got 2"),
        (lambda m: lsf.Plane.pca([m[0], m[1], m[0]]), ValueError, r"Plane\.pca: .* one line"),
        (lambda m: lsf.Plane.random(m[0], seed="1"), TypeError, r"Plane\.random: seed must be an int, got str"),
        (lambda m: lsf.Plane.random(m[0], extent=0), ValueError, r"Plane\.random: extent must be positive"),
        (
            lambda m: lsf.Plane.through(*m).project({"matrix": m[0].matrix}),
            ValueError,
            r"project: weights .* lacks vec",
        ),
        (lambda m: lsf.Plane.through(*m).trajectory([]), ValueError, "at least one network, got none"),
    ],
)
def test_other_planes_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make(three())


def test_memory_formats_and_empty_parameters_make_no_difference():
    def network(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        model.empty = nn.Parameter(torch.zeros(0, 3))
        return model

    plain = [network(seed) for seed in (1, 2, 3)]
    mixed = [network(1), network(2).to(memory_format=torch.channels_last), network(3)]
    a, b = lsf.Plane.through(*plain), lsf.Plane.through(*mixed)
    np.testing.assert_allclose([*a.marks.values()], [*b.marks.values()], rtol=1e-12)
    for name, weight in a.weights(0.3, 0.4).items():
        torch.testing.assert_close(b.weights(0.3, 0.4)[name], weight, rtol=0, atol=1e-7)
    loader = [(torch.randn(5, 3, 3, 3), torch.randint(2, (5,)))]
    live = network(4).to(memory_format=torch.channels_last)
    found = b.evaluate(live, loader, points=2, progress=False).values["loss"]
    np.testing.assert_allclose(
        found, a.evaluate(network(4), loader, points=2, progress=False).values["loss"], rtol=1e-5
    )
    assert live[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_models_that_have_not_run_yet_are_refused():
    lazy = [nn.LazyLinear(3) for _ in range(3)]
    for sources in (lazy, [m.state_dict() for m in lazy]):
        with pytest.raises(ValueError, match=r"Plane\.through: w1: weight must hold values, got a lazy tensor"):
            lsf.Plane.through(*sources)
    with pytest.raises(ValueError, match="line: model: weight must hold values, got a lazy tensor"):
        lsf.line(lazy[0], nn.Linear(2, 3), nn.Linear(2, 3), [])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"points": 1}, ValueError, "points must be at least 2, got 1"),
        ({"points": (3, 1)}, ValueError, "points must be at least 2, got 1"),
        ({"points": (3, 3, 3)}, TypeError, r"points must be an int or 2 of them, got \(3, 3, 3\)"),
        ({"points": 2.5}, TypeError, "points must be an int or 2 of them, got 2.5"),
        ({"margin": -0.2}, ValueError, "margin must not be negative, got -0.2"),
        ({"margin": (0.1, 0.1, -0.1, 0.1)}, ValueError, "margin must not be negative, got -0.1"),
        ({"margin": (0.1, 0.1)}, TypeError, "margin must be a number or 4 of them"),
        ({"margin": "wide"}, TypeError, "margin must be a number or 4 of them, got 'wide'"),
        ({"trajectories": [nn.Linear(2, 2)]}, TypeError, "trajectories must be a mapping from labels .*, got list"),
        ({"trajectories": {"t": [nn.Linear(2, 2)]}}, ValueError, "weights must have the tensors of"),
    ],
)
def test_plane_evaluate_refuses(arguments, error, message):
    plane = lsf.Plane.through(*three())
    with pytest.raises(error, match=message):
        plane.evaluate(Quadratic(), quadratic_loader(), loss_fn=mean_loss, **arguments)
