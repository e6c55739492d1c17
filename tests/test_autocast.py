"""Whoever writes weights in place within torch.autocast measures the new ones, not the casts made before."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.integrations import install_average

CYCLES = [{"steps": 5, "lr": 0.05, "insert": "equal", "count": 2}]
QUIET = {"progress": False}


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 8, generator=draw), torch.randint(5, (32,), generator=draw)) for _ in range(2)]


def moved(*collectors):
    """A network that the collectors have seen on its way, and a copy of where it began."""
    model = network(1)
    start = copy.deepcopy(model)
    for seed in range(2, 6):
        model.load_state_dict(network(seed).state_dict())
        for collect in collectors:
            collect(model)
    return model, start


def plane():
    return lsf.Plane.through(network(1), network(2), network(3)).evaluate(network(4), batches(), points=3, **QUIET)


def graph_measure():
    graph = lsf.MinimaGraph(network(1))
    return np.array([graph.measure(network(seed), batches()) for seed in (1, 2, 3)])


def neb():
    curve = lsf.auto_neb(network(1), network(1), network(2), batches(), cycles=CYCLES, **QUIET)
    return np.array([*curve.report.points["loss"], *[p.detach().sum() for p in curve.bends[1].parameters()]])


def swag_of_networks():
    swag = lsf.SWAG(network(1))
    return swag, *moved(swag.collect_model)


def swag_sample_into():
    swag, model, _ = swag_of_networks()
    x, found = batches()[0][0], []
    for s in range(3):
        swag.sample(seed=0, sample=s, into=model)
        found.append(model(x).detach().float().sum())
    return np.array(found)


def swag_sample_own():
    swag, x, found = swag_of_networks()[0], batches()[0][0], []
    for s in range(3):
        swag.sample(seed=0, sample=s)
        found.append(swag(x).detach().float().sum())
    return np.array(found)


def averaged_model():
    """Each output is that of the average so far."""
    average, found = lsf.AveragedModel(network(1)), []
    for p in average.parameters():
        p.requires_grad_()
    moved(average.update_parameters, lambda _: found.append(average(batches()[0][0]).detach().float().sum()))
    return np.array(found)


def averaged_weights():
    average = lsf.AveragedModel(network(1))
    model, _ = moved(average.update_parameters)
    x = batches()[0][0]
    found = [model(x)]
    with lsf.averaged_weights(model, average):
        found.append(model(x))
    return np.array([f.detach().float().sum() for f in [*found, model(x)]])


def installed_average():
    average = lsf.AveragedModel(network(1))
    model, _ = moved(average.update_parameters)
    x = batches()[0][0]
    found = [model(x)]
    install_average(model, average)
    return np.array([f.detach().float().sum() for f in [*found, model(x)]])


def fge_predict():
    model = network(1)
    fge = lsf.FGE(model)
    moved(fge.collect_model)
    return fge.predict(batches()[0][0]).numpy()


TOOLS = {
    "plane": lambda: plane().values["loss"],
    "line": lambda: lsf.line(network(4), network(1), network(2), batches(), points=4, **QUIET).values["loss"],
    "rays": lambda: lsf.rays(network(4), network(1), batches(), max_distance=1.0, num_rays=2, points=3, **QUIET)
    .values["loss"],
    "evaluate_curve": lambda: lsf.evaluate_curve(lsf.Curve([network(1), network(2)]), batches(), num_points=3)
    .values["data"]["loss"],
    "Curve.predict": lambda: lsf.Curve([network(1), network(2)]).predict(batches()[0][0], [0.1, 0.9]).numpy(),
    "auto_neb": neb,
    "MinimaGraph.measure": graph_measure,
    "SWAG.predict": lambda: swag_of_networks()[0].predict(batches()[0][0], num_samples=3, seed=0).numpy(),
    "SWAG.sample": swag_sample_own,
    "SWAG.sample(into=)": swag_sample_into,
    "AveragedModel": averaged_model,
    "averaged_weights": averaged_weights,
    "AveragingCallback": installed_average,
    "FGE.predict": fge_predict,
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_tools_measure_the_weights_that_they_wrote(tool, grad):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = TOOLS[tool]()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found = TOOLS[tool]()
    assert len({*np.ravel(expected).tolist()}) > 1  # or there would be nothing to tell apart
    np.testing.assert_array_equal(found, expected)
