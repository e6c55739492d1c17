"""Ctrl-C at any line: weights, buffers, modes and switches are as before."""

import os
import sys

import pytest
import torch
from torch import nn

import losssurf_fast as lsf

RESTORING = ("undoing.py", "swap.py", "prediction.py", "batch_norm.py", "bends.py", "walk.py", "evaluate.py")
CYCLES = [{"steps": 2, "lr": 0.05, "insert": "equal", "count": 1, "subsample": 1}]


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3)))
    model[2].eval()
    return model


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=draw), torch.randint(3, (8,), generator=draw))]


def interrupted_at(line, call):
    """Whether ``call`` was cut off at the line of that number, counted over those of files that change and restore."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if os.path.basename(frame.f_code.co_filename) not in RESTORING:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        torch.compiler.set_stance("default")  # torch's own context is not safe in this way
    return False


def state(*models):
    """All that must be as before; an interrupted block's own generators are closed by then."""
    return [
        (
            {n: (t.tolist(), t.data_ptr()) for n, t in [*m.named_parameters(), *m.named_buffers()]},
            [n for n, _ in m.named_parameters()],
            [(s.training, getattr(s, "track_running_stats", None), len(s._forward_pre_hooks)) for s in m.modules()],
        )
        for m in models
    ]


def tools():
    model, curve, data, quiet = network(0), lsf.Curve([network(1), network(2)]), batches(), {"progress": False}
    swag = lsf.SWAG(model)
    for seed in (1, 2):
        swag.collect_model(network(seed))
    ends = network(1), network(2)

    def averaged():
        with lsf.averaged_weights(model, swag):
            lsf.update_bn(data, model)

    bn = {"bn_loader": data}
    plane = lsf.Plane.through(*ends, network(3))
    graph = lsf.MinimaGraph(model)
    return {
        "plane": (lambda: plane.evaluate(model, data, points=2, **bn, **quiet), model),
        "line": (lambda: lsf.line(model, *ends, data, points=3, **bn, **quiet), model),
        "rays": (
            lambda: lsf.rays(model, ends[0], data, max_distance=1.0, num_rays=1, points=3, **bn, **quiet),
            model,
        ),
        "evaluate_curve": (lambda: lsf.evaluate_curve(curve, {"train": data}, num_points=3), curve),
        "Curve.predict": (lambda: curve.predict(data, [0.2, 0.8], bn_loader=data), curve),
        "auto_neb": (lambda: lsf.auto_neb(model, *ends, data, cycles=CYCLES, **quiet), model),
        "MinimaGraph.measure": (lambda: graph.measure(ends[0], data), model),
        "predict": (lambda: lsf.predict(model, data[0][0], scheme="deterministic"), model),
        "averaged_weights": (averaged, model),
    }


@pytest.mark.parametrize("tool", [*tools()])
def test_every_line_can_be_interrupted(tool):
    call, model = tools()[tool]
    before, line = state(model), 1
    while interrupted_at(line, call):
        assert state(model) == before, f"line {line} of {tool}"
        line += 11
    assert line > 11
